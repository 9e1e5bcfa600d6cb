"""The transformer against one in float64 written with loops, and what must hold for any causal decoder with a cache."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from left_padding import causal_mask, left_padded

from cero_jax import model
from cero_jax.attention import Causal
from cero_jax.model import ModelConfig
from cero_jax.rope import RopeScaling

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TIED = ModelConfig(num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, rope_base=100.0)
UNTIED = ModelConfig(
    num_layers=2, width=16, num_heads=4, num_kv_heads=1, head_dim=4, mlp_width=24, norm_eps=1e-2, tied_embeddings=False
)
EVERYTHING = ModelConfig(  # all settings at once; no family has all of them
    num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=24, qkv_bias=True, qk_norm=True,
    post_norms=True, norm_offset=1.0, activation="gelu_tanh", scaled_embeddings=True, query_pre_attn_scalar=5.0,
    sliding_layers=(0, 2), sliding_window=3, sliding_rope_base=50.0, rope_base=100.0,
    rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 40),
)  # fmt: skip
VOCAB = 11
LENGTHS = (3, 7, 5)
WIDTH = 7

forward = jax.jit(model.forward, static_argnames="config")
logits_of = jax.jit(model.logits, static_argnames="config")


@cache
def make_params(config, seed=0):
    """Random parameters of which every one matters: norms are not 1, embeddings are not small."""
    rng = np.random.default_rng(seed)
    shapes = model.abstract_params(config, VOCAB)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.4, x.shape), x.dtype), shapes)


def padded_rows(seed=0):
    """(tokens, positions, mask) of rows of unequal length, padded on the left with arbitrary tokens."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (len(LENGTHS), WIDTH)).astype(np.int32)
    valid, positions = left_padded(jnp.asarray(LENGTHS, jnp.int32), WIDTH)
    return tokens, positions, causal_mask(valid)


def run(params, config, tokens, positions, mask):
    hidden, _ = forward(params, config, tokens, positions, mask)
    return np.asarray(logits_of(params, config, hidden))


def unpadded(tokens):
    """(tokens [1, T], positions, mask) of one row alone."""
    tokens = np.asarray(tokens, np.int32)[None]
    valid, positions = left_padded(jnp.asarray([tokens.shape[1]], jnp.int32), tokens.shape[1])
    return tokens, positions, causal_mask(valid)


