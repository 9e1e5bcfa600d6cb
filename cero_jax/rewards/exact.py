"""Reward 1 for a completion that is the gold answer, character for character."""

from cero_jax.rewards import NO_ANSWER, Verdict, compared

MAX_SHOWN = 200  # characters of the completion that the verdict keeps


def exact(question: str, completion: str, answer: str) -> Verdict:
    """Right where the whole completion equals the gold answer; white space around either does not count."""
    del question
    given = completion.strip()
    if not given:
        return Verdict(0.0, NO_ANSWER)
    return compared(given == answer.strip(), given[:MAX_SHOWN])
