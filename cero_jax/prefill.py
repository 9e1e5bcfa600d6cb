"""Prompts are read once each, a few at a time: sorted by length, as many as a bound on memory lets in.

Letters: U prompts, c of them read at once, W places of each, L layers, D width, Hkv key-value heads, Dh head size.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from cero_jax import model, sharding
from cero_jax.attention import Causal
from cero_jax.model import Cache, ModelConfig, Params

BYTES_AT_ONCE = 2**29  # of activations on a device, of the prompts that are read at once


class Prefilled(NamedTuple):
    """Prompts that were read together."""

    hidden: Array  # [c, D] of each prompt's last token
    lengths: Array  # [c] int32
    cache: Cache  # [L, c, W, Hkv, Dh]


class Chunk(NamedTuple):
    """Prompts to be read together."""

    prompts: np.ndarray  # [n] int, which of the U; n <= c
    width: int  # W
    rows: int  # c


class Reading(NamedTuple):
    """Which prompts of a sampling batch are read together, and where each of them then lies."""

    chunks: list[Chunk]
    chunk: np.ndarray  # [U] int32, of each prompt; -1 where no row wants it
    place: np.ndarray  # [U] int32, in its chunk


def row_bytes(config: ModelConfig, length: int, num_scores: int, mesh: Mesh, wide: int = 3) -> int:
    """Bytes of activations that one layer holds of a row of `length` tokens, on each device that heads are split over.

    The inputs and outputs of the layer's matrix products in compute dtype. In float32, num_scores times attention's
    scores, before and after the mask and as probabilities; of fused attention only their sum for each token and head.
    wide: how many arrays of the MLP's width.
    """
    tensor = mesh.shape["tensor"]
    inner = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim + wide * config.mlp_width
    products = length * (4 * config.width + inner / tensor) * jnp.dtype(config.compute_dtype).itemsize
    scores = num_scores * length**2 if model.kernel(config, mesh) == "xla" else length
    return int(products + config.num_heads / tensor * scores * 4)


def chunk_rows(config: ModelConfig, widths: tuple[int, ...], num_prompts: int, mesh: Mesh) -> dict[int, int]:
    """How many of up to `num_prompts` prompts are read at once, c, for each width.

    As many as BYTES_AT_ONCE lets in; a quarter of all where there are several widths, so that short ones are not read
    at the width of the longest. A multiple of the devices that rows are split over.
    """
    shards, parts = sharding.row_shards(mesh), 4 if len(widths) > 1 else 1
    most = -(-num_prompts // (parts * shards))
    fit = {width: BYTES_AT_ONCE // row_bytes(config, width, 3, mesh) for width in widths}
    return {width: max(1, min(most, rows)) * shards for width, rows in fit.items()}


def plan(lengths: np.ndarray, wanted: np.ndarray, rows: dict[int, int]) -> Reading:
    """How to read the `wanted` prompts [n] (places in `lengths` [U], in any number), the longest first.

    rows: c for each width, rising. Raises ValueError for a prompt that is longer than the last of them.
    """
    chunk, place = np.full(len(lengths), -1, np.int32), np.zeros(len(lengths), np.int32)
    wanted = np.unique(wanted)
    waiting, parts = wanted[np.argsort(-lengths[wanted], kind="stable")], []
    while waiting.size:
        width = next((width for width in rows if width >= lengths[waiting[0]]), None)
        if width is None:
            raise ValueError(f"a prompt of {lengths[waiting[0]]} tokens is longer than prompt_widths={tuple(rows)}")
        together, waiting = waiting[: rows[width]], waiting[rows[width] :]
        chunk[together], place[together] = len(parts), np.arange(len(together))
        parts.append(Chunk(together, width, rows[width]))
    return Reading(parts, chunk, place)


def inputs(chunk: Chunk, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `read` takes of prompts [U, Tp], padded on the right: [c, W] tokens and [c] lengths, 1 where none is."""
    rows, some = np.zeros((chunk.rows, chunk.width), np.int32), tokens[chunk.prompts, : chunk.width]
    rows[: len(some), : some.shape[1]] = some
    return rows, np.pad(lengths[chunk.prompts], (0, chunk.rows - len(some)), constant_values=1)


def read(params: Params, config: ModelConfig, tokens: Array, lengths: Array) -> Prefilled:
    """Read prompts [c, W], with padding behind them, into a cache whose places are the tokens' positions."""
    num_prompts, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
    cache = model.init_cache(config, num_prompts, width)
    start = jnp.zeros(num_prompts, jnp.int32)
    hidden, cache = model.forward(params, config, tokens, positions, Causal(lengths), cache, start)
    assert cache is not None
    return Prefilled(jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0], lengths, cache)
