r"""Reward 1 for an answer that stands where it is looked for, whatever it is: \boxed{}, <answer></answer> or "####".

The place is found by the rule of `cero_jax.rewards.find`, so that what is rewarded here is what a verifier reads: a box
whose brace is missing, an empty one and "the answer is 5" have none of it. A <think> or <answer> must be closed.
"""

from cero_jax.rewards import NO_ANSWER, Verdict, compared
from cero_jax.rewards.find import find

MAX_SHOWN = 200  # characters of the place that the verdict keeps
TAGS = "think", "answer"


def formatted(question: str, completion: str, answer: str) -> Verdict:
    """Right where the completion marks an answer and closes its tags."""
    del question, answer
    place = find(completion)
    if place is None or place.prose or not place.text:
        return Verdict(0.0, NO_ANSWER)
    closed = all(completion.count(f"<{tag}>") <= completion.count(f"</{tag}>") for tag in TAGS)
    return compared(closed, place.text[:MAX_SHOWN])
