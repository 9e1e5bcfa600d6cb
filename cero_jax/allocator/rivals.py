"""What others do with a budget, under the same contract, so that a user compares by changing one word.

Written from their mathematics. They know no budget across epochs: where a round's budget is under P group_size it goes
to the floor(budget / group_size) prompts with the fewest cumulative rollouts, ties by the key, and their rule divides
it among those.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cero_jax.allocator.base import Allocator, AllocatorState, Prompts, build
from cero_jax.allocator.dual import shares_at_budget
from cero_jax.allocator.posterior import expected_variance

_GREATEST = 2**31 - 1


def uniform(
    *,
    total_budget,
    num_epochs: int,
    min_group: int = 4,
    max_group: int = 32,
    group_size: int = 8,
    prior=(0.5, 0.5),
    discount=0.9,
    expected_tokens=None,
) -> Allocator:
    """GRPO's fixed group size: every prompt alike, in turn.

    group_size: rollouts of a group, within [min_group, max_group]; groups grow evenly where a round's budget is more
    than P group_size. prior, discount: of the posterior, kept for the diagnostics alone. The others as in `cero`.
    """

    def divide(prompts: Prompts, chosen: Array, budget: Array) -> Array:
        paid = jnp.where(chosen, 1.0, 0.0) if prompts.cost is None else jnp.where(chosen, prompts.cost, 0.0)
        return jnp.where(chosen, budget.astype(jnp.float32) / jnp.maximum(jnp.sum(paid), 1e-6), 0.0)

    return _in_turn(
        divide,
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        group_size=group_size,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
    )


def variance(
    *,
    total_budget,
    num_epochs: int,
    min_group: int = 4,
    max_group: int = 32,
    group_size: int = 8,
    advantage: str = "rloo",
    prior=(0.5, 0.5),
    discount=0.9,
    expected_tokens=None,
) -> Allocator:
    """VIP (arXiv 2602.01601): minimise the sum over prompts of the gradient's variance.

    With a = E[p(1 - p)], a prompt's variance at n rollouts is a / (n - 1) for advantage "rloo" and a (n - 1) / n^2 for
    "dr_grpo". Both gains of one more rollout fall in n, so a threshold on the gain is exact in integers (for "dr_grpo"
    from min_group 3 on: its gain of 2 -> 3 is under that of 3 -> 4). The other arguments as in `uniform`.
    """
    if advantage not in ("rloo", "dr_grpo"):
        raise ValueError(f"advantage={advantage!r} is neither 'rloo' nor 'dr_grpo'")
    sizes = np.arange(min_group, max_group, dtype=np.float64)  # n, of a gain n -> n + 1
    gains = (sizes - 1) / sizes**2 - sizes / (sizes + 1) ** 2
    rising = jnp.asarray(np.sort(-gains), jnp.float32)

    def size_at(prompts: Prompts, price: Array) -> Array:
        ratio = price / expected_variance(prompts.alpha, prompts.beta)
        if advantage == "rloo":  # the gain of n - 1 -> n is a / ((n - 1)(n - 2))
            return jnp.floor(1.5 + jnp.sqrt(0.25 + 1 / ratio))
        return min_group + jnp.searchsorted(rising, -ratio, side="right").astype(jnp.float32)

    return _in_turn(
        _by_threshold(size_at, min_group, max_group),
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        group_size=group_size,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
    )


def knapsack(
    *,
    total_budget,
    num_epochs: int,
    min_group: int = 4,
    max_group: int = 32,
    group_size: int = 8,
    prior=(0.5, 0.5),
    discount=0.9,
    expected_tokens=None,
) -> Allocator:
    """Knapsack RL (arXiv 2509.25849): maximise the chance of a group with a gradient, weighed by what it teaches.

    With p the posterior mean, maximise the sum of (1 - p^n - (1 - p)^n) p (1 - p)^2. The gain of n -> n + 1 is
    p (1 - p)^2 (p^n (1 - p) + (1 - p)^n p), which falls in n, so a threshold is exact. Arguments as in `uniform`.
    """
    steps = int(max_group - min_group).bit_length()

    def size_at(prompts: Prompts, price: Array) -> Array:
        p = prompts.alpha / (prompts.alpha + prompts.beta)
        q = prompts.beta / (prompts.alpha + prompts.beta)
        log_p, log_q = jnp.log(p), jnp.log(q)

        def gain(n):
            return p * q * q * (jnp.exp(n * log_p) * q + jnp.exp(n * log_q) * p)

        def halve(_, bracket):  # the largest n whose gain of n - 1 -> n is at least the price
            low, high = bracket
            middle = jnp.ceil((low + high) / 2)
            enough = gain(middle - 1) >= price
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

        bracket = jnp.full_like(p, min_group), jnp.full_like(p, max_group)
        return jax.lax.fori_loop(0, steps, halve, bracket)[0]

    return _in_turn(
        _by_threshold(size_at, min_group, max_group),
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        group_size=group_size,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
    )


def fewest_first(key, prompts: Prompts, count: Array) -> Array:
    """[P] bool: the `count` valid prompts with the fewest cumulative rollouts, ties drawn by the key."""
    beyond = jnp.int32(_GREATEST)
    rollouts = jnp.where(prompts.valid, prompts.rollouts, beyond)
    last = _order_statistic(rollouts, count)
    below = rollouts < last
    tied = prompts.valid & (rollouts == last)
    priority = jnp.where(tied, jax.random.randint(key, rollouts.shape, 0, beyond, jnp.int32), beyond)
    missing = count - jnp.sum(below, dtype=jnp.int32)
    return prompts.valid & (below | (tied & (priority <= _order_statistic(priority, missing))))


def _order_statistic(x: Array, count: Array) -> Array:
    """[] int32, the smallest t with at least `count` of the x >= 0 at or below it, by bisection: no sort."""

    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) // 2
        enough = jnp.sum(x <= middle, dtype=jnp.int32) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    return jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(_GREATEST)))[1]


def _in_turn(
    divide: Callable[[Prompts, Array, Array], Array], *, group_size: int, min_group: int, max_group: int, **settings
) -> Allocator:
    """The allocator that chooses whose turn it is and lets `divide` share the budget among them."""
    if not min_group <= group_size <= max_group:
        raise ValueError(f"group_size={group_size} must lie in min_group={min_group}..max_group={max_group}")

    def rule(state: AllocatorState, prompts: Prompts, budget: Array, key) -> tuple[Array, AllocatorState, Array]:
        mean_cost = 1 if state.tokens is None else jnp.mean(state.tokens.mean_tokens)
        num_groups = (budget // (group_size * mean_cost)).astype(jnp.int32)
        chosen = fewest_first(key, prompts, jnp.maximum(num_groups, 1))
        return divide(prompts, chosen, budget), state, state.prompt_dual

    return build(rule, min_group=min_group, max_group=max_group, **settings)


def _by_threshold(size_at: Callable[[Prompts, Array], Array], min_group: int, max_group: int):
    """A `divide` that gives every chosen prompt the size at which its gain of one more falls under one price.

    size_at: (prompts, price []) -> [P] float32, the size before it is cut to [min_group, max_group].
    """

    def divide(prompts: Prompts, chosen: Array, budget: Array) -> Array:
        def shares_at(log_price):
            size = jnp.clip(size_at(prompts, jnp.exp(log_price)), min_group, max_group)
            return jnp.where(chosen, size, 0.0)

        return shares_at_budget(shares_at, jnp.float32(-80.0), jnp.float32(1.0), budget, prompts.cost)[0]

    return divide
