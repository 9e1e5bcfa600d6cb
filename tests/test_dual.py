"""Water-filling and the offline optimum against scipy, the dual bound, and what shares must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import cero_jax
from cero_jax.allocator.dual import shares_at_budget, water_fill
from cero_jax.allocator.utility import EXPONENTIAL, RATIONAL, first_slope_and_scale, utility_family

pytestmark = pytest.mark.usefixtures("strict_dtypes")
U = {  # v, z = X / tau
    "exponential": lambda v, z: v * (1 - np.exp(-z)),
    "rational": lambda v, z: v * z / (1 + z),
    "capture": lambda v, z: 1 - np.exp(-4 * v * z),
}
kinds = pytest.mark.parametrize("kind", U)


def best_by_scipy(v, rollouts, budget, tau, cap, u, cost):
    """Shares by sequential quadratic programming in float64."""
    start = np.full(len(v), budget / cost.sum())
    return minimize(
        lambda n: -np.sum(u(v, (rollouts + n) / tau)),
        start,
        method="SLSQP",
        bounds=[(0, cap)] * len(v),
        constraints={"type": "eq", "fun": lambda n: np.sum(cost * n) - budget},
        options={"maxiter": 500, "ftol": 1e-12},
    )


@kinds
@pytest.mark.parametrize("in_tokens", [False, True])
def test_shares_are_the_convex_optimum(kind, in_tokens):
    rng = np.random.default_rng(3)
    for _ in range(4):
        v, rollouts = rng.uniform(0.001, 0.25, 12), rng.integers(0, 40, 12).astype(float)
        cost = rng.uniform(0.5, 2.0, 12) if in_tokens else np.ones(12)
        log_value, scale = first_slope_and_scale(kind, jnp.float32(v), jnp.float32(30.0))
        shares, _ = water_fill(
            log_value - jnp.log(jnp.float32(cost)),
            jnp.float32(rollouts),
            jnp.float32(96.0),
            tau=scale,
            cap=32,
            family=utility_family(kind),
            cost=jnp.float32(cost) if in_tokens else None,
        )
        shares = np.asarray(shares, float)
        found = best_by_scipy(v, rollouts, 96.0, 30.0, 32, U[kind], cost)
        assert np.sum(shares * cost) == pytest.approx(96, rel=1e-5)
        assert np.sum(U[kind](v, (rollouts + shares) / 30.0)) >= -found.fun - 2e-6


@kinds
def test_the_offline_optimum_meets_its_dual_bound(kind):
    v = np.random.default_rng(0).beta(0.5, 0.5, 300)
    v, tau, total = v * (1 - v), 64.0, 8 * 8 * 300
    rollouts, value = cero_jax.offline_optimum(v, total_budget=total, num_epochs=8, tau=tau, utility=kind)
    assert float(rollouts.sum()) == pytest.approx(total, rel=1e-5)
    inner = (np.asarray(rollouts) > 1) & (np.asarray(rollouts) < 8 * 32 - 1)
    spent = np.asarray(rollouts, float)[inner]
    price = np.median(U[kind](v[inner], (spent + 0.5) / tau) - U[kind](v[inner], (spent - 0.5) / tau))
    # lambda B + sum_i max over 0 <= X <= KM of U_i(X) - lambda X, the maximum on a fine grid
    grid = np.linspace(0, 8 * 32, 20001)
    bound = price * total + np.max(U[kind](v[:, None], grid / tau) - price * grid, axis=1).sum()
    assert bound * (1 - 1e-5) <= float(value) <= bound * (1 + 1e-5)


def fill(v, rollouts, budget=200.0, tau=50.0):
    v, rollouts = jnp.asarray(v, jnp.float32), jnp.asarray(rollouts, jnp.float32)
    sizes = {"tau": jnp.float32(tau), "cap": 32, "family": EXPONENTIAL}
    return np.asarray(water_fill(jnp.log(v), rollouts, jnp.float32(budget), **sizes)[0])


def test_shares_are_monotone_in_v_and_equivariant_under_permutation():
    rng = np.random.default_rng(1)
    v, rollouts = np.sort(rng.uniform(0, 0.25, 40)), np.full(40, 11.0)
    shares = fill(v, rollouts)
    assert np.all(np.diff(shares) >= 0)
    order = rng.permutation(40)
    rollouts = rng.integers(0, 90, 40)
    np.testing.assert_allclose(fill(v[order], rollouts[order]), fill(v, rollouts)[order], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tau", [1e-6, 1e-2, 1.0, 1e4, 1e9])
def test_ties_share_alike_at_any_tau(tau):
    np.testing.assert_allclose(fill(np.full(20, 0.1), np.zeros(20), 100.0, tau), np.full(20, 5.0), rtol=1e-5)


def test_a_budget_beyond_the_capacity_fills_every_prompt():
    np.testing.assert_allclose(fill(np.linspace(0.01, 0.2, 10), np.zeros(10), 1e4), 32.0, rtol=1e-5)
    np.testing.assert_allclose(fill(np.linspace(0.01, 0.2, 10), np.zeros(10), 0.0), 0.0)


def test_a_jump_across_the_budget_is_shared_by_those_who_jump():
    values = jnp.array([3.0, 2.0, 2.0, 1.0])
    shares, _ = shares_at_budget(
        lambda level: jnp.where(values > level, 8.0, 0.0), jnp.float32(0), jnp.float32(9), jnp.int32(16)
    )
    np.testing.assert_allclose(shares, [8, 4, 4, 0], rtol=1e-6)


def test_shares_solve_under_jit_and_vmap_over_tau():
    v = jnp.linspace(0.01, 0.25, 30)
    solve = jax.vmap(lambda tau: water_fill(jnp.log(v), v * 0, jnp.float32(90), tau=tau, cap=32, family=RATIONAL)[0])
    np.testing.assert_allclose(jax.jit(solve)(jnp.array([1.0, 10.0, 100.0])).sum(1), 90, rtol=1e-5)


def test_integer_shares_of_value_capture_are_those_of_brute_force_to_a_rollout():
    """Greedy by the gain of one more rollout is exact in integers; the real shares lie within one of it."""
    rng = np.random.default_rng(7)
    for _ in range(5):
        v, had, tau, cap, budget = rng.uniform(0.01, 0.25, 8), rng.integers(0, 20, 8), 25.0, 12, 40
        n = np.zeros(8, int)
        for _ in range(budget):
            gain = np.where(n < cap, U["capture"](v, (had + n + 1) / tau) - U["capture"](v, (had + n) / tau), -1)
            n[np.argmax(gain)] += 1
        log_value, scale = first_slope_and_scale("capture", jnp.float32(v), jnp.float32(tau))
        settings = {"tau": scale, "cap": cap, "family": utility_family("capture")}
        shares, _ = water_fill(log_value, jnp.float32(had), jnp.float32(budget), **settings)
        assert np.max(np.abs(np.asarray(shares) - n)) <= 1
