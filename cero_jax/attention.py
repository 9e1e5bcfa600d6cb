"""Attention of queries to the keys and values that they may see, and writing those into a cache.

Three kernels. `xla` writes all scores [rows, heads, T, T] down and works everywhere; `cudnn`, on NVIDIA's GPUs, and
`splash`, on TPUs, are fused: they hold a few blocks of scores at a time. Letters as in model.py.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from cero_jax import sharding

Kernel = Literal["xla", "cudnn", "splash"]
Choice = Literal["auto", "xla", "cudnn", "splash"]
SPLASH_BLOCKS = (512, 256, 128)  # tokens of a block of scores; of the first of which T holds eight, or else the last


class Causal(NamedTuple):
    """What the tokens of a call see that are the first of their rows: each itself and those before it.

    Padding stands behind a row's tokens; what it sees, and what attention gives it, means nothing.
    """

    lengths: Array  # [B] int32, tokens of each row, at least 1
    near: Array | None = None  # [] bool, True: of those only the last `window`; None: all, in every layer


def kernel_for(wanted: Choice, dtype: str, head_dim: int, device: Any) -> Kernel:
    """The kernel for queries of that dtype and head size on a device like that.

    `auto` is the fused one of the platform where that can be, else `xla`. Raises ValueError for another that cannot be.
    """
    why_not = {"cudnn": _why_not_cudnn, "splash": _why_not_splash}
    if wanted == "auto":
        kernels: list[Kernel] = ["cudnn", "splash", "xla"]
        return next(each for each in kernels if each == "xla" or why_not[each](dtype, head_dim, device) is None)
    if wanted != "xla" and (reason := why_not[wanted](dtype, head_dim, device)):
        raise ValueError(f'model.attention={wanted!r} {reason}: say "auto", which chooses what can be')
    return wanted


def _why_not_cudnn(dtype: str, head_dim: int, device: Any) -> str | None:
    """Why cuDNN cannot; None: it can. Source: jax's own checks, which would come only once a step is compiled."""
    # The mesh in use does not say its capability. Ahead of time, without a GPU, it is taken for an H100's.
    generation = int(getattr(jax.devices()[0], "compute_capability", "9.0").split(".")[0])
    if not device.device_kind.startswith("NVIDIA") or generation < 8:
        return f"needs a GPU of NVIDIA, Ampere or later, and this is {device.device_kind}"
    if dtype == "float32":
        return "needs model.compute_dtype bfloat16 or float16, not float32"
    most = 256 if generation >= 9 else 128
    if head_dim % 8 or head_dim > most:
        return f"needs model.head_dim to be a multiple of 8 and at most {most}, not {head_dim}"
    return None


def _why_not_splash(dtype: str, head_dim: int, device: Any) -> str | None:
    """Why splash attention cannot; None: it can."""
    if device.platform != "tpu":
        return f"needs a TPU, and this is {device.device_kind}"
    if dtype == "float16":
        return "needs model.compute_dtype bfloat16 or float32, not float16"
    return None


def attend(
    q: Array, k: Array, v: Array, sees: Array | Causal, scale: float, *, kernel: Kernel = "xla", window: int = 0
) -> Array:
    """Of q [B, T, H, Dh] to k, v [B, C, Hkv, Dh], the scores times scale: [B, T, H, Dh].

    sees: [B, T, C] bool, which keys each query looks at (`xla` whatever the kernel), or Causal, with C = T. kernel:
    which computes it. window: tokens, of a Causal that is near.
    """
    if not isinstance(sees, Causal):
        mask = sees
    elif kernel == "xla" or q.shape[1] == 1:
        mask = _causal_mask(sees, q.shape[1], window)
    else:
        fused = functools.partial(_fused, kernel=kernel, scale=scale, window=window)
        return _by_rows_and_heads(fused, sees)(q, k, v, sees)
    if q.shape[1] == 1:
        return _attend_one(q, k, v, mask, scale)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)


def _causal_mask(sees: Causal, width: int, window: int) -> Array:
    """[1, T, T] bool, lengths left out: padding is behind the tokens, so that none of them sees it. width: T."""
    place = jnp.arange(width, dtype=jnp.int32)
    behind = place[:, None] - place[None]  # how far a key is behind the query
    mask = behind >= 0
    if sees.near is not None:
        mask &= behind < jnp.where(sees.near, window, width)
    return mask[None]


