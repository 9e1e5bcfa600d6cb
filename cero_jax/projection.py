"""The output projection, the largest product of a step, and its gradient."""

import jax
import jax.numpy as jnp
from jax import Array


def project(product: str, hidden: Array, weights: Array) -> Array:
    """The einsum `product` "hidden,weights->logits", of the weights as read in hidden's dtype; summed in float32.

    By JAX's own rule both products of the gradient are of float32, since the logits' gradient is: several times the
    work. For bfloat16 that is rounded here as all else is, and the products are summed in float32. For float16 it is
    not: the gradient of a mean over many tokens is too small for it.
    """
    return (_in_bfloat16 if hidden.dtype == jnp.bfloat16 else _project)(product, hidden, weights)


def _project(product: str, hidden: Array, weights: Array) -> Array:
    return jnp.einsum(product, hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)


_in_bfloat16 = jax.custom_vjp(_project, nondiff_argnums=(0,))


def _forward(product: str, hidden: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return _project(product, hidden, weights), (hidden, weights)


def _backward(product: str, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    hidden, weights = kept
    inputs, out = product.split("->")
    left, right = inputs.split(",")
    rounded = grad.astype(hidden.dtype)
    of_hidden = _project(f"{out},{right}->{left}", rounded, weights).astype(hidden.dtype)
    return of_hidden, _project(f"{left},{out}->{right}", hidden, rounded).astype(weights.dtype)


_in_bfloat16.defvjp(_forward, _backward)
