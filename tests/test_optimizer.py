"""Updates in few bits, against float64 and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from test_learner import CONFIG, PLAIN, VOCAB, one_device, params

from cero_jax import lora, model, sharding
from cero_jax.learner import make_optimizer
from cero_jax.optimizer import adam, decays, make_stepper, moved, rounded_at_random

rounded = jax.jit(rounded_at_random, static_argnames="dtype")


def neighbours(exact, dtype):
    """The two numbers of a dtype around each of `exact` [n] float64, by searching all 2^16."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    every = every.astype(np.float32).astype(np.float64)
    every = every[np.isfinite(every)]
    every = np.unique(every)
    above = np.searchsorted(every, exact)
    return every[above - 1], every[above]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_a_number_becomes_one_of_its_two_neighbours_and_is_right_on_average(dtype):
    rng = np.random.default_rng(0)
    exact = (rng.choice([-1, 1], 300) * 10.0 ** rng.uniform(-4, 4, 300)).astype(np.float32)
    low, high = neighbours(exact.astype(np.float64), dtype)
    draws = 4000
    many = np.broadcast_to(exact, (draws, 300))
    found = np.asarray(rounded(many, jax.random.key(0), dtype=np.dtype(dtype))).astype(np.float64)
    assert np.all((found == low) | (found == high))
    share = (exact - low) / (high - low)
    error = np.sqrt(np.maximum(share * (1 - share), 1e-12) / draws)
    z = ((found == high).mean(axis=0) - share) / error
    assert np.abs(z).max() < 4.5  # of 300; a wrong share of 5 % would be off by 6 and more
    assert abs(z.mean()) < 4 / np.sqrt(300)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_what_needs_no_rounding_stays(dtype):
    kept = np.float32([0, -0.0, 1, -1.5, 2**-14, np.inf, -np.inf, np.nan])
    for seed in range(20):
        found = rounded(kept, jax.random.key(seed), dtype=np.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(found).astype(np.float32), kept)


def test_matrices_and_adapters_decay_and_nothing_else():
    """Every parameter that any family or LoRA has; by hand."""
    every = dict.fromkeys(("qkv_bias", "qk_norm", "post_norms"), True) | {"tied_embeddings": False}
    shape = dataclasses.replace(CONFIG, **every)
    found = flatten_dict(decays(model.abstract_params(shape, VOCAB)))
    decayed = {"/".join(path) for path, yes in found.items() if yes}
    attention, mlp = {f"layers/attn/{x}" for x in "qkvo"}, {f"layers/mlp/{x}" for x in ("gate", "up", "down")}
    assert decayed == {"unembed"} | attention | mlp
    assert {path[-1] for path in found} >= {"embed", "final_norm", "q_bias", "k_norm", "mlp_post_norm"}
    adapters = lora.split(model.abstract_params(dataclasses.replace(CONFIG, lora_rank=2), VOCAB))[1]
    assert all(jax.tree.leaves(decays(adapters)))


def test_weight_decay_is_adamws_on_what_decays():
    """Against optax's own AdamW, whose rate is inside: on a matrix, a norm and an embedding."""
    rng = np.random.default_rng(3)
    start = {name: jnp.asarray(rng.normal(size=5), jnp.float32) for name in ("q", "final_norm", "embed")}
    grads = {name: jnp.asarray(rng.normal(size=5) * 1e-3, jnp.float32) for name in start}
    ours, rate = adam(0.9, 0.99, 1e-8, 0.1, 1.0), 1e-2
    theirs = optax.adamw(rate, 0.9, 0.99, 1e-8, weight_decay=0.1, mask={"q": True, "final_norm": False, "embed": False})
    updates, expected = (jax.jit(each.update)(grads, each.init(start), start)[0] for each in (ours, theirs))
    for name in start:
        np.testing.assert_allclose(-rate * updates[name], expected[name], rtol=1e-6)


step_by = jax.jit(moved)


def test_small_updates_add_up_in_bfloat16_and_a_resumed_run_rounds_alike():
    """A rate of 1e-6, as large models are trained with: to the nearest, no parameter near 1 would ever move."""
    rng = np.random.default_rng(1)
    start = dict.fromkeys("ab", jnp.asarray(rng.uniform(0.5, 1.9, 20_000), "bfloat16"))
    updates = {name: jnp.ones(20_000, jnp.float32) for name in "ab"}
    nearest = jax.tree.map(lambda p, u: p - (1e-6 * u).astype(p.dtype), start, updates)
    assert all(map(np.array_equal, nearest.values(), start.values()))
    now, halfway = start, None
    for step in range(200):
        halfway = now if step == 100 else halfway
        now = step_by(now, updates, np.float32(1e-6), np.int32(step))
    way = np.concatenate([np.asarray(start[n], np.float64) - np.asarray(now[n], np.float64) for n in "ab"])
    # 200 steps of 1e-6; each is a jump of 2^-8 or 2^-7 with a chance of 1e-6 over that
    error = np.sqrt(200 * 1e-6 * 2**-7 / len(way))
    assert abs(way.mean() - 200e-6) < 4 * error
    assert 0 < error < 0.05 * 200e-6
    assert not np.array_equal(now["a"] - start["a"], now["b"] - start["b"])  # each parameter has bits of its own
    for step in range(100, 200):
        halfway = step_by(halfway, updates, np.float32(1e-6), np.int32(step))
    jax.tree.map(np.testing.assert_array_equal, halfway, now)


def test_rounding_is_the_same_on_every_mesh():
    rng = np.random.default_rng(2)
    start = {"embed": jnp.asarray(rng.normal(size=(16, 8)), "bfloat16")}
    updates = {"embed": jnp.asarray(rng.normal(size=(16, 8)), "float32")}
    alone = step_by(start, updates, np.float32(1e-3), np.int32(5))
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    where = sharding.shard_params(start, mesh)
    spread = jax.jit(moved, out_shardings=where)(*jax.device_put((start, updates), (where, where)), 1e-3, np.int32(5))
    np.testing.assert_array_equal(spread["embed"], alone["embed"])


def test_a_bfloat16_model_is_fitted_where_rounding_to_the_nearest_would_stand_still():
    """Adam towards given parameters, at a rate below half the gap of all of them."""
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    stepper = make_stepper(config, VOCAB, make_optimizer(PLAIN), one_device())
    start = jax.tree.map(lambda p: (p + jnp.sign(p)).astype("bfloat16"), params())  # all above 1 in size
    goal = jax.tree.map(lambda p: p.astype(jnp.float32) + 0.03, start)

    @jax.jit
    def fit(params):
        def one(_, state):
            grads = jax.tree.map(lambda p, g: p.astype(jnp.float32) - g, state.params, goal)
            return stepper.apply(state, grads, jnp.float32(2e-4))

        return jax.lax.fori_loop(0, 300, one, stepper.init(params)).params

    end = fit(start)
    assert end["embed"].dtype == "bfloat16"
    off = np.concatenate(
        [np.ravel(p.astype(jnp.float32) - g) for p, g in zip(*map(jax.tree.leaves, (end, goal)), strict=True)]
    )
    assert abs(off.mean()) < 0.002  # it began at 0.03
    assert off.std() < 0.01  # the gaps are 2^-7 and 2^-6: the price
