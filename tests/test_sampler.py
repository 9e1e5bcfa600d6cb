"""Drawing: what full forward passes and softmax say, whatever the slot and the neighbours."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from left_padding import causal_mask, left_padded, to_the_right

from cero_jax import model, prefill, sharding
from cero_jax import sampler as sampling
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig, SamplingBatch, make_sampler, row_keys
from cero_jax.slots import cache_sizes, number_of_slots

pytestmark = pytest.mark.usefixtures("strict_dtypes")

CONFIG = ModelConfig(
    num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16, tied_embeddings=False
)
VOCAB, PAD, EOS = 9, 0, (1, 5)
PROMPTS, ROWS, WIDTH, LIMIT = 3, 8, 4, 6
SEED, STEP = np.uint32(7), np.uint32(3)


@cache
def params(seed=0):
    """Wide enough for draws that hang on the tokens before them, and differ from prompt to prompt."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init_params(CONFIG, VOCAB, 0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)


@cache
def sampler(temperature=0.7, eos_ids=EOS, limit=LIMIT, devices=1, **settings):
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:devices])
    return make_sampler(CONFIG, SamplerConfig(limit, temperature, **settings), eos_ids, PAD, mesh)


def make_batch(seed=0):
    """Prompts of 1, 4 and 2 tokens; rows of all three, the last a padding row."""
    rng = np.random.default_rng(seed)
    prompt_of_row, lengths = np.array([0, 1, 2, 1, 0, 1, 2, 0], np.int32), np.array([1, 4, 2], np.int32)
    tokens = rng.integers(0, VOCAB, (PROMPTS, WIDTH)).astype(np.int32)
    return SamplingBatch(
        prompt_tokens=np.stack([np.roll(row, n) for row, n in zip(tokens, lengths, strict=True)]),  # noise behind them
        prompt_lengths=lengths,
        prompt_of_row=prompt_of_row,
        row_mask=np.arange(ROWS) < ROWS - 1,
        prompt_ids=prompt_of_row + 10,
        rollout_index=np.array([0, 0, 0, 1, 1, 2, 1, 0], np.int32),
    )


@jax.jit
def _full_logits(params, tokens, lengths):
    valid, positions = left_padded(lengths, tokens.shape[1])
    hidden, _ = model.forward(params, CONFIG, tokens, positions, causal_mask(valid))
    return model.logits(params, CONFIG, hidden)


def full_logits(params, batch, rollouts):
    """[R, T, V] float64 of one forward pass over prompt and completion: what each token was drawn from."""
    prompt = to_the_right(batch.prompt_tokens, batch.prompt_lengths)[batch.prompt_of_row]
    tokens = np.concatenate([prompt, np.asarray(rollouts.tokens)], axis=1)
    lengths = batch.prompt_lengths[batch.prompt_of_row] + rollouts.tokens.shape[1]
    out = _full_logits(params, tokens, lengths)[:, prompt.shape[1] - 1 : -1]
    return np.asarray(out, np.float64)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def drawn(rollouts):
    """[R, T] which places hold a token that was drawn."""
    return np.arange(rollouts.tokens.shape[1])[None] < np.asarray(rollouts.lengths)[:, None]


