"""Several rewards as one: their weighted sum, with each of them kept by name for the metrics."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from cero_jax.rewards import CORRECT, UNJUDGED, Verdict, Verifier, VerifyMany, guarded, verdict


def read_weights(text: str) -> dict[str, float]:
    """The weights of "correct=1, format=0.1, module:function=0.2" by name, in that order.

    Raises ValueError where that is not a list of names and finite numbers, names one twice, or leaves CORRECT out.
    """
    weights = {}
    for part in text.split(","):
        name, _, number = (each.strip() for each in part.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (name and math.isfinite(weight)):
            raise ValueError(f"rewards={text!r}: {part.strip()!r} is not name=weight, as in {CORRECT}=1, format=0.1")
        if name in weights:
            raise ValueError(f"rewards={text!r} names {name} twice: give it one weight")
        weights[name] = weight
    if CORRECT not in weights:
        raise ValueError(f"rewards={text!r} leaves out {CORRECT}, what the verifier says: add {CORRECT}=1")
    return weights


def weighted(weights: Mapping[str, float], judges: Mapping[str, VerifyMany]) -> VerifyMany:
    """What judges by all of `judges`, CORRECT among them: the reward is the sum of theirs, each times its weight.

    Status and extracted answer are those of CORRECT. Where one of them times out or fails, so does the whole.
    """

    def many(asked: Sequence[tuple[str, str, str]], /) -> list[Verdict]:
        found = [[guarded(partial(verdict, each)) for each in judges[name](asked)] for name in weights]
        return [_together(weights, dict(zip(weights, each, strict=True))) for each in zip(*found, strict=True)]

    return many


def one_by_one(verifier: Verifier) -> VerifyMany:
    """A verifier of one completion as one of many."""
    return lambda asked: [guarded(partial(verifier, *each)) for each in asked]


def _together(weights: Mapping[str, float], verdicts: Mapping[str, Verdict]) -> Verdict:
    """The verdict on one completion from those of each judge, by name."""
    for name, each in verdicts.items():
        if each.status in UNJUDGED:
            return Verdict(0.0, each.status, f"{name}: {each.extracted}")
    reward = sum(weights[name] * each.reward for name, each in verdicts.items())
    parts = {name: each.reward for name, each in verdicts.items()}
    return Verdict(reward, verdicts[CORRECT].status, verdicts[CORRECT].extracted, parts)
