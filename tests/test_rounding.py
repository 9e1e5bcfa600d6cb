"""Whole groups from real shares: exact sums within bounds whatever comes in, and the share in expectation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cero_jax.allocator.rounding import feasible_budget, whole_groups

pytestmark = pytest.mark.usefixtures("strict_dtypes")
BOUNDS = [(2, 32, 1), (4, 9, 1), (4, 4, 1), (1, 8, 1), (1, 1, 1), (4, 32, 4), (8, 8, 8), (4, 10, 2)]


def reachable(num_prompts: int, low: int, high: int, step: int) -> set[int]:
    """Every sum of num_prompts sizes that are 0 or multiples of step in [low, high], by brute force."""
    sums = {0}
    for _ in range(num_prompts):
        sums |= {s + n for s in sums for n in range(low, high + 1, step)}
    return sums


@pytest.mark.parametrize(("low", "high", "step"), [*BOUNDS, (5, 7, 1), (20, 32, 1), (20, 32, 4), (9, 15, 3)])
def test_the_feasible_budget_is_the_largest_reachable_sum(low, high, step):
    sizes = {"min_group": low, "max_group": high, "multiple_of": step}
    budgets = np.arange(3 * high + 5)
    for num_prompts in (0, 1, 2, 3):
        sums = reachable(num_prompts, low, high, step)
        found = feasible_budget(jnp.asarray(budgets), jnp.int32(num_prompts), **sizes)
        np.testing.assert_array_equal(found, [max(s for s in sums if s <= budget) for budget in budgets])


def test_the_feasible_budget_does_not_overflow():
    assert int(feasible_budget(jnp.int32(2**31 - 1), jnp.int32(10**8), min_group=2, max_group=32)) == 2**31 - 1


@functools.cache
def draw(low, high, step):
    """The feasible budget and the groups, compiled once for each length."""
    sizes = {"min_group": low, "max_group": high, "multiple_of": step}

    def both(seed, shares, valid, budget):
        budget = feasible_budget(budget, jnp.sum(valid, dtype=jnp.int32), **sizes)
        return budget, whole_groups(jax.random.key(seed), shares, valid, budget, **sizes)

    return jax.jit(both)


@pytest.mark.parametrize(("low", "high", "step"), BOUNDS)
@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from([1, 7, 40]), st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.3, 1.0, 3.0]), st.booleans())
def test_groups_are_within_bounds_and_sum_to_the_closest_feasible_budget(
    low, high, step, num_prompts, seed, spread, fitting
):
    rng = np.random.default_rng(seed)
    shares = np.clip(rng.exponential(1.0, num_prompts) ** spread * rng.choice([0.5, 4, 20]), 0, high)
    shares[rng.random(num_prompts) < rng.choice([0, 0.5, 1])] = 0
    valid = rng.random(num_prompts) < rng.choice([0.5, 1])
    shares = np.where(valid, shares, 0)
    # mostly the budget that the shares sum to, as in use; else anything, however far off
    budget = int(shares.sum()) if fitting else int(rng.integers(0, 2 * high * num_prompts))
    wanted, n = draw(low, high, step)(np.uint32(seed), np.float32(shares), valid, np.int32(budget))
    n = np.asarray(n)
    assert n.sum() == wanted <= budget
    assert np.all((n == 0) | ((n >= low) & (n <= high) & (n % step == 0)))
    assert not n[~valid].any()


def test_the_expected_size_is_the_share():
    rng = np.random.default_rng(0)
    shares = np.concatenate([rng.uniform(0, 4, 30), rng.uniform(4, 32, 10), [0.0, 4.0, 32.0]])
    shares *= round(shares.sum()) / shares.sum()
    shares = np.minimum(shares, 32)
    budget, valid = jnp.int32(round(shares.sum())), jnp.ones(len(shares), bool)
    keys = jax.random.split(jax.random.key(0), 20_000)
    many = jax.jit(jax.vmap(lambda k: whole_groups(k, jnp.float32(shares), valid, budget, min_group=4, max_group=32)))
    n = np.asarray(many(keys), float)
    error = n.std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(n.mean(0) - shares) <= 5 * error + 0.02)  # 0.02: what balancing the sum may move


def test_place_in_the_file_does_not_matter():
    shares, valid = jnp.full(64, 1.0), jnp.ones(64, bool)
    keys = jax.random.split(jax.random.key(1), 20_000)
    n = jax.jit(jax.vmap(lambda k: whole_groups(k, shares, valid, jnp.int32(64), min_group=4, max_group=32)))(keys)
    visits = np.asarray(n > 0).mean(0)
    assert np.all(np.abs(visits - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 20_000))


def test_the_sum_is_exact_at_a_million_prompts():
    shares = jax.random.exponential(jax.random.key(0), (10**6,))
    shares = jnp.minimum(shares * 8, 32)
    budget = jnp.int32(8 * 10**6 - 12345)
    n = whole_groups(jax.random.key(1), shares, jnp.ones(10**6, bool), budget, min_group=4, max_group=32)
    assert int(n.sum()) == int(budget)
    assert int(n.max()) <= 32


def test_a_sum_far_off_the_shares_is_met_at_once_and_alike():
    budget, valid = jnp.int32(2**31 - 5), jnp.ones(1000, bool)  # rollout by rollout it would take two million rounds
    n = whole_groups(jax.random.key(0), jnp.full(1000, 4.0), valid, budget, min_group=4, max_group=2**22)
    assert int(n.sum()) == int(budget)
    assert int(n.max() - n.min()) <= 1


@pytest.mark.parametrize("num_prompts", [512, 20_480, 1_000])
def test_each_part_of_the_file_gets_its_share(num_prompts):
    """Equal shares of a file sorted by difficulty: no epoch takes its groups from one kind, however rare."""
    shares, valid, budget = jnp.ones(num_prompts), jnp.ones(num_prompts, bool), jnp.int32(num_prompts)
    for seed in range(3):
        got = whole_groups(jax.random.key(seed), shares, valid, budget, min_group=4, max_group=8)
        parts = np.asarray(got).reshape(-1, 8).sum(1)  # of eight neighbours, which share two groups
        assert set(parts) <= {4, 8, 12}
