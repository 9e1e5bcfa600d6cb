"""Advantages over what a posterior expected: against float64 loops, by hand, and unbiased by enumeration."""

import itertools

import numpy as np
import pytest

from cero_jax import grpo

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def loop_posterior(reward, alpha, beta, group_ids, row_mask, normalised):
    """In float64, a row at a time: the posterior's mean that has seen the other rows of the group."""
    out = np.zeros(len(reward))
    for j in np.flatnonzero(row_mask):
        others = [i for i in np.flatnonzero(row_mask) if group_ids[i] == group_ids[j] and i != j]
        successes = sum(float(reward[i]) for i in others)
        baseline = (alpha[j] + successes) / (alpha[j] + beta[j] + len(others))
        out[j] = reward[j] - baseline
        if normalised:
            out[j] /= max(np.sqrt(baseline * (1 - baseline)), 0.1)
    return out


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_posterior_advantages_equal_float64_loops(seed, normalised):
    rng = np.random.default_rng(seed)
    num_rows, num_groups = 24, 9  # some groups of one, some empty
    group_ids = rng.integers(0, num_groups, num_rows).astype(np.int32)
    row_mask = rng.random(num_rows) < 0.85
    reward = rng.choice([0.0, 1.0, 0.25], num_rows).astype(np.float32)
    alpha, beta = (rng.gamma(0.7, 2.0, num_groups).astype(np.float32)[group_ids] + 1e-3 for _ in range(2))
    got = grpo.posterior_advantages(
        reward, alpha, beta, group_ids, row_mask, num_groups=num_groups, normalised=normalised
    )
    np.testing.assert_allclose(got, loop_posterior(reward, alpha, beta, group_ids, row_mask, normalised), atol=2e-5)
    assert np.all(np.asarray(got)[~row_mask] == 0)


def test_a_group_without_variance_teaches_where_it_was_not_expected():
    """Four failures where nine of ten successes were expected, and where nothing was; a group of one."""
    reward, ids = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1], np.float32), np.array([0] * 4 + [1] * 4 + [2], np.int32)
    alpha = np.array([9.0] * 4 + [0.01] * 4 + [1.0], np.float32)
    beta = np.array([1.0] * 4 + [9.0] * 4 + [1.0], np.float32)
    got = grpo.posterior_advantages(reward, alpha, beta, ids, np.ones(9, bool), num_groups=3)
    np.testing.assert_allclose(got[:4], -9 / 13, rtol=1e-6)
    assert np.all(np.abs(got[4:8]) < 1e-3)
    np.testing.assert_allclose(got[8], 0.5)
    assert np.all(np.asarray(grpo.advantages(reward, ids, np.ones(9, bool), num_groups=3)) == 0)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("size", "belief"), [(1, (0.5, 0.5)), (2, (9.0, 1.0)), (4, (0.3, 6.0))])
def test_the_posterior_s_gradient_is_unbiased_by_enumeration(size, belief, normalised):
    """A softmax of two arms, of which the first is right with 1, the second with 0: all 2^n groups, weighed.

    E[A grad log pi] is the exact gradient of the success rate, p(1 - p), whatever was believed; normalised, it is that
    times the expected 1 / deviation. A baseline that sees the row itself would shrink it by (n - 1) / n and more.
    """
    p = 0.3
    expected, scale, biased = 0.0, 0.0, 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=size):
        reward = np.array(outcome, np.float32)
        chance = np.prod(np.where(reward == 1, p, 1 - p))
        score = reward - p  # d log pi / d logit of the first arm
        a, b = (np.full(size, x, np.float32) for x in belief)
        group = {"group_ids": np.zeros(size, np.int32), "row_mask": np.ones(size, bool), "num_groups": 1}
        advantage = np.asarray(grpo.posterior_advantages(reward, a, b, normalised=normalised, **group), np.float64)
        expected += chance * np.mean(advantage * score)
        baseline = (belief[0] + reward.sum() - reward) / (sum(belief) + size - 1)
        scale += chance * np.mean(1 / np.maximum(np.sqrt(baseline * (1 - baseline)), 0.1) if normalised else 1.0)
        with_itself = (belief[0] + reward.sum()) / (sum(belief) + size)
        biased += chance * np.mean((reward - with_itself) * score)
    np.testing.assert_allclose(expected, p * (1 - p) * scale, rtol=1e-5)
    assert abs(biased - p * (1 - p)) > 0.05 * p * (1 - p)
