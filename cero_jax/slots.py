"""Slots, in which rollouts are under way on the device, how one begins there, and how long their cache may be.

Letters: S slots, c prompts read together, T completion tokens at most, C places in the cache, L layers, D width, Hkv
key-value heads, Dh head size.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from cero_jax.model import Cache, ModelConfig
from cero_jax.prefill import Prefilled

MANY = 64  # slots on a device that are never too many
SMALL = 2**29  # bytes of a cache on a device that are never too many


class Slots(NamedTuple):
    """Rollouts under way. The host keeps track of which row a slot draws; an idle slot is done."""

    key: Array  # [S] keys, of the row
    hidden: Array  # [S, D] of the last token, which the next is drawn from
    length: Array  # [S] int32, tokens in the cache
    drawn: Array  # [S] int32, tokens drawn
    limit: Array  # [S] int32, tokens that the row may have
    done: Array  # [S] bool
    ended: Array  # [S] bool, by an EOS
    tokens: Array  # [S, T] int32
    log_probs: Array  # [S, T] float32
    cache: Cache  # [L, S, C, Hkv, Dh]


def fill(
    slots: Slots, prompts: Prefilled, new: Array, prompt_of_slot: Array, keys: Array, limit: Array, pad_id: int
) -> Slots:
    """Let rollouts of these prompts begin in the `new` slots [S] bool, with their keys and limits; others go on."""
    width = prompts.cache.k.shape[2]
    begun = Slots(
        key=keys,
        hidden=prompts.hidden[prompt_of_slot],
        length=prompts.lengths[prompt_of_slot],
        drawn=jnp.zeros_like(slots.drawn),
        limit=limit,
        done=jnp.zeros_like(slots.done),
        ended=jnp.zeros_like(slots.ended),
        tokens=jnp.full_like(slots.tokens, pad_id),
        log_probs=jnp.zeros_like(slots.log_probs),
        cache=slots.cache,
    )
    taken = Slots(
        *(jnp.where(new.reshape(-1, *[1] * (b.ndim - 1)), b, s) for b, s in zip(begun[:-1], slots[:-1], strict=True)),
        cache=slots.cache,
    )
    # Nothing reads the cache behind a row's end, so only the prompt's places are copied.
    caches = (
        c.at[:, :, :width].set(jnp.where(new[None, :, None, None, None], p[:, prompt_of_slot], c[:, :, :width]))
        for c, p in zip(slots.cache, prompts.cache, strict=True)
    )
    return taken._replace(cache=Cache(*caches))


def cache_sizes(widths: tuple[int, ...], limit: int, window: int) -> tuple[int, ...]:
    """The cache lengths compiled for, rising: each of the prompts' `widths` plus one window, two, four .. up to T.

    Without those that the next one kept exceeds by less than a quarter. limit: T. window: decode steps.
    """
    sizes = [window]
    while sizes[-1] < limit:
        sizes.append(2 * sizes[-1])
    kept: list[int] = []
    for size in sorted({width + min(size, limit) for width in widths for size in sizes}, reverse=True):
        if not kept or 1.25 * size <= kept[-1]:
            kept.append(size)
    return tuple(reversed(kept))


def number_of_slots(
    chosen: int | None, num_rows: int, *, config: ModelConfig, num_params: int, places: int, row_shards: int
) -> int:
    """S for `num_rows` rollouts: as many as `chosen`, or where it is None, as are worth their memory.

    A decode step reads the weights and the cache once. Where the cache holds as much as the weights do, twice the
    slots would draw a third more at most, for twice the memory. places: C at its longest. row_shards: devices that
    share the rows.
    Raises ValueError where the slots do not divide over those.
    """
    if chosen is None:
        size = jnp.dtype(config.compute_dtype).itemsize
        of_a_row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * places * size
        chosen = max(MANY, max(SMALL, num_params * size) // of_a_row) * row_shards
    if (slots := min(chosen, num_rows)) % row_shards:
        raise ValueError(f"{slots} slots must be a multiple of data x fsdp = {row_shards}")
    return slots
