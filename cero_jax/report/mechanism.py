"""How an allocation works: the groups that it draws, beside what the posterior said of their prompts before.

NumPy in float64; an epoch costs its groups, and no more than 16,384 prompts beside them. The same functions serve a
run's metrics, the report on it, and simulated runs (benchmarks/replication.py). Every figure is of groups: a group cut
over two steps counts once.

Letters: N prompts, M of them that stand for all, G groups drawn, B bins.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cero_jax.allocator.posterior import expected_variance

# Of predicted success. An edge is in the bin above it: 6 of 10 is 0.6, which np.linspace misses by its last bit.
EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SAMPLE = 16_384  # prompts that are looked at for what is so of all
BIN_NAMES = tuple(f"{low} to {high}" for low, high in pairwise(EDGES))


class Epoch(NamedTuple):
    """An epoch's groups, and what was believed of their prompts and of all before it: Beta(alpha, beta) of success."""

    prompt_ids: np.ndarray  # [G] int, rising
    alpha: np.ndarray  # [G] float64 > 0
    beta: np.ndarray  # [G] float64 > 0
    rollouts: np.ndarray  # [G] int > 0, those that are evidence
    correct: np.ndarray  # [G] int, successes among them
    all_alpha: np.ndarray  # [M] float64 > 0, of all N prompts, or of the SAMPLE that `spaced` takes
    all_beta: np.ndarray  # [M] float64 > 0


def epoch(alpha: np.ndarray, beta: np.ndarray, rollouts: np.ndarray, correct: np.ndarray) -> Epoch:
    """The same from arrays over all N prompts, in which a prompt without a group has 0 rollouts."""
    ids, every = np.flatnonzero(rollouts), spaced(len(rollouts))
    return Epoch(ids, alpha[ids], beta[ids], rollouts[ids], correct[ids], alpha[every], beta[every])