def test_greedy_is_the_argmax_of_full_forward_passes():
    batch = make_batch()
    rollouts = sampler(temperature=0.0)(params(), SEED, STEP, batch)
    full, mask = full_logits(params(), batch, rollouts), drawn(rollouts)
    assert mask.sum() > ROWS  # completions of several tokens
    np.testing.assert_array_equal(np.asarray(rollouts.tokens)[mask], full.argmax(axis=-1)[mask])
    log_probs = np.take_along_axis(log_softmax(full), np.asarray(rollouts.tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.asarray(rollouts.log_probs)[mask], log_probs[mask], rtol=1e-4, atol=1e-5)


def test_log_probs_are_those_of_a_full_forward_pass_at_the_temperature():
    batch = make_batch()
    rollouts = sampler()(params(), SEED, STEP, batch)
    full, mask = full_logits(params(), batch, rollouts) / 0.7, drawn(rollouts)
    log_probs = np.take_along_axis(log_softmax(full), np.asarray(rollouts.tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.asarray(rollouts.log_probs)[mask], log_probs[mask], rtol=1e-4, atol=1e-5)


def test_a_completion_ends_at_any_eos_with_nothing_behind_it():
    ended_by, cut = set(), 0
    for step in range(8):
        rollouts = jax.device_get(sampler()(params(), SEED, np.uint32(step), make_batch(step)))
        for row in range(ROWS - 1):
            tokens, length = rollouts.tokens[row], rollouts.lengths[row]
            ends = np.flatnonzero(np.isin(tokens, EOS))
            assert length == (ends[0] + 1 if len(ends) else LIMIT)  # the eos counts
            assert rollouts.truncated[row] == (len(ends) == 0)
            assert (tokens[length:] == PAD).all()
            assert (rollouts.log_probs[row, length:] == 0).all()
            assert (rollouts.log_probs[row, :length] < 0).all()
            ended_by |= {int(tokens[ends[0]])} if len(ends) else set()
            cut += len(ends) == 0
        # the padding row
        assert (rollouts.tokens[-1] == PAD).all()
        assert (rollouts.log_probs[-1] == 0).all()
        assert (rollouts.lengths[-1], rollouts.truncated[-1]) == (0, False)
    assert ended_by == set(EOS)
    assert cut > 0


def permuted(batch, order):
    rows = ("prompt_of_row", "row_mask", "prompt_ids", "rollout_index")
    return batch._replace(**{name: getattr(batch, name)[order] for name in rows})


def test_tokens_are_bit_equal_in_any_slot():
    batch = make_batch()
    want = sampler()(params(), SEED, STEP, batch)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(ROWS)
        got = sampler()(params(), SEED, STEP, permuted(batch, order))
        np.testing.assert_array_equal(got.tokens, np.asarray(want.tokens)[order])
        np.testing.assert_array_equal(got.lengths, np.asarray(want.lengths)[order])
        np.testing.assert_allclose(got.log_probs, np.asarray(want.log_probs)[order], atol=1e-6)


def test_tokens_do_not_depend_on_the_neighbours():
    batch, other = make_batch(), make_batch(seed=1)
    want = sampler()(params(), SEED, STEP, batch)
    kept = batch.prompt_of_row == 1
    neighbours = np.array([True, False, True])
    changed = batch._replace(
        prompt_tokens=np.where(neighbours[:, None], other.prompt_tokens, batch.prompt_tokens),
        prompt_lengths=np.where(neighbours, 3, batch.prompt_lengths).astype(np.int32),
        prompt_ids=np.where(kept, batch.prompt_ids, 99).astype(np.int32),
        row_mask=kept | (np.arange(ROWS) == 0),
    )
    got = sampler()(params(), SEED, STEP, changed)
    np.testing.assert_array_equal(np.asarray(got.tokens)[kept], np.asarray(want.tokens)[kept])
    assert not np.array_equal(np.asarray(got.tokens)[0], np.asarray(want.tokens)[0])


def same_but_for_near_ties(got, want):
    """Equal tokens up to rounding: log-probabilities agree, and with them the draws."""
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_array_equal(got.truncated, want.truncated)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-5)


@pytest.mark.parametrize(("slots", "window", "devices"), [(3, 2, 1), (1, 1, 1), (5, 64, 1), (8, 2, 8), (8, 4, 1)])
def test_refilled_slots_draw_what_slots_of_their_own_do(slots, window, devices):
    limit, batch = 16, make_batch()  # caches of several sizes
    twice = {name: np.tile(getattr(batch, name), 2) for name in ("prompt_of_row", "row_mask", "prompt_ids")}
    batch = batch._replace(**twice, rollout_index=np.arange(2 * ROWS, dtype=np.int32))
    want = sampler(limit=limit)(params(), SEED, STEP, batch)
    assert want.truncated.any()
    assert len(set(want.lengths)) > 4
    few = sampler(limit=limit, slots=slots, window=window, devices=devices)
    same_but_for_near_ties(few(params(), SEED, STEP, batch), want)
    longest_first = batch._replace(expected_tokens=want.lengths.astype(np.float32))
    same_but_for_near_ties(few(params(), SEED, STEP, longest_first), want)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_host_copies_the_slots_that_have_ended_and_no_others(monkeypatch, devices):
    fetched, fetch, batch = [], sharding.fetch, make_batch()
    want = sampler(devices=devices, window=2)(params(), SEED, STEP, batch)
    monkeypatch.setattr(sampling, "TAKEN", 2)
    monkeypatch.setattr(sharding, "fetch", lambda tree: fetched.append(jax.tree.map(jnp.shape, tree)) or fetch(tree))
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:devices])
    got = make_sampler(CONFIG, SamplerConfig(LIMIT, 0.7, window=2), EOS, PAD, mesh)(params(), SEED, STEP, batch)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, theirs)  # to the bit
    ended = np.ceil(want.lengths[: ROWS - 1] / 2)  # in which window
    copies = sum(-(-np.sum(ended == window) // 2) for window in (1, 2, 3))
    assert fetched.count(((2, LIMIT), (2, LIMIT), (2,), (2,))) == copies
    assert len(fetched) == copies + ended.max()  # and `done` and `length` once a window


def test_prompts_are_read_once_at_their_widths_and_draw_what_they_do_at_the_longest(monkeypatch):
    """In three slots: the rows of a prompt begin windows apart, over a cache that grows for the longest."""
    read, original = [], prefill.read

    def watched(params, config, tokens, lengths):
        jax.debug.callback(lambda tokens: read.append(np.array(tokens)), tokens)
        return original(params, config, tokens, lengths)

    batch = make_batch()._replace(expected_tokens=np.array([9, 1, 9, 2, 8, 3, 7, 0], np.float32))
    want = sampler()(params(), SEED, STEP, batch)
    monkeypatch.setattr(prefill, "read", watched)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    sample = make_sampler(CONFIG, SamplerConfig(LIMIT, 0.7, slots=3, window=3), EOS, PAD, mesh, (1, WIDTH))
    same_but_for_near_ties(sample(params(), SEED, STEP, batch), want)
    jax.effects_barrier()
    ahead, read[:] = len(read), []
    same_but_for_near_ties(sample(params(), SEED, STEP, batch), want)
    jax.effects_barrier()
    assert ahead == 2 + PROMPTS  # every width once to compile
    as_read = [batch.prompt_tokens[i, :width].tolist() for i, width in enumerate((1, WIDTH, WIDTH))]
    assert sorted(tokens[0].tolist() for tokens in read) == sorted(as_read)


@pytest.mark.parametrize("slots", [None, 3])
def test_a_row_is_cut_at_its_own_limit(slots):
    batch, limits = make_batch(), np.array([1, 2, 3, 1, 1, 2, LIMIT, 1], np.int32)
    want = sampler(slots=slots)(params(), SEED, STEP, batch)
    got = sampler(slots=slots)(params(), SEED, STEP, batch._replace(max_tokens=limits))
    np.testing.assert_array_equal(got.lengths, np.minimum(want.lengths, limits))
    np.testing.assert_array_equal(got.truncated, want.truncated | (want.lengths > limits))
    assert got.truncated.sum() > want.truncated.sum()
    np.testing.assert_array_equal(got.tokens, np.where(drawn(got), want.tokens, PAD))
    np.testing.assert_array_equal(got.log_probs, np.where(drawn(got), want.log_probs, 0))


@pytest.mark.parametrize("wrong", [0, LIMIT + 1])
def test_limits_out_of_range_are_refused(wrong):
    batch = make_batch()._replace(max_tokens=np.full(ROWS, wrong))
    with pytest.raises(
        ValueError, match=rf"max_tokens={wrong}\.\.{wrong} must lie in 1\.\.max_completion_tokens={LIMIT}"
    ):
        sampler()(params(), SEED, STEP, batch)


def test_steps_of_one_policy_are_drawn_together():
    batch, steps = make_batch(), np.repeat(np.array([3, 4], np.uint32), ROWS // 2)
    both = sampler()(params(), SEED, steps, batch)
    for step in (3, 4):
        alone, here = sampler()(params(), SEED, np.uint32(step), batch), steps == step
        np.testing.assert_array_equal(both.tokens[here], alone.tokens[here])


@pytest.mark.parametrize(
    ("chosen", "rows", "places", "shards", "want"),
    [
        (None, 256, 107, 1, 109),  # SmolLM2-135M: 134.5M weights, 2 x 30 x 3 x 64 numbers a place
        (None, 256, 107, 2, 218),
        (None, 96, 107, 1, 96),
        (None, 256, 8192, 1, 64),
        (200, 256, 107, 1, 200),
    ],
)
def test_as_many_slots_as_are_worth_their_memory(chosen, rows, places, shards, want):
    shape = ModelConfig(30, 576, 9, 3, 64, 1536)
    got = number_of_slots(chosen, rows, config=shape, num_params=134_515_008, places=places, row_shards=shards)
    assert got == want
    small = number_of_slots(None, 256, config=CONFIG, num_params=1, places=20, row_shards=1)
    assert small == 256  # under 0.5 GB


def test_cache_sizes_double_up_to_the_limit():
    assert cache_sizes((10,), 100, 16) == (26, 42, 74, 110)
    assert cache_sizes((10,), 8, 16) == (18,)
    assert cache_sizes((10, 90), 100, 16) == (26, 42, 74, 122, 190)  # of 26 42 74 110, 106 122 154 190


def test_a_second_call_with_other_values_compiles_nothing():
    sample, event = sampler(limit=16, slots=3, window=2), "/jax/core/compile/backend_compile_duration"
    sample(params(), SEED, STEP, make_batch())
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        jax.jit(lambda x: x + 1)(np.float32(0))
        assert event in compiled  # the listener hears
        compiled.clear()
        for i in range(3):
            batch = permuted(make_batch(i), np.arange(ROWS)[::-1])
            sample(params(i % 2), np.uint32(i), np.uint32(2**32 - 1 - i), batch)
    finally:
        jax.monitoring.clear_event_listeners()
    assert event not in compiled


def test_keys_differ_in_each_of_their_parts():
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 4, indexing="ij"), axis=-1).reshape(-1, 4).astype(np.uint32)
    one = jax.jit(lambda s, t, p, r: row_keys(s, t[None], p[None], r[None])[0])
    data = np.asarray(jax.random.key_data(jax.vmap(one)(*jnp.asarray(grid).T)))
    assert len({tuple(row) for row in data.tolist()}) == len(grid)


def test_a_single_token_is_a_completion():
    rollouts = sampler(limit=1)(params(), SEED, STEP, make_batch())
    tokens, real = np.asarray(rollouts.tokens)[:-1], np.arange(ROWS) < ROWS - 1
    np.testing.assert_array_equal(rollouts.lengths, real)
    np.testing.assert_array_equal(np.asarray(rollouts.truncated)[:-1], ~np.isin(tokens[:, 0], EOS))


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_completion_tokens": 0}, "max_completion_tokens=0 must be >= 1 and <= 16777216"),
        ({"max_completion_tokens": 2**24 + 1}, "max_completion_tokens=16777217 must be >= 1"),
        ({"slots": 0}, "slots=0 must be >= 1"),
        ({"window": True}, "window=True must be a whole number"),
        ({"temperature": -1.0}, r"temperature=-1\.0 must be >= 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": 1e-30}, r"temperature=1e-30 must be 0 or at least 0\.001"),
        ({"temperature": 1e6}, r"temperature=1000000\.0 must be >= 0 and <= 1000"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be >= 1e-09 and <= 1"),
        ({"top_p": 1.1}, r"top_p=1\.1 must be"),
        ({"top_p": None}, "top_p=None must be a finite number"),
        ({"top_k": -1}, "top_k=-1 must be >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0 draws the same completion for a whole group"),
        ({"top_p": 0.9}, r"top_p=0\.9, top_k=0 bias the importance ratio.*allow_biased_ratio"),
        ({"top_k": 5}, r"top_p=1\.0, top_k=5 bias the importance ratio.*allow_biased_ratio"),
    ],
)
def test_draws_that_a_policy_gradient_cannot_use_are_refused_for_training(settings, message):
    config = SamplerConfig(**settings)  # fine for an evaluation
    with pytest.raises(ValueError, match=message):
        config.check_for_training()
    if "temperature" not in settings:
        SamplerConfig(**settings, allow_biased_ratio=True).check_for_training()


def test_plain_sampling_is_fine_for_training():
    SamplerConfig(temperature=0.8).check_for_training()
