"""Rotary positions: each pair of a head's values is turned by an angle that grows with the token's position.

Letters as in model.py: B rows, T tokens, Dh head size.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array

from cero_jax.settings import check

LARGEST_BASE = 1e30  # of the angles, in float32


@dataclass(frozen=True)
class RopeScaling:
    """Lower rotary frequencies, for contexts longer than those that the model was first trained on."""

    kind: Literal["linear", "llama3"]
    """linear: every frequency is divided by `factor` (Gemma 3); llama3: only the low ones are, with a ramp between."""
    factor: float
    low_freq_factor: float = 1.0
    """llama3: frequencies of wavelengths above original_max_positions / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: frequencies of wavelengths below original_max_positions / high_freq_factor stay as they are."""
    original_max_positions: int = 8192
    """llama3: the context that the model was first trained on, in tokens."""

    def __post_init__(self):
        factors = dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), (1e-6, 1e6))
        check(self, original_max_positions=(1, 2**31 - 1), **factors)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"RopeScaling: low_freq_factor={self.low_freq_factor} must be below high_freq_factor="
                f"{self.high_freq_factor}"
            )


def frequencies(head_dim: int, base: float, scaling: RopeScaling | None = None) -> Array:
    """[Dh/2] float32, the angle by which each pair turns from one position to the next, in radians.

    Source: Su et al. 2021 (arXiv 2104.09864); the kind "llama3" is that of Meta's release of Llama 3.1.
    """
    half = head_dim // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequency
    stretched = frequency / scaling.factor
    if scaling.kind == "linear":
        return stretched
    turns = scaling.original_max_positions * frequency / (2 * math.pi)  # over the whole first context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * stretched + keep * frequency


def rotate(x: Array, positions: Array, frequency: Array) -> Array:
    """Rotate x [B, T, heads, Dh] by its positions [B, T]; value j of a head pairs with j + Dh/2, as in Llama."""
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
