"""One token a row: drawn with the frequencies of softmax, from what top-k and top-p leave."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cero_jax import sharding
from cero_jax.next_token import draw, keep_likely

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 7),
        ({"temperature": 0.6}, 7),
        ({"temperature": 1.7, "top_k": 3}, 3),
        # at temperature 1 the four likeliest have 0.42, 0.25, 0.15, 0.09: three are short of 0.85
        ({"top_p": 0.85}, 4),
        ({"top_k": 3, "top_p": 0.6}, 2),  # of the three that are left 0.51, 0.31, 0.19
    ],
)
def test_frequencies_are_those_of_softmax(settings, kept):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    num_draws = 20_000
    keys = jax.random.split(jax.random.key(0), num_draws)
    token, log_prob = jax.jit(partial(draw, **settings))(jnp.tile(LOGITS, (num_draws, 1)), keys)
    scaled = LOGITS.astype(np.float64) / settings["temperature"]
    counts, chance = np.bincount(token, minlength=len(LOGITS)), np.exp(log_softmax(scaled))
    assert (counts[kept:] == 0).all()
    expected = chance[:kept] / chance[:kept].sum() * num_draws
    assert stats.chisquare(counts[:kept], expected).pvalue > 1e-3
    # of the full vocabulary at the temperature, whatever was drawn from
    np.testing.assert_allclose(log_prob, np.log(chance)[np.asarray(token)], rtol=1e-5)


def sorted_keep(logits, top_k, top_p):
    """[V] bool by sorting: a token stays where it ties with the last that must."""
    keep, descending = np.ones(len(logits), bool), np.sort(logits)[::-1]
    if top_k:
        keep = logits >= descending[min(top_k, len(logits)) - 1]
    if top_p < 1:
        descending = np.sort(logits[keep])[::-1]
        mass = np.cumsum(np.exp(log_softmax(descending)))
        keep &= logits >= descending[np.flatnonzero(mass >= top_p)[0]]
    return keep


@pytest.mark.parametrize("top_k", [0, 1, 3, 9, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_top_k_and_top_p_equal_a_sort(top_k, top_p):
    rng = np.random.default_rng(0)
    spread = rng.normal(0, 2, (100, 9))
    logits = np.concatenate([spread, spread.round()]).astype(np.float32)  # the second half is full of ties
    got = np.asarray(keep_likely(jnp.asarray(logits), top_k, top_p))
    for row, kept in zip(logits, got, strict=True):
        keep = sorted_keep(row.astype(np.float64), top_k, top_p)
        np.testing.assert_array_equal(kept, np.where(keep, row, -np.inf))


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_vocabulary_split_over_devices_is_drawn_from_as_a_whole_one(tensor, temperature):
    """By the inverse of the cumulative distribution in float64; pieces of several blocks, and some without any mass."""
    rows, size = 64, 4 * 700
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (rows, size)).astype(np.float32)
    logits[::4, :1000] = logits[1::4, 600:] = -np.inf
    keys = jax.random.split(jax.random.key(1), rows)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=tensor))
    of_mesh = jax.jit(sharding.on(mesh, partial(draw, temperature=temperature, top_k=0, top_p=1.0)))
    token, log_prob = map(np.asarray, of_mesh(jax.device_put(logits, sharding.rows(mesh)), keys))

    scaled = logits.astype(np.float64) / (temperature or 1.0)
    chance = np.exp(log_softmax(scaled))
    if temperature:
        uniform = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, ()))(keys), np.float64)
        ends = np.cumsum(chance, axis=-1)
        clear = np.abs(ends - uniform[:, None]).min(axis=-1) > 1e-5  # elsewhere float32 may draw the next token
        assert clear.sum() > rows // 2
        np.testing.assert_array_equal(token[clear], (ends < uniform[:, None]).sum(axis=-1)[clear])
    else:
        np.testing.assert_array_equal(token, np.argmax(logits, axis=-1))
    np.testing.assert_allclose(log_prob, np.log(chance[np.arange(rows), token]), rtol=1e-4, atol=1e-5)
