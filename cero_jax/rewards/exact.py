"""Reward 1 for the gold answer to the letter."""

from cero_jax.rewards import NO_ANSWER, Verdict, compared

MAX_SHOWN = 200  # characters of what was read that a Verdict carries


def exact(question: str, completion: str, answer: str) -> Verdict:
    """Right where the whole completion is the answer, white space around both aside."""
    del question
    given = completion.strip()
    if not given:
        return Verdict(0.0, NO_ANSWER)
    return compared(given == answer.strip(), given[:MAX_SHOWN])
