"""Accounts of budgets up to 2^31 - 1 and of a million prompts, against Python's unbounded integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cero_jax
from cero_jax.allocator.build import _within
from cero_jax.allocator.checks import checked_budget
from cero_jax.allocator.ledger import (
    MOST,
    Ledger,
    add_counts,
    batch_budget,
    charge_tokens,
    epoch_budget,
    open_token_ledger,
)

BUDGETS = [0, 1, 7, 99, 2**24 + 1, 2**25 + 9, 2**30 + 7, MOST - 7, MOST]


def ledger(total, spent=0, reserved=0, offered=0):
    return Ledger(*(jnp.asarray(x, jnp.int32) for x in (total, spent, reserved, offered)))


@pytest.mark.parametrize(("num_epochs", "unit"), [(1, 1), (7, 1), (1000, 8), (2**31 - 1, 1)])
def test_epochs_sum_to_the_budget_and_the_first_are_one_larger(num_epochs, unit):
    def share(total, committed):
        return epoch_budget(ledger(total, committed), num_epochs=num_epochs, min_group=unit, unit=unit)

    share, rng = jax.jit(jax.vmap(share)), np.random.default_rng(0)
    totals = np.array(BUDGETS + rng.integers(0, MOST, 20).tolist())
    small, larger = totals // unit // num_epochs, totals // unit % num_epochs
    last = num_epochs - 1
    for epoch in {0, min(1, last), num_epochs // 2, last}:  # where so many epochs have spent their share
        committed = unit * np.array(
            [int(s) * epoch + min(int(more), epoch) for s, more in zip(small, larger, strict=True)]
        )
        wanted = np.where(small == 0, committed < totals - totals % unit, small + (epoch < larger)) * unit
        known = (small > 0) | (epoch == 0)  # epochs of no rollout: the first ones get one each
        np.testing.assert_array_equal(share(totals.astype(np.int32), committed.astype(np.int32))[known], wanted[known])


@pytest.mark.parametrize(("num_prompts", "unit"), [(1, 1), (1000, 8), (10**6, 1), (10**6, 1024)])
def test_the_shares_of_a_stream_of_batches_are_exact(num_prompts, unit):
    def step(state, num_offered):
        share, after = batch_budget(state, num_offered, num_epochs=3, num_prompts=num_prompts, unit=unit)
        return after, share

    parts = np.diff(np.linspace(0, num_prompts, min(num_prompts, 13) + 1).astype(int)).tolist() * unit
    run = jax.jit(jax.vmap(lambda total: jax.lax.scan(step, ledger(total), jnp.array(parts, jnp.int32))[1]))
    offered = np.cumsum(parts, dtype=object)
    for total, shares in zip(BUDGETS, np.asarray(run(np.array(BUDGETS, np.int32))), strict=True):
        by_hand = np.diff([0, *(total // 3 * offered // (unit * num_prompts))]) * unit
        np.testing.assert_array_equal(shares, np.minimum(by_hand.astype(int), total))  # nothing is spent in between


def test_a_batch_of_all_prompts_can_have_the_whole_of_the_largest_budget():
    share = jax.jit(lambda n: batch_budget(ledger(MOST), n, num_epochs=1, num_prompts=3, unit=8)[0])(np.int32(3))
    assert MOST - 8 < int(share) <= MOST
    with pytest.raises(ValueError, match="batches of 1,000,000 prompts whose groups are multiples of 4096"):
        batch_budget(ledger(MOST), jnp.int32(3), num_epochs=1, num_prompts=10**6, unit=4096)


def test_counts_stop_at_the_most():
    pairs = [(0, 0), (5, 7), (MOST, 0), (MOST, 1), (2**30, 2**30), (MOST, MOST), (MOST - 3, 3)]
    found = add_counts(*jnp.array(pairs, jnp.int32).T)
    np.testing.assert_array_equal(found, [min(a + b, MOST) for a, b in pairs])
    tokens = open_token_ledger(2**40, 1, 4.0)  # a running mean over nearly 2^31 rollouts
    tokens = jax.jit(charge_tokens)(tokens, *(np.array([x], np.int32) for x in (8, MOST - 8, 64)))
    assert float(tokens.mean_tokens[0]) == pytest.approx(4.0 + 32 / MOST)


@pytest.mark.parametrize("num_prompts", [1000, 10**6])
def test_shares_never_come_to_more_than_the_ceiling_and_to_no_rollout_less(num_prompts):
    within, rng = jax.jit(lambda shares, most: _within(shares, None, most, most)), np.random.default_rng(0)
    for size in (7, 12, 333, 1000, 2001, 4096):
        drawn = rng.random(num_prompts) < rng.random()
        wanted = size * int(drawn.sum())  # beyond 2^31 for the largest
        for ceiling in (wanted + 5 * size, wanted + 1, wanted, wanted - 1, wanted - 5 * size):
            ceiling = min(ceiling, MOST)
            shares, total = within(np.where(drawn, size, 0).astype(np.float32), np.int32(ceiling))
            assert int(total) == min(wanted, ceiling)
            assert np.asarray(shares, float).sum() == pytest.approx(min(wanted, ceiling), rel=1e-5)


def test_what_a_caller_names_is_clipped_or_refused_and_never_wrapped():
    rollouts = ((np.int64(2**32 + 5), MOST), (2**31, MOST), (np.array(2**40), MOST), (-(2**40), 0), (40, 40))
    for budget, held in rollouts:
        found = checked_budget(budget, in_tokens=False)
        assert (int(found), found.dtype) == (held, np.int32)
    assert checked_budget(2**40, in_tokens=True) == np.float32(2**40)
    allocator = cero_jax.uniform(total_budget=1000, num_epochs=5)
    state = allocator.init(10)
    for wrong in (float("nan"), np.array([4, 4])):
        with pytest.raises(ValueError, match="of a call must be one finite number"):
            allocator.allocate(state, budget=wrong)
    with pytest.raises(ValueError, match="num_rollouts sums to 21474836470: a call takes in less than 2"):
        allocator.update(state, np.full(10, MOST, np.int64), np.zeros(10, int))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"num_epochs": 2**31}, "num_epochs=2147483648"), ({"max_group": 2**25}, "max_group=33554432")],
)
def test_settings_beyond_the_numbers_that_hold_them_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        cero_jax.cero(**{"total_budget": 10, "num_epochs": 2} | wrong)
