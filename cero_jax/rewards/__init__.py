"""Verifiers: plain functions `(question, completion, answer) -> float or Verdict`, named in a config. No jax here."""

from collections.abc import Callable
from typing import NamedTuple

STATUSES = RIGHT, WRONG, NO_ANSWER, TOO_LONG, TIMED_OUT, ERROR = (
    "right",
    "wrong",
    "no answer",  # nothing that could be read as one
    "too long",  # cut at the length limit, or an answer beyond a verifier's bounds
    "timed out",  # the verifier did: no evidence on the answer
    "error",  # of the verifier: it raised, died or ran out of memory
)


class Verdict(NamedTuple):
    """What a verifier says of a completion."""

    reward: float
    status: str  # one of STATUSES
    extracted: str = ""  # the answer that was read; what went wrong, where the status is "error"


Verifier = Callable[[str, str, str], "float | Verdict"]  # (question, completion, answer); question may be ignored


def verdict(result: "float | Verdict") -> Verdict:
    """A verifier's result as a Verdict: a reward of at least 1/2 is right. Raises TypeError where it is neither."""
    if isinstance(result, Verdict):
        return result
    reward = float(result)
    return Verdict(reward, RIGHT if reward >= 0.5 else WRONG)


def compared(right: bool, extracted: str) -> Verdict:
    """The Verdict of an answer that could be read."""
    return Verdict(1.0, RIGHT, extracted) if right else Verdict(0.0, WRONG, extracted)
