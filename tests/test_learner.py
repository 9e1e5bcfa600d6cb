"""The learner: log-probabilities, loss and optimiser against direct computations, and rows that may be left out."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from left_padding import causal_mask, left_padded, to_the_right

from cero_jax import model, sharding
from cero_jax.learner import (
    Batch,
    Fixed,
    LearnerConfig,
    completion_log_probs,
    grpo_loss,
    make_learner,
    rows_with_gradient,
    step_advantages,
    token_limits,
)
from cero_jax.model import ModelConfig

CONFIG = ModelConfig(num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16)
VOCAB, ROWS, WIDTH, LIMIT, TEMPERATURE = 9, 8, 4, 7, 0.8
PLAIN = LearnerConfig(rows_per_step=ROWS, clip_high=0.28)
WITH_KL = LearnerConfig(rows_per_step=ROWS, clip_high=0.28, kl_coef=0.3)

log_probs_of = jax.jit(completion_log_probs, static_argnames=("config", "temperature", "chunk"))


def one_device():
    return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@cache
def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init_params(CONFIG, VOCAB, 0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)


@cache
def make_batch(seed=0):
    """Groups 1 0 1 | 1 1 | 0 1, then padding: five of the eight rows have a gradient, and stand apart."""
    rng = np.random.default_rng(seed)
    batch = Batch(
        prompt_tokens=rng.integers(0, VOCAB, (ROWS, WIDTH)).astype(np.int32),
        prompt_lengths=np.array([1, 1, 1, 4, 4, 3, 3, 0], np.int32),
        tokens=rng.integers(0, VOCAB, (ROWS, LIMIT)).astype(np.int32),
        lengths=np.array([7, 1, 3, 2, 6, 5, 4, 0], np.int32),
        log_probs=np.zeros((ROWS, LIMIT), np.float32),
        reward=np.array([1, 0, 1, 1, 1, 0, 1, 0], np.float32),
        group_ids=np.array([0, 0, 0, 1, 1, 2, 2, 0], np.int32),
        row_mask=np.arange(ROWS) < ROWS - 1,
        row_weight=np.array([1, 1, 1, 2, 2, 0.5, 0.5, 1], np.float32),
    )
    now = np.asarray(log_probs_of(params(), CONFIG, batch, temperature=TEMPERATURE, chunk=LIMIT))
    drift = rng.normal(0, 0.3, now.shape).astype(np.float32)  # some ratios fall outside the clips
    return batch._replace(log_probs=now + drift)


def drawn(batch):
    return (np.arange(LIMIT)[None] < batch.lengths[:, None]) & batch.row_mask[:, None]


@partial(jax.jit, static_argnames="config")
def _value_and_gradient(params, ref_params, batch, config):
    """Of the whole step at once, padding and all."""
    loss = partial(grpo_loss, model_config=CONFIG, config=config, temperature=TEMPERATURE)
    return jax.value_and_grad(loss, has_aux=True)(params, ref_params, batch, step_advantages(batch, config))


def gradient_of(config, batch, ref=None, at=None):
    return _value_and_gradient(params() if at is None else at, ref, batch, config)[1]


def live_in(batch):
    """[R] bool, by hand: the rows of a group with two rewards."""
    rewards = [batch.reward[batch.row_mask & (batch.group_ids == group)] for group in batch.group_ids]
    return batch.row_mask & np.array([len(set(r.tolist())) > 1 for r in rewards])


@cache
def learner_of(config):
    """Compiled once for all who ask for these settings."""
    return make_learner(CONFIG, VOCAB, config, TEMPERATURE, one_device())


def accumulated_gradient(config, batch, live, ref=None, **changes):
    """What a step adds up over its micro-batches, and its metrics: read from Adam's first moment."""
    config = dataclasses.replace(config, max_grad_norm=1e9, **changes)
    learner = learner_of(config)
    state, of_rows = learner.init(jax.tree.map(jnp.copy, params())), learner.advantages(batch)
    state, metrics = learner.step(state, Fixed({}, ref), batch, of_rows, np.float32(0), live)
    return jax.tree.map(lambda m: m / (1 - config.adam_b1), optax.tree.get(state.opt_state, "mu")), metrics


