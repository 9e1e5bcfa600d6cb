"""The first prompts of an order, without a sort: bisection on the value of the last one taken."""

import jax
import jax.numpy as jnp
from jax import Array

GREATEST = 2**31 - 1  # the rank of a prompt that is not taken


def first_in_order(rank: Array, tie_rank: Array, eligible: Array, count: Array) -> Array:
    """[P] bool: the `count` eligible prompts of the lowest rank, those of one rank by their tie_rank.

    rank, tie_rank: [P] int32 >= 0. eligible: [P] bool. count: [] int32 >= 0; all, where fewer are eligible.
    Two bisections over 31 bits, so 62 reads of the P ranks and no sort.
    """
    rank = jnp.where(eligible, rank, GREATEST)
    last = order_statistic(rank, count)
    below = rank < last
    tied = eligible & (rank == last)
    tie_rank = jnp.where(tied, tie_rank, GREATEST)
    missing = count - jnp.sum(below, dtype=jnp.int32)
    return (count > 0) & eligible & (below | (tied & (tie_rank <= order_statistic(tie_rank, missing))))


def order_statistic(x: Array, count: Array) -> Array:
    """[] int32, the smallest t with at least `count` of the x >= 0 at or below it, by bisection: no sort."""

    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) // 2
        enough = jnp.sum(x <= middle, dtype=jnp.int32) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    return jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(GREATEST)))[1]


def scattered(prompt_ids: Array, seed: Array) -> Array:
    """[P] int32 in [0, 2^31 - 1], another for each id below 2^31: where each stands in one fixed random order.

    prompt_ids: [P] int32 >= 0. seed: [] uint32. Every step (adding, multiplying by an odd number, folding the upper
    bits onto the lower) can be undone modulo 2^31, so no two ids meet; no array of N and no sort is needed.
    """
    mask = jnp.uint32(GREATEST)
    x = (prompt_ids.astype(jnp.uint32) + seed) & mask
    for fold, factor in ((16, 0x7FEB352D), (15, 0x046CA68B)):  # as in the "lowbias32" integer hash
        x = ((x ^ (x >> fold)) * jnp.uint32(factor)) & mask
    return (x ^ (x >> 16)).astype(jnp.int32)
