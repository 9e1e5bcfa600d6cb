"""The table of rules, the mesh, and that eight devices compute what one does."""

import inspect
from functools import cache

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from left_padding import causal_mask, left_padded, to_the_right

import cero_jax
from cero_jax import model, sharding
from cero_jax.learner import Batch, Fixed, LearnerConfig, make_learner
from cero_jax.microbatches import Shape
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig, SamplingBatch, make_sampler, row_keys
from cero_jax.sharding import MeshConfig

pytestmark = pytest.mark.usefixtures("one_length")

CONFIG = ModelConfig(num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=16)
VOCAB, ROWS, PROMPTS, WIDTH, LIMIT = 12, 8, 4, 4, 6
B1 = 0.9
LEARNER = LearnerConfig(
    rows_per_step=ROWS, rows_per_microbatch=ROWS, max_grad_norm=1e9, adam_b1=B1, logit_chunk_tokens=2
)
MESHES = {
    "data 8": MeshConfig(data=8),
    "data 2 x fsdp 4": MeshConfig(data=2, fsdp=4),
    "data 2 x fsdp 2 x tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}
every_mesh = pytest.mark.parametrize("mesh_config", MESHES.values(), ids=MESHES.keys())


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def shapes(config):
    return model.abstract_params(config, VOCAB)


def paths(tree, prefix=""):
    """Paths of a nested dict's leaves, joined by slashes."""
    for name, value in tree.items():
        yield from paths(value, f"{prefix}{name}/") if isinstance(value, dict) else [f"{prefix}{name}"]


# --- the table and the mesh ---


def test_every_parameter_has_a_rule_and_every_rule_a_parameter():
    tied = shapes(CONFIG)
    untied = shapes(ModelConfig(tied_embeddings=False, qkv_bias=True, qk_norm=True, post_norms=True, lora_rank=2))
    assert set(paths(tied)) | set(paths(untied)) == set(sharding.RULES)
    for params in (tied, untied):
        layout = sharding.shard_params(params, one_device())
        for leaf, each in zip(jax.tree.leaves(params), jax.tree.leaves(layout), strict=True):
            assert len(each.spec) <= len(leaf.shape)


def test_a_parameter_without_a_rule_is_named():
    params = shapes(CONFIG)
    params["layers"]["attn"]["gain"] = jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"layers/attn/gain \(2, 4, 4\) has no rule in sharding\.RULES"):
        sharding.shard_params(params, one_device())


def test_a_parameter_that_cannot_be_split_evenly_is_named_with_the_mesh():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    with pytest.raises(
        ValueError, match=r"embed \(12, 16\) does not divide evenly over the mesh.*'tensor': 8.*smaller mesh.fsdp or"
    ):
        sharding.shard_params(shapes(CONFIG), mesh)


@pytest.mark.parametrize(
    ("config", "num_devices", "shape"),
    [
        (MeshConfig(), 1, (1, 1, 1)),
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), 8, (2, 2, 2)),
        (MeshConfig(data=2, fsdp=3), 6, (2, 3, 1)),
    ],
)
def test_the_mesh_covers_the_devices(config, num_devices, shape):
    mesh = sharding.make_mesh(config, jax.devices()[:num_devices])
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert sharding.row_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(data=4), MeshConfig(data=0), MeshConfig(tensor=16),
        MeshConfig(fsdp=0), MeshConfig(fsdp=-2, tensor=-2),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_cover_the_devices_is_refused(config):
    with pytest.raises(ValueError, match=f"data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} does not"):
        sharding.make_mesh(config)


def test_the_copy_for_sampling_is_split_over_tensor_alone():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = sharding.shard_copy(shapes(CONFIG), mesh)
    for path, each in zip(paths(layout), jax.tree.leaves(layout), strict=True):
        assert each.spec == P(*(None if axis == "fsdp" else axis for axis in sharding.RULES[path])), path
    assert layout["layers"]["mlp"]["down"].spec == P(None, "tensor", None)


# --- eight devices do what one does ---


@cache
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(x.dtype), shapes(CONFIG))


