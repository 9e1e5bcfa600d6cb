"""The transformer against a float64 one written with loops, and what must hold of any causal decoder with a cache."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cero_jax import model
from cero_jax.model import ModelConfig

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TIED = ModelConfig(num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, rope_base=100.0)
UNTIED = ModelConfig(
    num_layers=2, width=16, num_heads=4, num_kv_heads=1, head_dim=4, mlp_width=24, norm_eps=1e-2, tied_embeddings=False
)
VOCAB = 11
LENGTHS = (3, 7, 5)
WIDTH = 7

forward = jax.jit(model.forward, static_argnames="config")
logits_of = jax.jit(model.logits, static_argnames="config")


@cache
def make_params(config, seed=0):
    """Random parameters whose norms and embeddings are no ones and no small numbers: every one of them must matter."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(model.init_params, config, VOCAB, 0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.4, x.shape), x.dtype), shapes)


def padded_rows(seed=0):
    """Rows of unequal length, padded on the left with arbitrary tokens: tokens, positions, mask."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (len(LENGTHS), WIDTH)).astype(np.int32)
    valid, positions = model.left_padded(jnp.asarray(LENGTHS, jnp.int32), WIDTH)
    return tokens, positions, model.causal_mask(valid)


def run(params, config, tokens, positions, mask):
    hidden, _ = forward(params, config, tokens, positions, mask)
    return np.asarray(logits_of(params, config, hidden))


def unpadded(tokens):
    """One row alone: tokens [1, T], positions, mask."""
    tokens = np.asarray(tokens, np.int32)[None]
    valid, positions = model.left_padded(jnp.asarray([tokens.shape[1]], jnp.int32), tokens.shape[1])
    return tokens, positions, model.causal_mask(valid)


def loop_transformer(params, config, tokens):
    """Logits [T, V] of one row in float64, one token, head and pair at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return np.array([row / math.sqrt((row**2).mean() + config.norm_eps) for row in x]) * scale

    def rotate(x, position):
        half, out = len(x) // 2, np.empty(len(x))
        for j in range(half):
            angle = position * config.rope_base ** (-2 * j / len(x))
            out[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
            out[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
        return out

    x = p["embed"][tokens]
    for n in range(config.num_layers):
        layer = jax.tree.map(lambda w: w[n], p["layers"])
        y, attended = norm(x, layer["attn_norm"]), np.zeros_like(x)
        for head in range(config.num_heads):
            shared = head * config.num_kv_heads // config.num_heads
            q, k, v = (y @ layer["attn"][name][:, h] for name, h in (("q", head), ("k", shared), ("v", shared)))
            q, k = (np.array([rotate(row, t) for t, row in enumerate(z)]) for z in (q, k))
            for t in range(len(tokens)):
                score = np.array([q[t] @ k[s] / math.sqrt(config.head_dim) for s in range(t + 1)])
                weight = np.exp(score - score.max())
                attended[t] += (weight / weight.sum()) @ v[: t + 1] @ layer["attn"]["o"][head]
        x = x + attended
        y = norm(x, layer["mlp_norm"])
        gate = y @ layer["mlp"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["mlp"]["up"])) @ layer["mlp"]["down"]
    return norm(x, p["final_norm"]) @ (p["embed"].T if config.tied_embeddings else p["unembed"])


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_forward_equals_a_float64_transformer_of_loops(config):
    params = make_params(config)
    assert ("unembed" in params) is not config.tied_embeddings
    tokens, positions, mask = padded_rows()
    got = run(params, config, tokens, positions, mask)
    assert got.dtype == np.float32
    for row, length in enumerate(LENGTHS):
        want = loop_transformer(params, config, tokens[row, WIDTH - length :])
        np.testing.assert_allclose(got[row, WIDTH - length :], want, rtol=1e-4, atol=1e-4)


def test_left_padding_and_the_other_rows_change_nothing():
    params = make_params(TIED)
    tokens, positions, mask = padded_rows()
    together = run(params, TIED, tokens, positions, mask)
    for row, length in enumerate(LENGTHS):
        alone = run(params, TIED, *unpadded(tokens[row, WIDTH - length :]))
        np.testing.assert_allclose(together[row, WIDTH - length :], alone[0], rtol=1e-5, atol=1e-5)


def test_no_gradient_comes_from_later_tokens():
    """Distinct tokens and a table of its own for the output: a token's gradient is its row's in the embedding."""
    params = make_params(UNTIED)
    row = [4, 9, 0, 7, 2, 5]
    tokens, positions, mask = unpadded(row)

    @jax.jit
    @jax.jacrev
    def gradient(embed):
        hidden, _ = model.forward(params | {"embed": embed}, UNTIED, tokens, positions, mask)
        return model.logits(params, UNTIED, hidden)[0].sum(axis=-1)  # [T]

    reaches = np.abs(gradient(params["embed"])).max(axis=-1)[:, row] > 0  # [T, T] place, token
    np.testing.assert_array_equal(reaches, np.tril(np.ones((len(row), len(row)), bool)))


def test_a_row_without_tokens_stays_finite_and_so_does_its_gradient():
    valid, positions = model.left_padded(jnp.asarray([0, 2], jnp.int32), 3)
    np.testing.assert_array_equal(valid, [[False] * 3, [False, True, True]])
    np.testing.assert_array_equal(positions, [[0, 0, 0], [0, 0, 1]])
    tokens = jnp.zeros((2, 3), jnp.int32)

    @jax.jit
    def loss(params):
        hidden, _ = model.forward(params, TIED, tokens, positions, model.causal_mask(valid))
        return model.logits(params, TIED, hidden).sum()

    value, gradient = jax.value_and_grad(loss)(make_params(TIED))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_causal_mask_by_hand():
    valid = jnp.asarray([[False, True, True]])
    np.testing.assert_array_equal(model.causal_mask(valid)[0], [[1, 0, 0], [0, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_prefill_and_cached_decoding_equal_the_full_forward_pass(config):
    params, space = make_params(config), 4
    rng = np.random.default_rng(3)
    prompt, _, mask = padded_rows()
    completion = rng.integers(0, VOCAB, (len(LENGTHS), space)).astype(np.int32)
    lengths = jnp.asarray(LENGTHS, jnp.int32)

    places = jnp.arange(WIDTH + space, dtype=jnp.int32)[None] - (WIDTH - lengths)[:, None]
    positions = jnp.maximum(places, 0)
    full = run(params, config, np.concatenate([prompt, completion], axis=1), positions, model.causal_mask(places >= 0))

    cache = model.init_cache(config, len(LENGTHS), WIDTH + space)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, space)))
    hidden, cache = forward(params, config, prompt, positions[:, :WIDTH], mask, cache)
    steps = [logits_of(params, config, hidden[:, -1:])]
    for t in range(space):
        now = WIDTH + t
        sees = ((places >= 0) & (jnp.arange(WIDTH + space) <= now)[None])[:, None]
        hidden, cache = forward(
            params,
            config,
            completion[:, t : t + 1],
            positions[:, now : now + 1],
            sees,
            cache,
            np.full(len(LENGTHS), now, np.int32),
        )
        steps.append(logits_of(params, config, hidden))
    np.testing.assert_allclose(np.concatenate(steps, axis=1), full[:, WIDTH - 1 :], rtol=1e-5, atol=1e-5)


def test_the_program_does_not_grow_with_depth():
    tokens, positions, mask = padded_rows()

    def size(num_layers):
        config = ModelConfig(num_layers=num_layers, width=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8)
        params = jax.eval_shape(partial(model.init_params, config, VOCAB, 0))
        assert params["layers"]["mlp"]["up"].shape == (num_layers, 8, 8)

        def loss(params):
            return model.logits(params, config, model.forward(params, config, tokens, positions, mask)[0]).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count(" = ")  # equations, the nested ones too

    assert size(2) == size(8) > 100


def test_bfloat16_computes_near_float32_and_keeps_what_it_is_told():
    half = ModelConfig(**{**vars(TIED), "compute_dtype": "bfloat16"})
    params = make_params(TIED)
    tokens, positions, mask = padded_rows()
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention promotes bfloat16 implicitly
        hidden, _ = forward(params, half, tokens, positions, mask)
    assert hidden.dtype == jnp.bfloat16
    got = logits_of(params, half, hidden)
    assert got.dtype == jnp.float32
    assert model.init_cache(half, 2, 3).k.dtype == jnp.bfloat16
    want = run(params, TIED, tokens, positions, mask)
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()
    stored = jax.eval_shape(
        partial(model.init_params, ModelConfig(**{**vars(TIED), "param_dtype": "bfloat16"}), VOCAB, 0)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}


def test_parameters_are_a_function_of_the_seed():
    one, same, other = (model.init_params(TIED, VOCAB, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    for name in ("q", "k", "v", "o"):
        weights = np.asarray(one["layers"]["attn"][name])
        assert not np.array_equal(weights, other["layers"]["attn"][name])
        assert not np.array_equal(weights[0], weights[1])  # layers differ


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
    ],
)
def test_shapes_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**wrong)
