"""Verifiers: plain functions `(question, completion, answer) -> float or Verdict`. No jax here."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

STATUSES = RIGHT, WRONG, NO_ANSWER, TOO_LONG, TIMED_OUT, ERROR = (
    "right",
    "wrong",
    "no answer",  # nothing that could be read as one
    "too long",  # cut at the length limit, or an answer beyond a verifier's bounds
    "timed out",  # the verifier did: no evidence on the answer
    "error",  # of the verifier: it raised, died, ran out of memory, or gave no number that is a reward
)
UNJUDGED = TIMED_OUT, ERROR  # the verifier said nothing of the completion: no evidence
CORRECT = "correct"  # the part of a reward that says whether the answer is right
MAX_REWARD = 1e12  # in size: squares of it, and their sums, are far from the end of float32


class Verdict(NamedTuple):
    """What a verifier says of a completion."""

    reward: float
    status: str  # one of STATUSES
    extracted: str = ""  # the answer that was read; what went wrong, where the status is "error"
    # What the reward is made of, by name, each on a scale of its own; CORRECT among them counts as a success.
    parts: Mapping[str, float] = {}  # never changed in place


class Verifier(Protocol):
    """What judges a completion; a plain function of yours will do."""

    def __call__(self, question: str, completion: str, answer: str, /) -> float | Verdict:
        """The reward, a finite number, or a Verdict. answer: the prompt's gold answer. Ignore what you do not need."""
        ...


class VerifyMany(Protocol):
    """What judges many completions at once: in other processes, on a server, in a batch of a reward model."""

    def __call__(self, asked: Sequence[tuple[str, str, str]], /) -> Sequence[float | Verdict]:
        """A reward or a Verdict of each, in order. asked: (question, completion, answer) of each. May take its time."""
        ...


def verdict(result: float | Verdict) -> Verdict:
    """A verifier's result as a Verdict: a number of at least 1/2 is right. Raises ValueError where it is no reward."""
    own = result if isinstance(result, Verdict) and result.status in STATUSES else None
    reward = _checked(own.reward if own else result, f"it gave {result!r}")
    if own:
        read = "" if own.extracted is None else str(own.extracted)
        if not isinstance(own.parts, Mapping):
            raise ValueError(f"it gave {result!r}: the parts of a reward are a dict of numbers by their names")
        parts = {str(name): _checked(value, f"it gave {name}={value!r}") for name, value in own.parts.items()}
        return Verdict(reward, STATUSES[STATUSES.index(own.status)], read, parts)  # plain values, which JSON holds
    return Verdict(reward, RIGHT if reward >= 0.5 else WRONG)


def guarded(give: Callable[[], float | Verdict]) -> Verdict:
    """The Verdict on what `give` returns; "error" where it raises, or that is no reward."""
    try:
        return verdict(give())
    except Exception as error:  # whatever a user's function raises
        return failed(error)


def failed(error: Exception) -> Verdict:
    """The Verdict of a verifier that raised."""
    return Verdict(0.0, ERROR, f"{type(error).__name__}: {error}"[:500])


def _checked(value: Any, gave: str) -> float:
    """The value as a reward. Raises ValueError, which begins with `gave`, where it is none."""
    try:
        reward = float(one_number(value))
    except (TypeError, ValueError, OverflowError):
        names = ", ".join(map(repr, STATUSES))
        raise ValueError(f"{gave}: give a number, or a Verdict whose status is one of {names}") from None
    if not math.isfinite(reward):
        raise ValueError(f"it gave {reward}: a reward must be finite")
    if abs(reward) > MAX_REWARD:
        raise ValueError(f"it gave {reward:g}: a reward must lie within -{MAX_REWARD:g} and {MAX_REWARD:g}")
    return reward


def one_number(reward: Any) -> Any:
    """The reward as it is. Raises TypeError where it is text, a bool or an array, which float() would take."""
    is_bool = isinstance(reward, bool) or "bool" in str(getattr(reward, "dtype", ""))
    if is_bool or isinstance(reward, str | bytes) or getattr(reward, "shape", ()) != ():
        raise TypeError(f"{reward!r} is not one number")
    return reward


def compared(right: bool, extracted: str) -> Verdict:
    """The Verdict of an answer that could be read."""
    return Verdict(1.0, RIGHT, extracted) if right else Verdict(0.0, WRONG, extracted)
