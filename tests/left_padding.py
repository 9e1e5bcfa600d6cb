"""Rows padded on the left, the other way round than the package does: for references that share no code with it."""

import jax.numpy as jnp
import numpy as np
from jax import Array


def left_padded(lengths: Array, width: int) -> tuple[Array, Array]:
    """For rows padded on the left to `width` places: which places hold a token, and each token's position.

    lengths: [B] int32, tokens of each row. Returns valid [B, width] bool and positions [B, width] int32 (0 on padding).
    """
    place = jnp.arange(width, dtype=jnp.int32)[None, :] - (width - lengths[:, None])
    return place >= 0, jnp.maximum(place, 0)


def causal_mask(valid: Array) -> Array:
    """[B, T, T] bool: a token sees itself and the tokens before it.

    valid: [B, T] bool, which places hold a token. Padding sees itself, too: a softmax over no key at all would be NaN,
    which leaks into gradients.
    """
    width = valid.shape[1]
    causal = jnp.tril(jnp.ones((width, width), bool))
    return (causal[None] & valid[:, None, :]) | jnp.eye(width, dtype=bool)[None]


def to_the_right(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows [B, width] that are padded on the right, padded on the left."""
    return np.stack([np.roll(row, len(row) - length) for row, length in zip(tokens, lengths, strict=True)])