def loop_transformer(params, config, tokens):
    """Logits [T, V] of one row in float64, computed one token, head and pair of values at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return np.array([row / math.sqrt((row**2).mean() + config.norm_eps) for row in x]) * (
            scale + config.norm_offset
        )

    def frequency(j, sliding):
        if sliding and config.sliding_rope_base is not None:
            return config.sliding_rope_base ** (-2 * j / config.head_dim)
        plain, scaling = config.rope_base ** (-2 * j / config.head_dim), config.rope_scaling
        if scaling is None:
            return plain
        wavelength = 2 * math.pi / plain  # three cases, as Meta's release has them
        longest = scaling.original_max_positions / scaling.low_freq_factor
        shortest = scaling.original_max_positions / scaling.high_freq_factor
        if wavelength < shortest:
            return plain
        if wavelength > longest:
            return plain / scaling.factor
        smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        return (1 - smooth) * plain / scaling.factor + smooth * plain

    def rotate(x, position, sliding):
        half, out = len(x) // 2, np.empty(len(x))
        for j in range(half):
            angle = position * frequency(j, sliding)
            out[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
            out[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
        return out

    def head_of(y, layer, name, head, sliding):
        z = y @ layer["attn"][name][:, head]
        z = z + layer["attn"][f"{name}_bias"][head] if config.qkv_bias else z
        if name == "v":
            return z
        z = norm(z, layer["attn"][f"{name}_norm"]) if config.qk_norm else z
        return np.array([rotate(row, t, sliding) for t, row in enumerate(z)])

    x = p["embed"][tokens] * (math.sqrt(config.width) if config.scaled_embeddings else 1)
    scalar = config.query_pre_attn_scalar or config.head_dim
    for n in range(config.num_layers):
        layer, sliding = jax.tree.map(lambda w, n=n: w[n], p["layers"]), n in config.sliding_layers
        y, attended = norm(x, layer["attn_norm"]), np.zeros_like(x)
        for head in range(config.num_heads):
            shared = head * config.num_kv_heads // config.num_heads
            q, k, v = (head_of(y, layer, name, h, sliding) for name, h in (("q", head), ("k", shared), ("v", shared)))
            for t in range(len(tokens)):
                first = max(0, t + 1 - config.sliding_window) if sliding else 0
                score = np.array([q[t] @ k[s] / math.sqrt(scalar) for s in range(first, t + 1)])
                weight = np.exp(score - score.max())
                attended[t] += (weight / weight.sum()) @ v[first : t + 1] @ layer["attn"]["o"][head]
        x = x + (norm(attended, layer["attn_post_norm"]) if config.post_norms else attended)
        y = norm(x, layer["mlp_norm"])
        gate = y @ layer["mlp"]["gate"]
        if config.activation == "silu":
            active = gate / (1 + np.exp(-gate))
        else:
            active = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        out = (active * (y @ layer["mlp"]["up"])) @ layer["mlp"]["down"]
        x = x + (norm(out, layer["mlp_post_norm"]) if config.post_norms else out)
    return norm(x, p["final_norm"]) @ (p["embed"].T if config.tied_embeddings else p["unembed"])


@pytest.mark.parametrize("config", [TIED, UNTIED, EVERYTHING], ids=["tied", "untied", "everything"])
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
    """The row's tokens are distinct and the output has a table of its own, so that the gradient of a token's embedding
    is that of its place.
    """
    params = make_params(UNTIED)
    row = [4, 9, 0, 7, 2, 5]
    tokens, positions, mask = unpadded(row)

    @jax.jit
    @jax.jacrev
    def gradient(embed):
        hidden, _ = model.forward(params | {"embed": embed}, UNTIED, tokens, positions, mask)
        return model.logits(params, UNTIED, hidden)[0].sum(axis=-1)  # [T]

    reaches = (
        np.abs(gradient(params["embed"])).max(axis=-1)[:, row] > 0
    )  # [T, T] place of the logits, place of the token
    np.testing.assert_array_equal(reaches, np.tril(np.ones((len(row), len(row)), bool)))


def test_a_row_without_tokens_stays_finite_and_so_does_its_gradient():
    valid, positions = left_padded(jnp.asarray([0, 2], jnp.int32), 3)
    np.testing.assert_array_equal(valid, [[False] * 3, [False, True, True]])
    np.testing.assert_array_equal(positions, [[0, 0, 0], [0, 0, 1]])
    tokens = jnp.zeros((2, 3), jnp.int32)

    @jax.jit
    def loss(params):
        hidden, _ = model.forward(params, TIED, tokens, positions, causal_mask(valid))
        return model.logits(params, TIED, hidden).sum()

    value, gradient = jax.value_and_grad(loss)(make_params(TIED))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_causal_mask_by_hand():
    valid = jnp.asarray([[False, True, True]])
    np.testing.assert_array_equal(causal_mask(valid)[0], [[1, 0, 0], [0, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize("config", [TIED, UNTIED, EVERYTHING], ids=["tied", "untied", "everything"])
def test_prefill_and_cached_decoding_equal_one_forward_over_the_whole_text(config):
    params, space = make_params(config), 4
    rng = np.random.default_rng(3)
    prompt, _, mask = padded_rows()
    completion = rng.integers(0, VOCAB, (len(LENGTHS), space)).astype(np.int32)
    lengths = jnp.asarray(LENGTHS, jnp.int32)

    places = jnp.arange(WIDTH + space, dtype=jnp.int32)[None] - (WIDTH - lengths)[:, None]
    positions = jnp.maximum(places, 0)
    full = run(params, config, np.concatenate([prompt, completion], axis=1), positions, causal_mask(places >= 0))

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


@pytest.mark.parametrize("config", [UNTIED, EVERYTHING], ids=["untied", "everything"])
def test_causal_is_the_mask_that_it_stands_for_also_behind_a_cache(config):
    """Padding behind the tokens; what is read into the cache and seen is then what a decoding step sees there."""
    params, lengths = make_params(config), jnp.asarray(LENGTHS, jnp.int32)
    tokens, positions = padded_rows()[0], jnp.broadcast_to(jnp.arange(WIDTH, dtype=jnp.int32), (len(LENGTHS), WIDTH))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((WIDTH, WIDTH), bool)), (len(LENGTHS), WIDTH, WIDTH))
    want = forward(params, config, tokens, positions, mask, model.init_cache(config, len(LENGTHS), WIDTH))
    got = forward(params, config, tokens, positions, Causal(lengths), model.init_cache(config, len(LENGTHS), WIDTH))
    alone, _ = forward(params, config, tokens, positions, Causal(lengths))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(alone, got[0])


def test_keep_last_by_hand():
    mask = jnp.asarray([[[0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]], bool)
    want = [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(model._keep_last(mask, 2)[0], want)


def test_cast_leaves_norm_scales_and_does_not_change_the_result():
    half = ModelConfig(**{**vars(EVERYTHING), "compute_dtype": "bfloat16"})
    params = make_params(EVERYTHING)
    cast = model.cast(params, half.compute_dtype)
    norms = [path for path, leaf in jax.tree_util.tree_leaves_with_path(cast) if leaf.dtype == jnp.float32]
    names = {path[-1].key for path in norms}
    assert names == {"attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "q_norm", "k_norm", "final_norm"}
    tokens, positions, mask = padded_rows()
    with jax.numpy_dtype_promotion("standard"):
        got, want = (forward(p, half, tokens, positions, mask)[0] for p in (cast, params))
    np.testing.assert_array_equal(got, want)


def test_the_program_does_not_grow_with_depth():
    tokens, positions, mask = padded_rows()

    def size(num_layers):
        config = ModelConfig(num_layers=num_layers, width=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8)
        params = model.abstract_params(config, VOCAB)
        assert params["layers"]["mlp"]["up"].shape == (num_layers, 8, 8)

        def loss(params):
            return model.logits(params, config, model.forward(params, config, tokens, positions, mask)[0]).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count(" = ")  # equations, nested ones included

    assert size(2) == size(8) > 100


def test_bfloat16_gives_nearly_what_float32_gives_and_dtypes_are_as_set():
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
    stored = model.abstract_params(ModelConfig(**{**vars(TIED), "param_dtype": "bfloat16"}), VOCAB)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}


def test_parameters_are_reproducible_from_the_seed_and_have_their_abstract_shapes():
    one, same, other = (model.init_params(TIED, VOCAB, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), one) == model.abstract_params(TIED, VOCAB)
    for name in ("q", "k", "v", "o"):
        weights = np.asarray(one["layers"]["attn"][name])
        assert not np.array_equal(weights, other["layers"]["attn"][name])
        assert not np.array_equal(weights[0], weights[1])  # layers differ


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"sliding_layers": (2,)}, r"sliding_layers=\(2,\) must lie in 0..num_layers-1=1"),
        ({"sliding_window": 0}, "sliding_window=0 be at least 1"),
    ],
)
def test_impossible_shapes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**wrong)