def assert_same(got, want, relative=1e-5):
    """Each tensor to ||difference|| <= relative x ||it||, and none of them zero."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(b) > 0
        assert np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b)) <= relative * np.linalg.norm(b)


# --- log-probabilities ---


def test_completion_log_probs_equal_full_logits():
    """Of rows pushed to the right as one text each; and in chunks that do not divide the completion."""
    batch = make_batch()
    whole = np.asarray(log_probs_of(params(), CONFIG, batch, temperature=TEMPERATURE, chunk=LIMIT))
    pieces = log_probs_of(params(), CONFIG, batch, temperature=TEMPERATURE, chunk=3)
    np.testing.assert_allclose(np.asarray(pieces)[drawn(batch)], whole[drawn(batch)], atol=1e-5)

    tokens = np.zeros((ROWS, WIDTH + LIMIT), np.int32)
    for row in range(ROWS):
        text = [
            *batch.prompt_tokens[row, : batch.prompt_lengths[row]],
            *batch.tokens[row, : batch.lengths[row]],
        ]
        tokens[row, WIDTH + LIMIT - len(text) :] = text

    @jax.jit
    def logits(tokens, lengths):
        valid, positions = left_padded(lengths, WIDTH + LIMIT)
        hidden, _ = model.forward(params(), CONFIG, tokens, positions, causal_mask(valid))
        return model.logits(params(), CONFIG, hidden)

    scaled = np.asarray(logits(tokens, batch.prompt_lengths + batch.lengths), np.float64) / TEMPERATURE
    log_softmax = scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    for row in range(ROWS - 1):
        length = batch.lengths[row]
        before = log_softmax[row, -length - 1 : -1]  # what each token of the completion was foretold by
        want = before[np.arange(length), batch.tokens[row, :length]]
        np.testing.assert_allclose(whole[row, :length], want, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_rows_that_are_padded_on_the_left():
    """As they were laid before: each prompt up to the widest, its completion from there on, gaps and all."""
    batch = make_batch()
    weight = jnp.asarray(np.random.default_rng(1).normal(0, 1, drawn(batch).shape) * drawn(batch), jnp.float32)
    texts = np.concatenate([to_the_right(batch.prompt_tokens, batch.prompt_lengths), batch.tokens], axis=1)

    def apart(params):
        valid, positions = left_padded(batch.prompt_lengths, WIDTH)
        valid = jnp.concatenate([valid, drawn(batch)], axis=1)[:, :-1]
        behind = batch.prompt_lengths[:, None] + np.arange(LIMIT - 1)
        positions = jnp.concatenate([positions, behind], axis=1)
        hidden, _ = model.forward(params, CONFIG, texts[:, :-1], positions, causal_mask(valid))
        logits = model.logits(params, CONFIG, hidden[:, WIDTH - 1 :]) / TEMPERATURE
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[..., None], axis=-1)[..., 0]
        return (log_probs * weight).sum()

    def together(params):
        log_probs = completion_log_probs(params, CONFIG, batch, temperature=TEMPERATURE, chunk=3, width=WIDTH + 6)
        return (log_probs * weight).sum()

    assert (batch.prompt_lengths + batch.lengths).max() == WIDTH + 6
    assert_same(jax.jit(jax.grad(together))(params()), jax.jit(jax.grad(apart))(params()))


# --- the loss ---


def loop_loss(batch, now, ref, config):
    """The loss in float64, a token at a time; `grpo` by `token`."""
    real = np.flatnonzero(batch.row_mask)
    all_tokens = sum(int(batch.lengths[i]) for i in real)
    loss = 0.0
    for i in real:
        group = np.array([batch.reward[j] for j in real if batch.group_ids[j] == batch.group_ids[i]], np.float64)
        advantage = (batch.reward[i] - group.mean()) / group.std() if group.std() else 0.0
        for t in range(batch.lengths[i]):
            weight = float(batch.row_weight[i]) / all_tokens
            ratio = np.exp(float(now[i, t]) - float(batch.log_probs[i, t]))
            clipped = np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
            loss -= weight * min(ratio * advantage, clipped * advantage)
            if config.kl_coef:
                log_ratio = float(ref[i, t]) - float(now[i, t])
                loss += config.kl_coef * weight * (np.exp(log_ratio) - 1 - log_ratio)
    return loss


@pytest.mark.parametrize("config", [PLAIN, WITH_KL], ids=["plain", "kl"])
def test_loss_equals_float64_loops(config):
    batch, ref_params = make_batch(), params(1) if config.kl_coef else None
    now, ref = (log_probs_of(params(s), CONFIG, batch, temperature=TEMPERATURE, chunk=LIMIT) for s in (0, 1))
    (got, metrics), _ = _value_and_gradient(params(), ref_params, batch, config)
    want = loop_loss(batch, np.asarray(now), np.asarray(ref), config)
    assert float(got) == pytest.approx(want, rel=1e-4)
    assert 0 < float(metrics["clip_share"]) < float(metrics["weight"])
    assert ("kl" in metrics) == bool(config.kl_coef)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_microbatches_add_up_to_the_gradient_of_the_whole_step(size):
    """Five rows are live, of 1 to 7 tokens: the other three never enter the forward pass, wherever they stood."""
    batch, (value, sums) = make_batch(), _value_and_gradient(params(), None, make_batch(), PLAIN)[0]
    whole = gradient_of(PLAIN, batch)
    assert live_in(batch).sum() == 5
    got, metrics = accumulated_gradient(PLAIN, batch, live_in(batch), rows_per_microbatch=size)
    assert_same(got, whole)
    assert float(metrics["loss"]) == pytest.approx(float(value), abs=1e-6)
    assert 0 < float(metrics["clip_share"]) < 1
    # of fewer rows, the dead left out
    assert float(metrics["clip_share"]) >= float(sums["clip_share"] / sums["weight"])
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = jax.tree.map(lambda x: x[order], batch)
    assert_same(accumulated_gradient(PLAIN, shuffled, live_in(shuffled), rows_per_microbatch=size)[0], whole)
    # and leaving out a live one would be seen
    short = live_in(batch) & (np.arange(ROWS) != 2)
    got, _ = accumulated_gradient(PLAIN, batch, short, rows_per_microbatch=size)
    assert np.linalg.norm(got["embed"] - whole["embed"]) > 0.01 * np.linalg.norm(whole["embed"])


def test_padding_rows_and_padded_tokens_have_no_gradient():
    batch = make_batch()
    rng = np.random.default_rng(9)
    behind = np.arange(LIMIT)[None] >= batch.lengths[:, None]
    noisy = batch._replace(
        tokens=np.where(behind, rng.integers(0, VOCAB, behind.shape), batch.tokens).astype(np.int32),
        log_probs=np.where(behind, 1e4, batch.log_probs).astype(np.float32),
        reward=np.where(batch.row_mask, batch.reward, 99.0).astype(np.float32),
        row_weight=np.where(batch.row_mask, batch.row_weight, 99.0).astype(np.float32),
    )
    assert_same(gradient_of(PLAIN, noisy), gradient_of(PLAIN, batch), relative=1e-6)


def norm_of(tree):
    return np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))


def test_a_reference_equal_to_the_policy_pulls_nowhere_and_another_pulls_all_rows():
    batch = make_batch()
    assert_same(gradient_of(WITH_KL, batch, ref=params()), gradient_of(PLAIN, batch))
    dead = batch._replace(reward=np.ones(ROWS, np.float32))
    assert norm_of(gradient_of(WITH_KL, dead, ref=params(1))) > 1e-3
    assert norm_of(gradient_of(PLAIN, dead)) == 0


# --- the step ---


def num_compiled(caplog):
    return sum("Finished XLA compilation" in record.message for record in caplog.records)


def test_steps_equal_adam_by_hand_whatever_was_left_out_and_compile_at_the_first_only(caplog):
    config = dataclasses.replace(PLAIN, adam_b1=0.8, adam_b2=0.95, adam_eps=1e-5, weight_decay=0.1, max_grad_norm=0.05)
    learner = make_learner(CONFIG, VOCAB, config, TEMPERATURE, one_device(), prompt_widths=(1, WIDTH))
    state = learner.init(jax.tree.map(jnp.copy, params()))
    first, second = jax.tree.map(np.zeros_like, (params(), params()))
    for step, (seed, rate, num_live) in enumerate([(0, 1e-2, 4), (1, 3e-3, 5), (2, 2e-3, 4)], start=1):
        batch, before = make_batch(seed), jax.tree.map(np.asarray, state.params)
        if num_live == 4:  # one row less, and a micro-batch less
            batch = batch._replace(row_mask=batch.row_mask & (np.arange(ROWS) != 2))
        gradient = jax.tree.map(np.asarray, gradient_of(PLAIN, batch, at=before))
        norm = norm_of(gradient)
        assert norm > 0.05  # so that it is scaled down
        caplog.clear()
        with jax.log_compiles():
            of_rows = learner.advantages(batch)
            state, metrics = learner.step(state, Fixed({}, None), batch, of_rows, np.float32(rate), live_in(batch))
            jax.block_until_ready(state)
        assert (num_compiled(caplog) > 0) == (step == 1)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
        gradient = jax.tree.map(lambda g, norm=norm: g * (0.05 / norm), gradient)
        first = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, second, gradient)
        assert_same(optax.tree.get(state.opt_state, "mu"), first)
        assert_same(optax.tree.get(state.opt_state, "nu"), second)
        # from its own moments: where a gradient is all rounding, Adam makes a whole step of it
        first, second = (jax.tree.map(np.asarray, optax.tree.get(state.opt_state, name)) for name in ("mu", "nu"))
        want = jax.tree.map(
            lambda p, m, v, shrinks, rate=rate, step=step: (
                p - rate * (m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-5) + 0.1 * shrinks * p)
            ),
            before, first, second, {"embed": 0, "final_norm": 0, "layers": layers_that_shrink(before)},
        )  # fmt: skip
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state.params, want)
        assert int(state.step) == step
        assert not metrics["skipped"]
    moves_nothing_where_the_gradient_is_no_number(learner, state)


def layers_that_shrink(params):
    """1 at the matrices of the layers, 0 at their norms and biases."""
    name = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, params["layers"])
    return jax.tree.map(lambda each: int(not each.endswith(("norm", "bias"))), name)


def moves_nothing_where_the_gradient_is_no_number(learner, state):
    """An importance ratio overflows in one row: not a bit changes, and the next step is as if that had not been."""
    batch, live = make_batch(), live_in(make_batch())
    far = np.where(np.arange(ROWS)[:, None] == 1, -1e4, batch.log_probs).astype(np.float32)

    def step(state, batch):
        of_rows = learner.advantages(batch)
        return learner.step(jax.tree.map(jnp.copy, state), Fixed({}, None), batch, of_rows, np.float32(1e-2), live)

    kept, metrics = step(state, batch._replace(log_probs=far))
    assert bool(metrics["skipped"])
    assert not np.isfinite(float(metrics["loss"]) + float(metrics["grad_norm"]))
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    jax.tree.map(np.testing.assert_array_equal, step(kept, batch)[0], step(state, batch)[0])


def test_with_a_kl_term_no_row_is_left_out():
    """All but padding have a gradient, live or not; without it the live ones."""
    batch = make_batch()
    rows = rows_with_gradient(batch, step_advantages(batch, WITH_KL), WITH_KL)
    np.testing.assert_array_equal(rows, batch.row_mask)
    np.testing.assert_array_equal(rows_with_gradient(batch, step_advantages(batch, PLAIN), PLAIN), live_in(batch))
    got, _ = accumulated_gradient(WITH_KL, batch, rows, ref=params(1))
    assert_same(got, gradient_of(WITH_KL, batch, ref=params(1)))


def by_posterior(**changes):
    """Every group alike believed to succeed nine times of ten: none is dead."""
    nine = np.full(ROWS, 9.0, np.float32)
    return make_batch()._replace(alpha=nine, beta=np.ones(ROWS, np.float32), **changes)


@pytest.mark.parametrize("kind", ["posterior", "posterior_normalised"])
def test_a_step_by_the_posterior_s_advantages_is_the_gradient_of_the_whole(kind):
    """Groups without variance are among its rows; those of a tiny advantage are not."""
    config = dataclasses.replace(PLAIN, advantage=kind)
    batch = by_posterior()
    of_rows = step_advantages(batch, config)
    rows = rows_with_gradient(batch, of_rows, config)
    np.testing.assert_array_equal(rows, batch.row_mask)
    assert_same(accumulated_gradient(config, batch, rows)[0], gradient_of(config, batch))
    # Three failures that were all but certain have next to no gradient, and are left out.
    sure = batch._replace(reward=np.zeros(ROWS, np.float32), alpha=np.full(ROWS, 1e-4, np.float32))
    left = rows_with_gradient(sure, step_advantages(sure, config), config)
    assert not left.any() if kind == "posterior" else left.sum() < 8


def test_the_posterior_s_advantages_take_rewards_beyond_0_and_1_for_those():
    config, batch = dataclasses.replace(PLAIN, advantage="posterior"), by_posterior()
    want = step_advantages(batch, config).advantage
    assert len(set(want.tolist())) > 2
    np.testing.assert_array_equal(step_advantages(by_posterior(reward=2 * batch.reward - 1), config).advantage, want)


# --- settings ---


def test_a_microbatch_may_be_cut_to_three_lengths():
    assert token_limits(25) == (7, 13, 25)
    assert token_limits(1) == (1,)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="rows_per_step=1 must be >= 2"):
        LearnerConfig(rows_per_step=1)
    with pytest.raises(ValueError, match="steps_per_batch=0 must be >= 1"):
        LearnerConfig(steps_per_batch=0)
    with pytest.raises(ValueError, match=r"rows_per_microbatch=64 in 1\.\.rows_per_step=32"):
        LearnerConfig(rows_per_microbatch=64)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    with pytest.raises(
        ValueError, match=r"rows_per_step=12 and rows_per_microbatch=8 must be multiples of data x fsdp = 8"
    ):
        make_learner(CONFIG, VOCAB, LearnerConfig(rows_per_step=12), TEMPERATURE, mesh)


def test_rematerialised_layers_give_the_same_gradient_and_keep_less():
    def gradient(remat):
        config = dataclasses.replace(CONFIG, num_layers=8, remat=remat)
        deep = model.init_params(config, VOCAB, 0)
        loss = partial(grpo_loss, model_config=config, config=PLAIN, temperature=TEMPERATURE)
        function = jax.jit(jax.grad(lambda p, b: loss(p, None, b, step_advantages(b, PLAIN))[0]))
        compiled = function.lower(deep, make_batch()).compile()
        return compiled(deep, make_batch()), compiled.memory_analysis().temp_size_in_bytes

    (kept, much), (again, little) = gradient(False), gradient(True)
    assert_same(again, kept)
    assert little < 0.6 * much