def spaced(number: int) -> slice:
    """All of N prompts, or where they are more than SAMPLE, that many or fewer that lie evenly spaced over them.

    "At random" is a mean over prompts: of 16,384 its standard error is below 1 % of their standard deviation.
    """
    return slice(None, None, -(-number // SAMPLE))


class Selection(NamedTuple):
    """Who got an epoch's groups, against an allocation that takes no notice of prompts. Sums, which add up over epochs.

    "At random" gives a group of each size that was handed out to a prompt drawn uniformly from all N.
    """

    groups: int
    effective: float  # groups expected to hold both a success and a failure
    effective_at_random: float  # the same, at random
    in_bin: np.ndarray  # [5] groups by the predicted success of their prompts
    in_bin_at_random: np.ndarray  # [5] the same, at random


class Groups(NamedTuple):
    """The groups that were drawn."""

    prompt_ids: np.ndarray  # [G] int
    rollouts: np.ndarray  # [G] int, those that are evidence
    correct: np.ndarray  # [G] int
    expected: np.ndarray  # [G] float64, E[p(1 - p)] before the epoch

    @property
    def effective(self) -> np.ndarray:
        """[G] bool: the group holds both a success and a failure."""
        return (self.correct > 0) & (self.correct < self.rollouts)


class Calibration(NamedTuple):
    """Variance expected and seen, in bins of as many groups each, by what was expected."""

    expected: np.ndarray  # [B]
    seen: np.ndarray  # [B]
    error: np.ndarray  # [B] standard error of `seen`, over prompts; nan where the bin has groups of one prompt only


def selection(of: Epoch) -> Selection:
    """Who gets the groups of an epoch. The chance that a group of n is effective: see `effective_chances`."""
    groups, sizes = len(of.rollouts), np.bincount(of.rollouts, minlength=1)  # groups of each size
    effective = at_random = 0.0
    alpha, beta = np.concatenate([of.alpha, of.all_alpha]), np.concatenate([of.beta, of.all_beta])
    for n, chance in enumerate(effective_chances(alpha, beta, len(sizes) - 1), 1):
        if sizes[n]:
            effective += chance[:groups][of.rollouts == n].sum()
            at_random += sizes[n] * chance[groups:].mean()
    place = np.digitize(alpha / (alpha + beta), EDGES[1:-1])
    in_bin, prompts = (np.bincount(x, minlength=len(BIN_NAMES)) for x in (place[:groups], place[groups:]))
    return Selection(groups, effective, at_random, in_bin, groups * prompts / len(of.all_alpha))


def effective_chances(alpha: np.ndarray, beta: np.ndarray, largest: int) -> Iterator[np.ndarray]:
    """For groups of 1, 2, ... `largest` rollouts, the chance [N] that one holds both a success and a failure.

    1 - E[p^n] - E[(1 - p)^n] under Beta(alpha, beta); E[p^n] is the product of (alpha + k) / (alpha + beta + k), k < n.
    """
    all_right = all_wrong = np.ones_like(alpha)
    for k in range(largest):
        total = alpha + beta + k
        all_right, all_wrong = all_right * (alpha + k) / total, all_wrong * (beta + k) / total
        yield np.maximum(1 - all_right - all_wrong, 0)  # which rounding would take below


def observe(epochs: Iterable[Epoch]) -> tuple[Selection, Groups]:
    """Who got the groups of all these epochs together, and what came of each group. At least one epoch."""
    return together([observe_one(each) for each in epochs])


def observe_one(of: Epoch) -> tuple[Selection, Groups]:
    """The same of a single epoch."""
    expected = expected_variance(of.alpha, of.beta)  # type: ignore[arg-type] (NumPy in, NumPy out)
    return selection(of), Groups(of.prompt_ids, of.rollouts, of.correct, expected)  # type: ignore[arg-type]


def together(observed: Sequence[tuple[Selection, Groups]]) -> tuple[Selection, Groups]:
    """What was observed of several epochs, at least one, as if of one."""
    selections, groups = zip(*observed, strict=True)
    summed = Selection._make(map(sum, zip(*selections, strict=True)))
    return summed, Groups._make(map(np.concatenate, zip(*groups, strict=True)))


def lift(selection: Selection) -> np.ndarray:
    """[5] share of the groups in each bin of predicted success over the share of prompts there then; nan where none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return selection.in_bin / selection.in_bin_at_random


def unbiased_variance(groups: Groups) -> np.ndarray:
    """[G] S (n - S) / (n (n - 1)) of S successes among n rollouts, whose mean is p (1 - p); nan for a group of one."""
    n, successes = groups.rollouts, groups.correct
    with np.errstate(invalid="ignore"):
        return successes * (n - successes) / (n * (n - 1))


def calibration(groups: Groups, num_bins: int) -> Calibration:
    """Expected variance against the unbiased variance seen, of groups of two or more.

    In num_bins bins, fewer where there are fewer groups. Groups of one prompt are no independent witnesses: the
    standard error is that of a mean over clusters, each a prompt's groups in the bin.
    """
    groups = Groups._make(each[groups.rollouts > 1] for each in groups)
    seen = unbiased_variance(groups)
    order = np.argsort(groups.expected, kind="stable")
    parts = [part for part in np.array_split(order, num_bins) if len(part)]
    bins = ((groups.expected[i].mean(), seen[i].mean(), clustered_error(seen[i], groups.prompt_ids[i])) for i in parts)
    return Calibration(*np.array(list(bins)).reshape(-1, 3).T)


def clustered_error(values: np.ndarray, clusters: np.ndarray) -> float:
    """Standard error of the mean of values [G] whose clusters [G] are independent; nan where there is one cluster.

    The square root of C / (C - 1) times the sum of each cluster's squared sum of residuals, over G^2, for C clusters.
    """
    _, place = np.unique(clusters, return_inverse=True)
    number = int(place.max()) + 1
    if number < 2:
        return float("nan")
    residuals = np.bincount(place, values - values.mean())
    return float(np.sqrt(number / (number - 1) * np.sum(residuals**2)) / len(values))


def exposure(rollouts: np.ndarray) -> np.ndarray:
    """[3] the 10, 50 and 90 % quantiles over prompts of rollouts [N] over their mean."""
    return np.quantile(rollouts / rollouts.mean(), [0.1, 0.5, 0.9])


def epoch_row(alpha: np.ndarray, beta: np.ndarray, rollouts: np.ndarray, drawn_before: np.ndarray) -> dict:
    """What the metrics file says of an epoch as it is allocated.

    alpha, beta: [N] float64 posterior before it. rollouts: [N] int, of each group. drawn_before: [N] int, rollouts of
    each prompt so far. A figure that is not defined is None.
    """
    of_epoch = selection(epoch(alpha, beta, rollouts, np.zeros_like(rollouts)))
    prompts = of_epoch.in_bin_at_random / of_epoch.groups
    return {
        "groups": of_epoch.groups,
        "effective_expected": float(of_epoch.effective) / of_epoch.groups,
        "effective_at_random": float(of_epoch.effective_at_random) / of_epoch.groups,
        "prompts_by_success": dict(zip(BIN_NAMES, prompts.tolist(), strict=True)),
        "lift_by_success": dict(zip(BIN_NAMES, (defined(x) for x in lift(of_epoch)), strict=True)),
        "exposure": dict(zip(("10", "50", "90"), exposure(drawn_before).tolist(), strict=True))
        if drawn_before.any()
        else None,
        "never_visited": float(np.mean(drawn_before == 0)),
    }


def defined(x: float) -> float | None:
    """For JSON, which has no nan."""
    return float(x) if np.isfinite(x) else None
