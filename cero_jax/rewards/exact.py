"""Reward 1 for the gold answer to the letter."""


def exact(question: str, completion: str, answer: str) -> float:
    """1.0 where the whole completion is the answer, white space around both aside; else 0.0."""
    del question
    return float(completion.strip() == answer.strip())
