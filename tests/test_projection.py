"""The output projection's gradient, against float64 NumPy and JAX's own rule."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cero_jax import model
from cero_jax.model import ModelConfig
from cero_jax.projection import project

RNG = np.random.default_rng(0)
PIECES, ROWS, TOKENS, WIDTH, VOCAB = 2, 3, 5, 16, 11
HIDDEN, WEIGHTS = RNG.normal(size=(PIECES, ROWS, TOKENS, WIDTH)), RNG.normal(size=(PIECES, WIDTH, VOCAB))
GRAD = RNG.normal(size=(PIECES, ROWS, TOKENS, VOCAB)).astype(np.float32)  # of the logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_gradient_is_of_what_is_read_and_summed_in_float32(dtype, tied):
    product, turned = ("s...d,svd->s...v", (0, 2, 1)) if tied else ("s...d,sdv->s...v", (0, 1, 2))
    hidden = jnp.asarray(HIDDEN, dtype)
    weights = jnp.asarray(WEIGHTS.transpose(turned), dtype).astype(jnp.float32)

    def by_jax(hidden, weights):
        return jnp.einsum(product, hidden, weights.astype(dtype), preferred_element_type=jnp.float32)

    def gradients(project):
        return jax.jit(jax.grad(lambda h, w: (project(h, w) * GRAD).sum(), argnums=(0, 1)))(hidden, weights)

    ours, theirs = gradients(lambda h, w: project(product, h, w)), gradients(by_jax)
    assert [each.dtype for each in ours] == [hidden.dtype, jnp.float32]
    if dtype != "bfloat16":
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)  # to the bit
        return
    rounded = np.asarray(jnp.asarray(GRAD, dtype)).astype(np.float64)
    h, w = np.asarray(hidden).astype(np.float64), np.asarray(weights, np.float64).transpose(turned)
    of_hidden, of_weights = np.asarray(ours[0]).astype(np.float64), np.asarray(ours[1]).transpose(turned)
    np.testing.assert_allclose(of_weights, np.einsum("sbtd,sbtv->sdv", h, rounded), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_hidden, np.einsum("sbtv,sdv->sbtd", rounded, w), rtol=2**-8, atol=1e-5)
    for mine, exact in (
        (of_weights, np.einsum("sbtd,sbtv->sdv", h, GRAD)),
        (of_hidden, np.einsum("sbtv,sdv->sbtd", GRAD, w)),
    ):
        assert np.linalg.norm(mine - exact) < 2**-8 * np.linalg.norm(exact)  # what rounding costs in all


@pytest.mark.parametrize("tied", [False, True])
def test_all_products_of_a_bfloat16_model_are_of_bfloat16(tied):
    config = ModelConfig(num_layers=1, width=WIDTH, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16,
                         tied_embeddings=tied, compute_dtype="bfloat16")  # fmt: skip
    name = "embed" if tied else "unembed"
    params = {name: jnp.asarray(WEIGHTS[0].T if tied else WEIGHTS[0], jnp.float32)}

    def loss(params, hidden):
        return jax.nn.log_softmax(model.chunked_logits(params, config)(hidden))[..., 0].sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, jnp.asarray(HIDDEN[0], jnp.bfloat16)).as_text()
    of = re.findall(r"dot_general .*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\) -> tensor<[^>]*x(\w+)>", program)
    assert of == [("bf16", "bf16", "f32")] * 3  # the logits, and their gradient by hidden states and by the projection
