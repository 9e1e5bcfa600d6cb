"""The rivals against exact solutions of what they say they optimise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cero_jax

MAX_GROUP = 12


def best_by_dynamic_program(gain, budget, low):
    """The largest sum_i gain[i, n_i] with low <= n_i <= MAX_GROUP and sum n_i = budget, in float64. gain: [P, n]."""
    best = np.full(budget + 1, -np.inf)
    best[0] = 0
    for row in gain:
        new = np.full(budget + 1, -np.inf)
        for n in range(low, MAX_GROUP + 1):
            new[n:] = np.maximum(new[n:], best[: budget + 1 - n] + row[n])
        best = new
    return best[budget]


def objective(name, alpha, beta):
    """[P, MAX_GROUP + 1] float64, what a prompt adds at each size; sizes 0 and 1 are not used."""
    n = np.arange(MAX_GROUP + 1, dtype=float)
    p = (alpha / (alpha + beta))[:, None]
    a = (alpha * beta / ((alpha + beta) * (alpha + beta + 1)))[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "rloo": -a / (n - 1),
            "dr_grpo": -a * (n - 1) / n**2,
            "knapsack": (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2,
        }[name]


@pytest.mark.parametrize("name", ["rloo", "dr_grpo", "knapsack"])
def test_the_integers_reach_the_exact_optimum(name):
    low, prompts = 3, 14
    own = {} if name == "knapsack" else {"advantage": name}
    make = cero_jax.knapsack if name == "knapsack" else cero_jax.variance
    allocator = make(total_budget=10**6, num_epochs=1, min_group=low, max_group=MAX_GROUP, group_size=4, **own)
    allocate, start = jax.jit(allocator.allocate), allocator.init(prompts)
    rng = np.random.default_rng(5)
    for _ in range(30):
        alpha = np.float32(rng.uniform(0.3, 9, prompts))
        beta = np.float32(rng.uniform(0.3, 9, prompts))
        budget = int(rng.integers(4 * prompts, MAX_GROUP * prompts + 1))
        n, _ = allocate(start._replace(alpha=jnp.asarray(alpha), beta=jnp.asarray(beta)), budget=budget)
        table = objective(name, alpha.astype(float), beta.astype(float))
        ours = table[np.arange(prompts), np.asarray(n)].sum()
        best = best_by_dynamic_program(table, budget, low)
        assert int(n.sum()) == budget
        assert ours >= best - 1e-6 * abs(best)


@pytest.mark.parametrize("make", [cero_jax.uniform, cero_jax.variance, cero_jax.knapsack])
def test_a_short_epoch_goes_to_those_with_the_fewest_rollouts(make):
    allocator = make(total_budget=10_000, num_epochs=10)
    allocate = jax.jit(allocator.allocate)
    state = allocator.init(20)._replace(cumulative_rollouts=jnp.arange(20, dtype=jnp.int32) % 5 * 8)
    n, _ = allocate(state, budget=3 * 8 + 5)  # three groups of 8, and a rest that makes them larger
    assert int(n.sum()) == 29
    assert np.all(np.flatnonzero(n) % 5 == 0)
    assert np.count_nonzero(n) == 3
    drawn = [tuple(np.flatnonzero(allocate(state._replace(key=jax.random.key(k)), budget=29)[0])) for k in range(8)]
    assert len(set(drawn)) > 1  # ties go by the key


def test_uniform_visits_everyone_equally_often():
    allocator = cero_jax.uniform(total_budget=8 * 30 * 4, num_epochs=12)
    allocate, state = jax.jit(allocator.allocate), allocator.init(30)
    for _ in range(12):
        n, state = allocate(state)
        state = allocator.update(state, n, n * 0)
    np.testing.assert_array_equal(state.cumulative_rollouts, 32)


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (cero_jax.uniform, {"group_size": 3}, "group_size=3 must lie in min_group=4"),
        (cero_jax.variance, {"advantage": "grpo"}, "advantage='grpo'"),
    ],
)
def test_wrong_settings_are_refused(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(total_budget=100, num_epochs=1, **wrong)
