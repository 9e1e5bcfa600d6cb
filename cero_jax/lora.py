"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): what they compute, and which parameters are trained.

The adapters lie in the model's layers. A policy is taken apart, so that gradients, optimiser and checkpoints are of
the adapters alone, and put together again. Here a tree of parameters is a nested dict of arrays.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array


class Adapter(nnx.LoRA):
    """What is added to a linear layer's output: alpha / rank x A B, which is 0 at the start. Parameters in float32."""

    def __init__(self, size_in: int, size_out: int, rank: int, alpha: float, rngs: nnx.Rngs):
        super().__init__(size_in, rank, size_out, rngs=rngs)
        self.scale = alpha / rank

    def __call__(self, x: Array) -> Array:
        """Inputs x [..., size_in] -> [..., size_out] in x's dtype."""
        return (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype) * self.scale


def split(params: dict) -> tuple[dict, dict]:
    """What is frozen, and what is trained: ({}, everything) where there are no adapters. `join` is the inverse."""
    flat: Any = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1] in ("lora_a", "lora_b")}
    if not adapters:
        return {}, params
    return unflatten_dict({path: flat[path] for path in flat.keys() - adapters.keys()}), unflatten_dict(adapters)


def join(frozen: dict, trained: dict) -> dict:
    """The whole policy; no array is copied."""
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(trained)}) if frozen else trained


def merge(weight: Array, lora_a: Array, lora_b: Array, alpha: float) -> Array:
    """A layer's weight with its adapter, [in, rank] and [rank, out], in it: W + alpha / rank x A B, in float32."""
    change = jnp.dot(lora_a, lora_b, precision="highest").reshape(weight.shape) * (alpha / lora_a.shape[-1])
    return (weight.astype(jnp.float32) + change).astype(weight.dtype)