@cache
def sampling_batch():
    rng = np.random.default_rng(0)
    prompt_of_row = np.repeat(np.arange(PROMPTS, dtype=np.int32), ROWS // PROMPTS)
    return SamplingBatch(
        prompt_tokens=rng.integers(0, VOCAB, (PROMPTS, WIDTH)).astype(np.int32),
        prompt_lengths=np.array([4, 1, 2, 3], np.int32),
        prompt_of_row=prompt_of_row,
        row_mask=np.arange(ROWS) < ROWS - 1,
        prompt_ids=prompt_of_row,
        rollout_index=np.tile(np.arange(ROWS // PROMPTS, dtype=np.int32), PROMPTS),
    )


def draw_on(mesh):
    sample = make_sampler(CONFIG, SamplerConfig(LIMIT), (1,), 0, mesh)
    layout = sharding.shard_params(shapes(CONFIG), mesh)
    return sample(jax.device_put(params(), layout), np.uint32(0), np.uint32(0), sampling_batch())


@cache
def rollouts():
    """What one device draws; the step on every mesh learns from these."""
    return jax.device_get(draw_on(one_device()))


@cache
def batch():
    """Groups of 3 and 4, and a padding row."""
    given = sampling_batch()
    return Batch(
        prompt_tokens=given.prompt_tokens[given.prompt_of_row],
        prompt_lengths=given.prompt_lengths[given.prompt_of_row],
        tokens=rollouts().tokens,
        lengths=rollouts().lengths,
        log_probs=rollouts().log_probs,
        reward=np.array([1, 0, 0, 0, 1, 1, 0, 0], np.float32),
        group_ids=np.array([0, 0, 0, 1, 1, 1, 1, 0], np.int32),
        row_mask=given.row_mask,
        row_weight=np.ones(ROWS, np.float32),
    )


def step_on(mesh):
    """(loss, gradient, state) of one step. Adam's first moment is then (1 - b1) times the gradient."""
    learner = make_learner(CONFIG, VOCAB, LEARNER, 1.0, mesh)
    state = learner.init(jax.device_put(params(), learner.shardings.params))
    live = batch().row_mask  # both groups have two different rewards
    advantages = learner.advantages(batch())
    state, metrics = learner.step(state, Fixed({}, None), batch(), advantages, np.float32(1e-3), live)
    gradient = jax.tree.map(lambda m: np.asarray(m) / (1 - B1), optax.tree.get(state.opt_state, "mu"))
    return float(metrics["loss"]), gradient, state


@cache
def step_of_one_device():
    return step_on(one_device())


@every_mesh
def test_a_step_is_that_of_one_device_and_keeps_its_sharding(mesh_config):
    mesh = sharding.make_mesh(mesh_config)
    want_loss, want, _ = step_of_one_device()
    loss, gradient, state = step_on(mesh)
    assert loss == pytest.approx(want_loss, rel=1e-5, abs=1e-7)
    for path, got, exact in zip(paths(want), jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(exact) > 0, path
        assert np.linalg.norm(got - exact) <= 1e-5 * np.linalg.norm(exact), path
    for tree in (state.params, optax.tree.get(state.opt_state, "mu")):
        query = tree["layers"]["attn"]["q"]
        assert query.sharding.spec == P(None, "fsdp", "tensor", None)
        assert query.addressable_shards[0].data.shape == (2, 16 // mesh.shape["fsdp"], 4 // mesh.shape["tensor"], 4)


@cache
def close_calls():
    """[R, T] bool: places where another rounding may draw another token.

    There the uniform number of the draw lies within 1e-4 of the border between two tokens, both computed anew: the
    borders by a forward over the whole text, the number from the row's key.
    """
    given, tokens = sampling_batch(), rollouts().tokens
    lengths = batch().prompt_lengths + LIMIT
    prompts = to_the_right(batch().prompt_tokens, batch().prompt_lengths)
    texts = np.concatenate([prompts, tokens], axis=1)
    keys = row_keys(jnp.uint32(0), jnp.zeros(ROWS, jnp.uint32), given.prompt_ids, given.rollout_index)

    @jax.jit
    def chances(params, texts, lengths, keys):
        valid, positions = left_padded(lengths, WIDTH + LIMIT)
        hidden, _ = model.forward(params, CONFIG, texts, positions, causal_mask(valid))
        logits = model.logits(params, CONFIG, hidden)[:, WIDTH - 1 : -1]
        folded = jax.vmap(lambda key: jax.vmap(lambda t: jax.random.fold_in(key, t))(jnp.arange(LIMIT)))(keys)
        return jax.nn.softmax(logits, axis=-1), jax.vmap(jax.vmap(jax.random.uniform))(folded)

    chance, uniform = map(np.float64, chances(jax.tree.map(jnp.asarray, params()), texts, lengths, keys))
    ends = np.cumsum(chance, axis=-1)
    clear = drawn() & (np.abs(ends - uniform[..., None]).min(axis=-1) > 1e-4)
    np.testing.assert_array_equal((ends < uniform[..., None]).sum(axis=-1)[clear], tokens[clear])
    assert clear.sum() > ROWS
    return ~clear


def drawn():
    return np.arange(LIMIT)[None] < rollouts().lengths[:, None]


@every_mesh
def test_draws_are_those_of_one_device(mesh_config):
    """A token may differ at a close call only; the tokens after it then differ, too."""
    tokens = rollouts().tokens
    got = jax.device_get(draw_on(sharding.make_mesh(mesh_config)))
    agree = np.cumprod((got.tokens == tokens) | ~drawn(), axis=1).astype(bool)
    first_difference = ~agree & np.pad(agree, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    assert close_calls()[first_difference].all()
    whole = agree.all(axis=1)
    assert whole.sum() > ROWS // 2
    np.testing.assert_array_equal(got.lengths[whole], rollouts().lengths[whole])
    np.testing.assert_allclose(got.log_probs[whole], rollouts().log_probs[whole], atol=1e-5)


def allocate_on(mesh):
    """[4, N] rollouts that cero allocates in four epochs."""
    allocator, everywhere = cero_jax.cero(total_budget=2000, num_epochs=10, max_group=16), sharding.replicated(mesh)
    allocate = jax.jit(allocator.allocate, out_shardings=everywhere)
    update = jax.jit(allocator.update, out_shardings=everywhere)
    state, rng, epochs = jax.device_put(allocator.init(100, 0), everywhere), np.random.default_rng(0), []
    for _ in range(4):
        num_rollouts, state = allocate(state)
        assert num_rollouts.sharding.is_fully_replicated
        counts = np.asarray(num_rollouts)
        state = update(state, counts, rng.binomial(counts, np.linspace(0, 1, 100)).astype(np.int32))
        epochs.append(counts)
    return np.stack(epochs)


@cache
def allocations_of_one_device():
    return allocate_on(one_device())


@every_mesh
def test_an_allocation_is_that_of_one_device(mesh_config):
    """The same integers in every epoch: hosts that differed by one rollout would draw different rows from then on."""
    assert allocations_of_one_device().sum() == 800
    np.testing.assert_array_equal(allocate_on(sharding.make_mesh(mesh_config)), allocations_of_one_device())


# --- what devices send each other ---


def parts_of(function):
    """The jitted functions that a sampler or a learner's step calls, itself or through plain functions of its own."""
    parts = dict(inspect.getclosurevars(function).nonlocals)
    for inner in [each for each in parts.values() if inspect.isfunction(each) and not hasattr(each, "lower")]:
        parts |= inspect.getclosurevars(inner).nonlocals
    return parts


def exchanged(compiled):
    return hlo.collectives(hlo.instructions(compiled.as_text()))


def shaped(mesh, layout=sharding.shard_params):
    """The parameters' shapes, laid out over the mesh."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes(CONFIG), layout(shapes(CONFIG), mesh),
    )  # fmt: skip


def add_on(mesh):
    """A micro-batch of the learner, compiled."""
    learner = make_learner(CONFIG, VOCAB, LEARNER, 1.0, mesh)
    params, add = shaped(mesh), parts_of(learner.step)["add"]
    summed = parts_of(learner.step)["nothing"].lower(params).out_info
    given = jax.device_put(batch(), sharding.rows(mesh))
    advantages = learner.advantages(given)
    rows = np.arange(ROWS, dtype=np.int32), np.ones(ROWS, bool)
    return add.lower(
        summed, params, Fixed({}, None), given, advantages, *rows, shape=Shape(WIDTH + LIMIT, LIMIT)
    ).compile()


def test_a_microbatch_adds_up_gradients_and_no_activations():
    length = WIDTH + LIMIT - 1  # tokens of a row, a size that no parameter has
    found = exchanged(add_on(sharding.make_mesh(MESHES["data 2 x fsdp 4"])))
    assert {each.kind for each in found if any(length in shape for shape in each.shapes)} <= {
        "all-to-all",
        "all-gather",
    }
    of_layers = [each for each in found if each.kind == "all-gather" and each.times >= CONFIG.num_layers]
    assert of_layers  # parameters, a layer's at a time
    unembedding = [each for each in found if any(VOCAB in shape for shape in each.shapes)]
    assert {each.times for each in unembedding} == {1}  # not once for each of the three chunks of logits


def decode_on(mesh):
    """A window of decoding and the reading of the prompts, compiled."""
    parts = parts_of(make_sampler(CONFIG, SamplerConfig(LIMIT), (1,), 0, mesh))
    weights, slots = shaped(mesh, sharding.shard_copy), parts["empty"].lower(ROWS, WIDTH + LIMIT).out_info
    texts = {"tokens": np.zeros((ROWS, WIDTH), np.int32), "lengths": np.ones(ROWS, np.int32)}
    return parts["run_window"].lower(slots, weights).compile(), parts["read"].lower(weights, **texts).compile()


def test_decoding_and_prefill_send_nothing_where_only_rows_are_split():
    for program in decode_on(sharding.make_mesh(MESHES["data 2 x fsdp 4"])):
        assert exchanged(program) == []


def test_decoding_over_split_heads_sends_hidden_states_and_gathers_nothing():
    mesh = sharding.make_mesh(MESHES["data 2 x fsdp 2 x tensor 2"])
    found = exchanged(decode_on(mesh)[0])
    assert {each.kind for each in found} <= {"all-reduce", "collective-permute"}
    a_few = 4  # numbers a row, of the vocabulary's parts
    assert max(each.bytes for each in found) <= ROWS // sharding.row_shards(mesh) * (CONFIG.width + a_few) * 4
