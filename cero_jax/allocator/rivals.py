"""What others do with a budget, under the same contract, so that a user compares by changing one word.

These rules know no budget across epochs. Where a round's budget is under P group_size they give it to the
floor(budget / group_size) prompts with the fewest cumulative rollouts, ties by the key.
"""

import jax
import jax.numpy as jnp
from jax import Array

from cero_jax.allocator.base import Allocator, AllocatorState, Prompts, build


def uniform(
    *,
    total_budget,
    num_epochs: int,
    min_group: int = 4,
    max_group: int = 32,
    group_size: int = 8,
    prior=(0.5, 0.5),
    discount=0.9,
) -> Allocator:
    """GRPO's fixed group size: every prompt alike, in turn.

    group_size: rollouts of a group, within [min_group, max_group]; groups grow evenly where a round's budget is more
    than P group_size. prior, discount: of the posterior, kept for the diagnostics alone. The others as in `cero`.
    """
    _check_group_size(group_size, min_group, max_group)

    def rule(state: AllocatorState, prompts: Prompts, budget: Array, key) -> tuple[Array, AllocatorState]:
        chosen = fewest_first(key, prompts, jnp.maximum(budget // group_size, 1))
        count = jnp.maximum(jnp.sum(chosen, dtype=jnp.int32), 1)
        return jnp.where(chosen, budget.astype(jnp.float32) / count.astype(jnp.float32), 0.0), state

    return build(
        rule,
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        prior=prior,
        discount=discount,
    )


def fewest_first(key, prompts: Prompts, count: Array) -> Array:
    """[P] bool: the `count` valid prompts with the fewest cumulative rollouts, ties drawn by the key."""
    beyond = jnp.int32(2**31 - 1)
    rollouts = jnp.where(prompts.valid, prompts.rollouts, beyond)
    last = _order_statistic(rollouts, count)
    below = rollouts < last
    tied = prompts.valid & (rollouts == last)
    priority = jnp.where(tied, jax.random.randint(key, rollouts.shape, 0, beyond, jnp.int32), beyond)
    missing = count - jnp.sum(below, dtype=jnp.int32)
    return prompts.valid & (below | (tied & (priority <= _order_statistic(priority, missing))))


def _order_statistic(x: Array, count: Array) -> Array:
    """[] int32, the smallest t with at least `count` of the x >= 0 at or below it, by bisection on its bits."""

    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) // 2
        enough = jnp.sum(x <= middle, dtype=jnp.int32) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    return jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(2**31 - 1)))[1]


def _check_group_size(group_size: int, min_group: int, max_group: int) -> None:
    if not min_group <= group_size <= max_group:
        raise ValueError(f"group_size={group_size} must lie in min_group={min_group}..max_group={max_group}")
