"""Rotary positions: how far each pair of a head turns with its token's place. K: head size."""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for contexts longer than those trained on first."""

    kind: Literal["linear", "llama3"]
    """linear: all are divided by `factor` (Gemma 3); llama3: the slow ones are, with a ramp between."""
    factor: float
    low_freq_factor: float = 1.0
    """Wavelengths above original_max_positions / this are divided by `factor` (llama3)."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_max_positions / this stay (llama3)."""
    original_max_positions: int = 8192
    """Tokens of the context trained on first (llama3)."""


def frequencies(head_dim: int, base: float, scaling: RopeScaling | None = None) -> Array:
    """[K/2] float32, radians a position.

    Source: Su et al. 2021; "llama3" as in Meta's release of Llama 3.1.
    """
    half = head_dim // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequency
    stretched = frequency / scaling.factor
    if scaling.kind == "linear":
        return stretched
    turns = scaling.original_max_positions * frequency / (2 * math.pi)  # that the first context's length makes
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * stretched + keep * frequency


def rotate(x: Array, positions: Array, frequency: Array) -> Array:
    """Rotate x [B, T, heads, K] by its positions [B, T] (Su et al. 2021, half-split pairs as Llama has them)."""
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
