"""Can an allocation help at all? How much more variance the prompts that seemed to vary have, in rollouts unseen.

Letters: N prompts of a log, V visits of the longest prompt, M prompts with enough rollouts, B blocks of a prompt.
"""

import math
from typing import NamedTuple

import numpy as np

LEAST = 4  # rollouts that are cut in two: each half needs two for a variance
WORTH_IT = 1.3  # a headroom under it leaves nothing that an allocation could win, once it has paid for finding out


class Headroom(NamedTuple):
    """What a log says of its prompts."""

    ratio: float  # mean variance of the top third over the mean of all, on held-out halves; nan: no rewards differ
    low: float  # 95 % interval over prompts
    high: float
    num_prompts: int  # that it is of
    left_out: int  # prompts with fewer than LEAST rollouts


def explain(found: Headroom) -> str:
    """A headroom in plain words, for whoever wonders whether to bother."""
    left_out = f"\nLeft out: prompts with fewer than {LEAST} rollouts, {found.left_out}." if found.left_out else ""
    if math.isnan(found.ratio):
        why = "no two rewards of one visit differ" if found.num_prompts else f"no prompt has {LEAST} rollouts"
        return f"Headroom: none to be had from this log, {why}.{left_out}"
    if found.ratio < WORTH_IT:
        meaning = f"""\
Below about {WORTH_IT} no allocation can help: the prompts are too much alike, or had too few rollouts for anybody to
tell them apart."""
    else:
        meaning = f"""\
Read it as a guide from above: rollouts placed by what half of this log knows would meet {found.ratio:.1f} times the
variance that evenly spent ones meet. An allocator has to find out first and to come back to every prompt, so it wins
less; and variance met is not yet accuracy. Below about {WORTH_IT} no allocation could help."""
    return f"""\
Headroom: {found.ratio:.2f} (95 % interval {found.low:.2f} to {found.high:.2f} over {found.num_prompts} prompts).
The third of the prompts that varied most in one half of its rollouts has that many times the variance of all prompts
in the other half. {meaning}{left_out}"""


def headroom(
    successes: np.ndarray, rollouts: np.ndarray, *, splits: int = 20, resamples: int = 200, seed: int = 0
) -> Headroom:
    """The mean variance of the third of the prompts that varied most over the mean of all, in rollouts kept back.

    Each prompt's rollouts are cut in two halves at random, visit by visit, so that a policy that moves is no variance.
    One half chooses the ceil(M / 3) prompts of the highest variance; prompts that tie for the last places share them.
    The other half, which has chosen nothing, scores them. Each half takes both parts in each of the splits, and the
    ratio is of means over all of these. A visit of fewer than LEAST rollouts counts as one with its neighbours.

    A half's variance is the mean of S (n - S) / (n (n - 1)), unbiased for p (1 - p), over its visits, each weighed by
    its n. The interval is a percentile bootstrap over prompts, which are chosen anew in each resample.

    Args:
        successes: [N, V] int, of each prompt at its visits, in order.
        rollouts: [N, V] int, 0 where there was no visit.
        splits: random cuts in two that are averaged.
        resamples: of the bootstrap.
        seed: of the cuts and the resamples.

    Returns:
        The headroom; nan where there is no prompt with LEAST rollouts, or none whose rewards differ.

    Few rollouts tell prompts apart badly, and that is in the figure: a real log with 424 rollouts a prompt has 2.02,
    the first 8 of each prompt alone 1.57.

    >>> round(headroom(np.array([[0, 0], [4, 4], [8, 8]]), np.full((3, 2), 8)).ratio, 6)
    3.0
    """
    correct, drawn = _blocks(successes, rollouts)
    num_prompts, left_out = len(drawn), len(rollouts) - len(drawn)
    if not np.any((correct > 0) & (correct < drawn)):
        return Headroom(math.nan, math.nan, math.nan, num_prompts, left_out)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=resamples)
    weights = np.concatenate([np.ones((1, num_prompts)), weights])  # first the log as it is
    best, everything = np.zeros((2, len(weights)))
    for _ in range(splits):
        size = drawn // 2
        some = rng.hypergeometric(correct, drawn - correct, size)
        halves = _variance(some, size), _variance(correct - some, drawn - size)
        for chooser, judge in (halves, halves[::-1]):
            best += _mean_of_top_third(chooser, judge, weights)
            everything += weights @ judge / num_prompts
    ratio = np.divide(best, everything, out=np.full(len(weights), math.nan), where=everything > 0)
    low, high = np.nanpercentile(ratio[1:], (2.5, 97.5))
    return Headroom(float(ratio[0]), float(low), float(high), num_prompts, left_out)


def _blocks(successes: np.ndarray, rollouts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(successes, rollouts), both [M, B]: consecutive visits together until they hold LEAST rollouts.

    What is left after a prompt's last whole block joins it. Prompts without a whole one are left out.
    """
    num_prompts, num_visits = rollouts.shape
    filled, prompts = np.zeros((2, num_prompts, num_visits + 1), int), np.arange(num_prompts)
    block = np.zeros(num_prompts, int)  # the one that is being filled
    for k in range(num_visits):
        filled[:, prompts, block] += successes[:, k], rollouts[:, k]
        block += filled[1, prompts, block] >= LEAST
    rest = filled[:, prompts, block]
    filled[:, prompts, block] = 0
    filled[:, prompts, np.maximum(block - 1, 0)] += rest
    correct, drawn = filled[:, block > 0]
    return correct, drawn


def _variance(successes: np.ndarray, rollouts: np.ndarray) -> np.ndarray:
    """[M] the mean over a prompt's blocks [M, B] of S (n - S) / (n (n - 1)), weighed by n; 0 rollouts: no block."""
    spread = successes * (rollouts - successes) / np.maximum(rollouts - 1, 1)
    return np.round(spread.sum(1) / rollouts.sum(1), 12)  # a tie is a tie in whatever order it was added up


def _mean_of_top_third(chooser: np.ndarray, judge: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[W] mean of judge [M] over the third of the prompts where chooser [M] is highest, under weights [W, M].

    Prompts that tie for the last places share them: the mean over all ways of breaking the tie.
    """
    order = np.argsort(-chooser, kind="stable")
    starts = np.flatnonzero(np.diff(-chooser[order], prepend=-math.inf))  # of each set of ties
    members = np.add.reduceat(weights[:, order], starts, axis=1)
    total = np.add.reduceat((weights * judge)[:, order], starts, axis=1)
    places = math.ceil(len(chooser) / 3)
    taken = np.clip(places - (np.cumsum(members, axis=1) - members), 0, members)
    return (total * taken / np.maximum(members, 1)).sum(1) / places
