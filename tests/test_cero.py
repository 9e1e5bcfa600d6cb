"""`cero`: the bars that run in seconds, extreme states, tokens, devices, the ledger over whole runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cero_jax
from cero_jax import simulate
from cero_jax.allocator.cero import STALE_EVIDENCE
from cero_jax.allocator.dual import water_fill
from cero_jax.allocator.posterior import expected_variance
from cero_jax.allocator.utility import utility_family

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def fixed_run(num_epochs, utility, num_prompts=300):
    """(utility, optimum) of `cero`, v known and constant, tau = 8K, groups of 2 to 32, 8 rollouts a prompt an epoch."""
    p = np.clip(np.random.default_rng(0).beta(0.5, 0.5, num_prompts), 1e-6, 1 - 1e-6)
    alpha, beta = jnp.float32(1e6 * p), jnp.float32(1e6 * (1 - p))
    total, tau = 8 * num_prompts * num_epochs, 8.0 * num_epochs
    own = {"tau": tau, "utility": utility, "explore": 0.0, "discount": 1.0}
    allocator = cero_jax.cero(total_budget=total, num_epochs=num_epochs, min_group=2, **own)

    def one_epoch(state, _):
        n, state = allocator.allocate(state._replace(alpha=alpha, beta=beta))
        return allocator.update(state, n, n // 2), None

    state = jax.jit(lambda: jax.lax.scan(one_epoch, allocator.init(num_prompts), length=num_epochs)[0])()
    v = p * (1 - p)
    best, _ = cero_jax.offline_optimum(v, total_budget=total, num_epochs=num_epochs, tau=tau, utility=utility)
    rate, height = (4 * v / tau, 1) if utility == "capture" else (1 / tau, v)
    ours, optimum = (
        np.sum(height * -np.expm1(-rate * np.asarray(x, float))) for x in (state.cumulative_rollouts, best)
    )
    return ours, optimum


@pytest.mark.parametrize("utility", ["exponential", "capture"])
@pytest.mark.parametrize("num_epochs", [4, 16, 64])
def test_known_utilities_reach_the_offline_optimum(num_epochs, utility):
    ours, optimum = fixed_run(num_epochs, utility)
    assert ours >= 0.999 * optimum


def test_more_rollouts_go_where_the_variance_is_and_fewer_where_they_went_already():
    allocator = cero_jax.cero(total_budget=4000, num_epochs=10, explore=0.0)
    state = allocator.init(100)
    p = jnp.concatenate([jnp.full(50, 0.02), jnp.full(50, 0.5)])
    state = state._replace(alpha=40 * p + 0.5, beta=40 * (1 - p) + 0.5)
    n, _ = jax.jit(allocator.allocate)(state)
    assert int(n[50:].sum()) > 10 * max(int(n[:50].sum()), 1)
    state = state._replace(cumulative_rollouts=jnp.arange(100, dtype=jnp.int32) % 2 * 40, alpha=state.beta)
    n, _ = jax.jit(allocator.allocate)(state._replace(beta=state.alpha))
    assert int(n[0::2].sum()) > int(n[1::2].sum())


def test_explore_visits_the_stalest_and_costs_nothing_where_none_is_stale():
    def hopeless_share(explore, evidence):
        allocator = cero_jax.cero(total_budget=64_000, num_epochs=100, explore=explore, tau=10.0)
        state = allocator.init(200)
        failed = jnp.where(jnp.arange(200) < 100, evidence, 0.0)  # so the first hundred look hopeless
        state = state._replace(alpha=state.alpha + 20 - jnp.minimum(failed * 1e6, 20.0), beta=state.beta + failed + 20)
        state = state._replace(beta=jnp.where(jnp.arange(200) < 100, 0.5 + evidence, state.beta))
        n, _ = jax.jit(allocator.allocate)(state)
        return int(n[:100].sum()) / int(n.sum())

    stale, fresh = STALE_EVIDENCE - 1, STALE_EVIDENCE + 30
    assert hopeless_share(0.25, stale) == pytest.approx(0.25, abs=0.02)
    assert hopeless_share(0.25, fresh) == hopeless_share(0.0, fresh) < 0.02


@functools.cache
def extreme_allocate(num_prompts):
    def run(state, tau, total, discount):
        allocator = cero_jax.cero(total_budget=total, num_epochs=3, tau=tau, discount=discount)
        n, after = allocator.allocate(state)
        return n, allocator.update(after, n, n // 3)

    return jax.jit(run), cero_jax.cero(total_budget=1, num_epochs=3).init(num_prompts)


@pytest.mark.parametrize("tau", [1e-6, 50.0, 1e12])
@pytest.mark.parametrize(
    ("alpha", "beta"), [(1e-6, 1e-6), (1e6, 1e6), (1e-6, 1e6), (1e6, 1e-6), (0.0, 0.0), (0.5, 0.5)]
)
def test_extreme_states_keep_bounds_and_sums(alpha, beta, tau):
    for num_prompts, total in ((1, 0), (1, 3), (1, 10), (1, 500), (9, 0), (9, 500), (9, 2**31 - 1)):
        allocate, state = extreme_allocate(num_prompts)
        state = state._replace(alpha=jnp.full(num_prompts, alpha), beta=jnp.full(num_prompts, beta))
        state = state._replace(ledger=state.ledger._replace(total=jnp.int32(total)))
        n, after = allocate(state, tau, total, 0.9)
        n = np.asarray(n)
        assert np.all((n == 0) | ((n >= 4) & (n <= 32)))
        share = max(-(-total // 3), 4) if total >= 4 else 0
        assert n.sum() == min(share, 32 * num_prompts)
        assert np.all(np.isfinite(after.alpha) & np.isfinite(after.beta))


@functools.cache
def ledger_run(num_prompts):
    """One call each of allocate and update, compiled once: settings that may be traced are."""

    def allocate(state, ids, budget, tau, explore):
        return cero_jax.cero(total_budget=0, num_epochs=7, tau=tau, explore=explore).allocate(state, ids, budget)

    def update(state, ids, n, correct, release):
        return cero_jax.cero(total_budget=0, num_epochs=7).update(state, n, correct, prompt_ids=ids, release=release)

    start = cero_jax.cero(total_budget=0, num_epochs=7).init(num_prompts)
    return jax.jit(allocate), jax.jit(update), start


@settings(max_examples=90, deadline=None, derandomize=True)
@given(st.sampled_from([1, 6, 30]), st.integers(0, 2**31 - 1))
def test_the_ledger_balances_over_whole_runs_with_batches_in_flight(num_prompts, seed):
    rng = np.random.default_rng(seed)
    allocate, update, state = ledger_run(num_prompts)
    total = int(rng.integers(0, 60 * num_prompts))
    state = state._replace(ledger=state.ledger._replace(total=jnp.int32(total)), key=jax.random.key(seed))
    tau, explore, in_flight = np.float32(10.0 ** rng.uniform(-2, 5)), np.float32(rng.uniform(0, 1)), []
    for _ in range(10):
        ids = rng.permutation(num_prompts).astype(np.int32)
        ids[rng.random(num_prompts) < 0.3] = rng.choice([-1, num_prompts, num_prompts + 9])
        budget = int(rng.integers(0, 20 * num_prompts))
        left = int(state.ledger.left)
        n, state = allocate(state, ids, np.int32(budget), tau, explore)
        n = np.asarray(n)
        assert np.all((n == 0) | ((n >= 4) & (n <= 32)))
        assert n.sum() <= min(budget, left)
        in_flight.append((ids, n))
        if rng.random() < 0.6:  # settle an older batch: all of it, a part, or nothing of it was drawn
            ids, n = in_flight.pop(int(rng.integers(len(in_flight))))
            drawn = (n * rng.choice([0.0, 0.5, 1.0])).astype(np.int32)
            elsewhere = np.isin(ids, [i for held, m in in_flight for i in held[m > 0]]).any()
            release = not elsewhere and bool(rng.random() < 0.5)
            state = update(state, ids, drawn, rng.binomial(drawn, 0.4).astype(np.int32), release)
        spent, reserved, left = (int(x) for x in (state.ledger.spent, state.ledger.reserved, state.ledger.left))
        assert spent + reserved + left == total
        assert spent == int(state.cumulative_rollouts.sum())
        assert reserved == int(state.reserved.sum())
        assert left >= 0


@pytest.mark.parametrize("make", [cero_jax.cero, cero_jax.uniform], ids=["cero", "uniform"])
def test_a_token_budget_is_spent_past_32_bits_with_an_overshoot_of_at_most_an_epoch(make):
    total, num_prompts, epochs = 9_000_000_000, 64, 40
    allocator = make(total_budget=total, num_epochs=epochs, max_group=4096, expected_tokens=100_000)
    allocate, update = jax.jit(allocator.allocate), jax.jit(allocator.update)
    rng, state, spent = np.random.default_rng(0), allocator.init(num_prompts), 0
    tokens = np.where(np.arange(num_prompts) % 2, 40_000, 320_000)  # every other prompt answers at length
    calls = 0
    while calls < 3 * epochs:
        n, state = allocate(state)
        n = np.asarray(n)
        if not n.any():
            break
        calls += 1
        for part in np.array_split(np.flatnonzero(n), 16):  # a call's tokens stay below 2^31
            ids = np.pad(part, (0, 4 - len(part)), constant_values=-1).astype(np.int32)
            drawn = np.where(ids >= 0, n[ids], 0).astype(np.int32)
            paid = drawn * (tokens[ids] + rng.integers(-9, 9, 4))
            spent += int(paid[ids >= 0].sum())
            state = update(state, drawn, drawn // 2, prompt_ids=ids, num_tokens=paid.astype(np.int32))
        words = np.asarray(state.tokens.spent).astype(np.uint64)
        assert (int(words[0]) << 32) + int(words[1]) == spent
    logged = cero_jax.diagnostics(state)
    assert abs(spent - total) <= 1.1 * total / epochs
    assert float(logged["tokens_overshoot"]) == pytest.approx(max(spent - total, 0), rel=0.01, abs=1e6)
    np.testing.assert_allclose(state.tokens.mean_tokens, tokens, rtol=0.2)
    if make is cero_jax.cero:  # the same utility costs less where answers are short
        short, long = (np.asarray(state.cumulative_rollouts)[i::2].mean() for i in (1, 0))
        assert short > 1.2 * long


def test_replicated_integers_are_those_of_one_device():
    allocator = cero_jax.cero(total_budget=8000, num_epochs=10)
    allocate, state = jax.jit(allocator.allocate), allocator.init(500, seed=4)
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P())
    for _ in range(2):
        n, after = allocate(state)
        replicated, _ = allocate(jax.device_put(state, everywhere))
        np.testing.assert_array_equal(n, replicated)
        state = allocator.update(after, n, n // 3)


def test_ten_million_prompts_sharded_keep_sum_and_bounds_and_the_shares_agree():
    num_prompts = 10_000_000
    allocator = cero_jax.cero(total_budget=8 * num_prompts, num_epochs=4)
    p = jnp.float32(np.random.default_rng(0).beta(0.5, 0.5, num_prompts))
    state = allocator.init(num_prompts)._replace(alpha=0.5 + 24 * p, beta=0.5 + 24 * (1 - p))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    by_prompt = jax.tree.map(lambda x: P("data") if x.shape[:1] == (num_prompts,) else P(), state)
    sharded = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), state, by_prompt)

    def shares_of(state):
        log_value = jnp.log(expected_variance(state.alpha, state.beta))
        rollouts, budget = jnp.zeros(num_prompts), jnp.int32(2 * num_prompts)
        return water_fill(
            log_value, rollouts, budget, tau=jnp.float32(8), cap=32, family=utility_family("exponential")
        )[0]

    np.testing.assert_allclose(jax.jit(shares_of)(sharded), jax.jit(shares_of)(state), rtol=1e-5, atol=1e-5)
    spread, after = allocator.allocate(sharded)
    assert int(spread.sum()) == 2 * num_prompts == int(after.ledger.reserved)
    spread = np.asarray(spread)
    assert np.all((spread == 0) | ((spread >= 4) & (spread <= 32)))


def test_cero_beats_uniform_on_a_drifting_policy():
    setup = {"num_prompts": 300, "num_epochs": 16, "total_budget": 8 * 300 * 16, "min_group": 2, "tau": 128.0}
    with jax.numpy_dtype_promotion("standard"):
        world = simulate.drifting(300)
        uniform = simulate.run_seeds(cero_jax.uniform, world, seeds=2, settings=setup)
        cero = simulate.run_seeds(cero_jax.cero, world, seeds=2, settings=setup)
    assert np.all(np.asarray(cero.value) > 1.05 * np.asarray(uniform.value))
    np.testing.assert_array_equal(cero.spent_share, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tau": 0.0}, "tau=0.0"),
        ({"explore": 1.5}, "explore=1.5"),
        ({"utility": "log"}, "utility='log'"),
        ({"expected_tokens": -1.0}, "expected_tokens=-1.0"),
        ({"expected_tokens": 10.0, "total_budget": 1.5}, "total_budget=1.5 tokens"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        cero_jax.cero(**{"total_budget": 100, "num_epochs": 1, **wrong})
