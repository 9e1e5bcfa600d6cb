"""Checksums of arrays, made where the arrays lie: what is read back from a disk is what was written, to the bit."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Arrays = dict[str, Any]  # by name, on devices, of any sharding, or NumPy's


def checksums(arrays: Arrays) -> dict[str, int]:
    """A number in 0..2**32-1 for each array, that depends on its bits, their places and its shape, not on sharding.

    A change of one element, of one half of a 64-bit one, changes it for certain, any other with probability 1 - 2**-32.
    """
    # jit takes 64-bit arrays of NumPy as 32-bit ones, where JAX's 64 bits are off.
    words = {name: x.reshape(-1).view(np.uint32) if _is_wide(x) else x for name, x in arrays.items()}
    return {name: int(value) for name, value in jax.device_get(_sums(words)).items()}


def described(arrays: Arrays) -> dict[str, list]:
    """[dtype and shape, checksum] of each array: what has to be the same when it is read back. Plain values."""
    return {name: [type_of(arrays[name]), value] for name, value in checksums(arrays).items()}


def type_of(leaf: Any) -> str:
    """Dtype and shape, as "float32[24, 16]"."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def text_checksum(plain: Any) -> str:
    """Of a JSON value, 16 hex digits: the same before it is written and after it is read."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _is_wide(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.itemsize == 8


@jax.jit
def _sums(arrays: Arrays) -> dict[str, Array]:
    return {name: _sum(leaf) for name, leaf in arrays.items()}


def _sum(leaf: Array) -> Array:
    """[] uint32, the sum of every word's bits mixed with its place. A sum of integers is exact in any order."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    words = lax.bitcast_convert_type(leaf, f"uint{min(32, 8 * leaf.dtype.itemsize)}").astype(jnp.uint32)
    return jnp.sum(_mixed(words ^ _mixed(_places(words.shape))), dtype=jnp.uint32)


def _places(shape: tuple[int, ...]) -> Array:
    """uint32 of `shape`: each element's index modulo 2**32. No reshape, which would gather a sharded array."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def _mixed(words: Array) -> Array:
    """The last steps of MurmurHash3, one to one on uint32: each bit moves about half of the others."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))
