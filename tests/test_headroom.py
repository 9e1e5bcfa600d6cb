"""The headroom of a log: against known probabilities, an enumeration of all cuts, and pools where it must be 1."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from cero_jax.headroom import Headroom, explain, headroom


def all_cuts(visits):
    """(chance, successes of one half, its size) at each visit, over every way to cut a prompt's rollouts in two."""
    per_visit = []
    for correct, drawn in visits:
        size = drawn // 2
        ways = {
            hit: Fraction(math.comb(correct, hit) * math.comb(drawn - correct, size - hit), math.comb(drawn, size))
            for hit in range(max(0, size - drawn + correct), min(size, correct) + 1)
        }
        per_visit.append([(chance, hit, size) for hit, chance in ways.items()])
    return itertools.product(*per_visit)


def variance(half):
    """The mean of S (n - S) / (n (n - 1)) over visits (S, n), weighed by n."""
    return sum(Fraction(n * s * (n - s), n * (n - 1)) for s, n in half) / sum(n for _, n in half)


def by_hand(log):
    """(mean variance of the top third, of all) in exact fractions: every cut, every way to break ties."""
    best, everything = Fraction(0), Fraction(0)
    places = math.ceil(len(log) / 3)
    for cut in itertools.product(*(list(all_cuts(visits)) for visits in log)):
        chance, halves = Fraction(1), ([], [])
        for visits, choice in zip(log, cut, strict=True):
            chance *= math.prod(c for c, _, _ in choice)
            halves[0].append(variance([(hit, size) for _, hit, size in choice]))
            rest = [(s - hit, n - size) for (s, n), (_, hit, size) in zip(visits, choice, strict=True)]
            halves[1].append(variance(rest))
        for chooser, judge in (halves, halves[::-1]):
            orders = [
                order
                for order in itertools.permutations(range(len(log)))
                if all(chooser[a] >= chooser[b] for a, b in itertools.pairwise(order))
            ]
            top = sum(judge[i] for order in orders for i in order[:places])
            best += chance * Fraction(top, places * len(orders))
            everything += chance * sum(judge) / len(log)
    return best / everything


@pytest.mark.parametrize(
    "log",
    [
        [[(2, 5)], [(0, 5)], [(4, 5)], [(0, 5)]],
        [[(1, 4), (3, 5)], [(0, 4), (4, 4)], [(2, 4), (2, 4)]],  # the second varies between its visits only
    ],
)
def test_it_is_the_mean_over_all_cuts_and_ties(log):
    correct, drawn = np.array(log).transpose(2, 0, 1)
    found = headroom(correct, drawn, splits=10_000, resamples=1)
    assert found.ratio == pytest.approx(float(by_hand(log)), abs=0.02)


def test_known_probabilities_have_the_known_ratio():
    p = np.repeat([0.0, 0.05, 0.5, 1.0, 0.9], 60)
    correct = np.random.default_rng(0).binomial(64, np.repeat(p[:, None], 4, 1))
    v = p * (1 - p)
    known = np.sort(v)[-100:].mean() / v.mean()  # 60 of 0.25, 40 of 0.09
    found = headroom(correct, np.full((300, 4), 64))
    assert found.ratio == pytest.approx(known, abs=0.03)
    assert found.low < known < found.high
    assert (found.num_prompts, found.left_out) == (300, 0)


@pytest.mark.parametrize("group", [4, 8])
def test_a_pool_of_equals_has_none(group):
    """Chance makes some prompts look better in one half, and the other half does not believe it."""
    correct = np.random.default_rng(1).binomial(group, 0.3, (3000, 1))
    found = headroom(correct, np.full((3000, 1), group), splits=5, resamples=100)
    assert found.ratio == pytest.approx(1, abs=0.03)
    assert found.low < 1 < found.high
    assert "no allocation can help" in explain(found)


def test_a_policy_that_moves_is_no_variance():
    """Prompts that went from never to always solved vary at no visit; pooled, they would look best of all."""
    moved = [[0] * 5 + [8] * 5] * 10
    live = np.random.default_rng(2).binomial(8, 0.3, (10, 10))
    log = np.concatenate([moved, live, [[0] * 10] * 10])
    assert headroom(log, np.full((30, 10), 8)).ratio == pytest.approx(3)


def test_small_visits_count_with_their_neighbours():
    """A rollout a visit, three visits of four and a rest: as many successes and rollouts as in two whole visits."""
    rng = np.random.default_rng(3)
    p = rng.beta(0.5, 0.5, (500, 1))
    single = rng.binomial(1, np.repeat(p, 8, 1))
    blocks = np.stack([single[:, :4].sum(1), single[:, 4:].sum(1)], 1)
    assert headroom(single, np.ones((500, 8), int)) == headroom(blocks, np.full((500, 2), 4))
    drawn = np.array([[3, 1, 4, 3]] * 2 + [[3, 0, 0, 0]])  # 4, then 4 and the 3 that are left; and one with too few
    correct = np.array([[3, 1, 4, 3], [1, 0, 2, 1], [1, 0, 0, 0]])
    found = headroom(correct, drawn)
    assert found == headroom(np.array([[4, 7], [1, 3]]), np.array([[4, 7]] * 2))._replace(left_out=1)
    assert "Left out: prompts with fewer than 4 rollouts, 1" in explain(found)


def test_where_nothing_varies_there_is_none_to_be_had():
    found = headroom(np.array([[0, 0], [0, 8]]), np.full((2, 2), 8))
    assert math.isnan(found.ratio)
    assert "no two rewards of one visit differ" in explain(found)
    found = headroom(np.array([[1], [2]]), np.full((2, 1), 3))
    assert (found.num_prompts, found.left_out) == (0, 2)
    assert "no prompt has 4 rollouts" in explain(found)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """95 of 100 populations drawn from one; the truth is the mean ratio of a large one with the same rollouts."""
    rng = np.random.default_rng(4)

    def drawn(n):
        return rng.binomial(8, rng.beta(0.4, 0.6, (n, 1)).repeat(2, 1))

    truth = headroom(drawn(40_000), np.full((40_000, 2), 8), splits=2, resamples=2).ratio
    found = [headroom(drawn(150), np.full((150, 2), 8), splits=10, resamples=200) for _ in range(100)]
    assert 88 <= sum(x.low <= truth <= x.high for x in found) <= 100


def test_what_it_says_of_a_log_worth_the_trouble():
    said = explain(Headroom(1.62, 1.5, 1.71, 240, 0))
    assert "Headroom: 1.62 (95 % interval 1.50 to 1.71 over 240 prompts)" in said
    assert "would meet 1.6 times the" in said
    assert "Left out" not in said
