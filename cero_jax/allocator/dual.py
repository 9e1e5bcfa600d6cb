"""The budget's price: where shares that fall with a price sum to the budget."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

BISECTIONS = 36  # from a bracket of about 100 down to the resolution of a float32


def shares_at_budget(
    shares_at: Callable[[Array], Array], low: Array, high: Array, budget: Array
) -> tuple[Array, Array]:
    """Shares that sum to the budget, and their level (the logarithm of a price, or another falling order).

    shares_at: level [] -> shares [P], none rising in the level. low, high: [] float32, levels at which the shares sum
    to at least and at most the budget. Where the sum jumps across the budget (ties, integer shares, a huge tau), the
    two sides of the jump are mixed in the proportion that meets it, so ties share alike.
    Returns ([P] float32, [] float32). Where even `low` sums to less, its shares are returned.
    """
    budget = jnp.asarray(budget).astype(jnp.float32)

    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) / 2
        enough = jnp.sum(shares_at(middle)) >= budget
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))
    more, fewer = shares_at(low), shares_at(high)
    sum_more, sum_fewer = jnp.sum(more), jnp.sum(fewer)
    part = jnp.clip((budget - sum_fewer) / jnp.maximum(sum_more - sum_fewer, 1e-6), 0, 1)
    return fewer + part * (more - fewer), low