def _fused(q: Array, k: Array, v: Array, sees: Causal, *, kernel: Kernel, scale: float, window: int) -> Array:
    """`attend` by a fused kernel, T > 1. A kernel is made for one window: a Causal that may be near chooses of two."""
    by = functools.partial({"cudnn": _cudnn, "splash": _splash}[kernel], scale=scale)
    if sees.near is None or window >= q.shape[1]:
        return by(q, k, v, sees.lengths, window=None)
    windowed, whole = (functools.partial(by, window=each) for each in (window, None))
    return jax.lax.cond(sees.near, windowed, whole, q, k, v, sees.lengths)


def _by_rows_and_heads(function: Callable, sees: Causal) -> Callable:
    """The function of q, k, v [rows, T, heads, Dh] and such a Causal, computed by each device for its rows and heads.

    The compiler does not split a kernel by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    split: Any = P(*sharding.ROWS, None, "tensor")
    layout: Any = Causal(sharding.ROWS, None if sees.near is None else P())  # type: ignore[arg-type]
    return jax.shard_map(function, in_specs=(split, split, split, layout), out_specs=split, check_vma=False)


def _cudnn(q: Array, k: Array, v: Array, lengths: Array, *, scale: float, window: int | None) -> Array:
    """NVIDIA's flash attention. Padding is skipped, but in a window: there cuDNN does not take lengths.

    T is filled up to an even number: of an odd one jax takes no gradient.
    """
    width = q.shape[1]
    q, k, v = (_filled_up(x, 2) for x in (q, k, v))
    causal = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation="cudnn")
    if window is None:
        out = causal(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    else:
        out = causal(q, k, v, local_window_size=(window - 1, 0))  # tokens before a token, and behind it
    return out[:, :width]


def _splash(q: Array, k: Array, v: Array, lengths: Array, *, scale: float, window: int | None) -> Array:
    """Pallas's attention of TPUs. T is filled up to whole blocks; padding is a segment of its own."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and needed on TPUs alone

    width = q.shape[1]
    block = next((size for size in SPLASH_BLOCKS if 8 * size <= width), SPLASH_BLOCKS[-1])
    q, k, v = (_filled_up(x, block).swapaxes(1, 2) for x in (q * scale, k, v))
    padded = q.shape[2]
    segment = (jnp.arange(padded, dtype=jnp.int32)[None] < lengths[:, None]).astype(jnp.int32)
    shape = (padded, padded)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes += ("block_kv_compute", "block_kv_dkv_compute")
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * q.shape[1]), block_sizes=splash.BlockSizes(**dict.fromkeys(sizes, block))
    )
    out: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment, segment))
    return out.swapaxes(1, 2)[:, :width]


def _filled_up(x: Array, multiple: int) -> Array:
    """[B, T, heads, Dh] with zeros behind, up to a multiple of that many places."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def _attend_one(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """Attention of one token a row: q [B, 1, H, Dh] to k, v [B, C, Hkv, Dh] where mask [B, 1, C]; [B, 1, H, Dh].

    The same as jax.nn.dot_product_attention, but with the keys as the product's left operand: on a CPU, XLA then does
    not transpose keys and values, which made attention alone 1.2 to 2.3 times as fast.
    """
    grouped = q.reshape(q.shape[0], k.shape[2], -1, q.shape[3])  # [B, Hkv, H/Hkv, Dh]
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    scores = dot(k, grouped, (((3,), (3,)), ((0, 2), (0, 1)))).swapaxes(2, 3) * scale  # [B, Hkv, H/Hkv, C]
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    probability = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return dot(probability, v, (((3,), (1,)), ((0, 1), (0, 2)))).reshape(q.shape).astype(v.dtype)


def write(cache: Array, new: Array, layer: Array, places: Array) -> Array:
    """The cache [L, B, C, Hkv, Dh] with new [B, T, Hkv, Dh] at a layer's places [B, T]; none is written beyond C.

    To the scatter, rows are a batch and not an index: so a device writes its own rows and asks no other for theirs.
    """
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3),
        inserted_window_dims=(0, 2),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    at = jnp.stack([jnp.broadcast_to(layer, places.shape), places], axis=-1)
    return jax.lax.scatter(cache, at, new, numbers, unique_indices=True, mode="drop")
