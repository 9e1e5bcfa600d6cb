"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): what they compute, and which parameters are trained.

An adapter is a part of its layer (`q_lora` beside `q`). `split` takes a policy's parameters, a nested dict of arrays,
apart into the frozen model and the adapters, so that gradients, optimiser and checkpoints hold adapters only; `join`
puts them together again.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array


class Adapter(nnx.LoRA):
    """What a linear layer adds to its output for its input x: alpha / rank * (x A) B.

    A and B are float32. B starts at 0, so a fresh adapter changes nothing.
    """

    def __init__(self, size_in: int, size_out: int, rank: int, alpha: float, rngs: nnx.Rngs):
        super().__init__(size_in, rank, size_out, rngs=rngs)
        self.scale = alpha / rank

    def __call__(self, x: Array) -> Array:
        """[..., size_out] in x's dtype, for x [..., size_in]."""
        return (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype) * self.scale


def split(params: dict) -> tuple[dict, dict]:
    """(frozen, trained): the model and its adapters; ({}, params) where it has none. `join` is the inverse."""
    flat: Any = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1] in ("lora_a", "lora_b")}
    if not adapters:
        return {}, params
    return unflatten_dict({path: flat[path] for path in flat.keys() - adapters.keys()}), unflatten_dict(adapters)


def join(frozen: dict, trained: dict) -> dict:
    """The parameters of the whole policy, from what `split` returned; no array is copied."""
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(trained)}) if frozen else trained


def merge(weight: Array, lora_a: Array, lora_b: Array, alpha: float) -> Array:
    """W + alpha / rank * A B: a layer's weight with its adapter A [in, rank], B [rank, out] merged into it.

    The sum is in float32; the result has the weight's shape and dtype.
    """
    change = jnp.dot(lora_a, lora_b, precision="highest").reshape(weight.shape) * (alpha / lora_a.shape[-1])
    return (weight.astype(jnp.float32) + change).astype(weight.dtype)
