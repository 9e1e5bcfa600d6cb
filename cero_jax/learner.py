"""The policy's optimiser step: GRPO on the rows of ragged groups, in micro-batches of those that have a gradient.

Letters: R rows of a step, Tp prompt tokens, T completion tokens, D width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from cero_jax import grpo, lora, model, sharding
from cero_jax.attention import Causal
from cero_jax.grpo import BY_POSTERIOR, AdvantageKind, Aggregation
from cero_jax.microbatches import Shape, microbatches, shapes_for
from cero_jax.model import ModelConfig, Params
from cero_jax.optimizer import TrainState, adam, kept_unless, make_stepper
from cero_jax.settings import check


@dataclass(frozen=True)
class LearnerConfig:
    """How the policy is updated."""

    rows_per_step: int = 32
    """R, rollouts of one optimiser step."""
    steps_per_batch: int = 1
    """Optimiser steps on rollouts of one policy; 1 is on-policy."""
    learning_rate: float = 5e-4
    """Peak, of Adam."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate goes on from its peak as the budget is spent: falling in a line, or in half a cosine, or not."""
    final_learning_rate_share: float = 0.05
    """The share of the peak to which the rate falls (linear, cosine)."""
    warmup_share: float = 0.0
    """The rate rises linearly from 0 over this share of the budget: Adam's first steps are large, however noisy."""
    adam_b1: float = 0.9
    adam_b2: float = 0.99
    adam_eps: float = 1e-8
    """Added to the root of the second moment: parameters whose gradients are smaller move less than the rate."""
    weight_decay: float = 0.0
    """AdamW's, of matrices; norms, biases and the embedding do not decay."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this global norm."""
    max_skipped_steps: int = 10
    """A step whose gradient is NaN or infinite moves nothing; after so many in a row the run saves and stops."""
    advantage: AdvantageKind = "grpo"
    """Of a rollout over its group's mean (grpo: over its standard deviation too; dr_grpo), over the mean of the others
    (rloo), over nothing (reward), or over what the allocator's posterior expected of its prompt (posterior;
    posterior_normalised: over the expected deviation too). With the last three min_group may be 1."""
    least_advantage: float = 1e-3
    """Rows whose advantage is smaller are left out of the backward computation (posterior, posterior_normalised)."""
    aggregation: Aggregation = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    """Weight of the KL to the policy that RL started from; 0 keeps no reference in memory."""
    undo_visit_rate: bool = False
    """Divide each row's weight by its prompt's rate of rollouts: with `rloo` and `sequence`, the objective that a
    uniform allocation optimises, whatever the allocation."""
    visit_rate_clip: float = 4.0
    """Rates are clipped to within this factor of the mean before they are divided by."""
    rows_per_microbatch: int | None = None
    """Rows whose gradient is computed at once, sorted by length so that a long one pads few others; None is a quarter
    of a step's."""
    logit_chunk_tokens: int = 128
    """Completion tokens of a row whose logits are held at once."""

    def __post_init__(self):
        sizes = dict.fromkeys(("steps_per_batch", "rows_per_microbatch", "logit_chunk_tokens"), (1, 2**24))
        check(self, rows_per_step=(2, 2**24), least_advantage=(0, 1e30), **sizes)
        if not (self.learning_rate > 0 and 0 <= self.final_learning_rate_share <= 1 and self.max_grad_norm > 0):
            raise ValueError(
                f"learner.learning_rate={self.learning_rate} and max_grad_norm={self.max_grad_norm} must be positive, "
                f"final_learning_rate_share={self.final_learning_rate_share} in [0, 1]"
            )
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"learner.warmup_share={self.warmup_share} must lie in [0, 1): a share of the budget")
        if not (0 <= self.adam_b1 < 1 and 0 <= self.adam_b2 < 1 and self.adam_eps > 0):
            raise ValueError(
                f"learner.adam_b1={self.adam_b1} and adam_b2={self.adam_b2} must lie in [0, 1), "
                f"adam_eps={self.adam_eps} be positive"
            )
        if min(self.kl_coef, self.weight_decay) < 0:
            raise ValueError(
                f"learner.kl_coef={self.kl_coef} and weight_decay={self.weight_decay} must not be negative"
            )
        if self.max_skipped_steps < 1:
            raise ValueError(f"learner.max_skipped_steps={self.max_skipped_steps} must be at least 1")
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ValueError(
                f"learner.clip_low={self.clip_low} must lie in (0, 1), clip_high={self.clip_high} be positive"
            )
        microbatch = self.rows_per_microbatch or 1
        if min(self.logit_chunk_tokens, self.visit_rate_clip, microbatch) < 1 or microbatch > self.rows_per_step:
            raise ValueError(
                f"logit_chunk_tokens={self.logit_chunk_tokens} and visit_rate_clip={self.visit_rate_clip} must be at "
                f"least 1, rows_per_microbatch={self.rows_per_microbatch} in 1..rows_per_step={self.rows_per_step}"
            )


class Fixed(NamedTuple):
    """Parameters that an optimiser step reads and leaves as they are."""

    frozen: Params  # of a model with adapters, all but those; else {}
    ref_params: Params | None  # the trained parameters as they were when RL began; None without a KL term


HostOrDevice = Any  # a NumPy array on its way to the devices, or a JAX array there: jitted functions take both


class Batch(NamedTuple):
    """R rows with everything that an optimiser step needs."""

    prompt_tokens: HostOrDevice  # [R, Tp] int32, padded on the right
    prompt_lengths: HostOrDevice  # [R] int32
    tokens: HostOrDevice  # [R, T] int32, padded on the right
    lengths: HostOrDevice  # [R] int32, EOS counted
    log_probs: HostOrDevice  # [R, T] float32, of the policy that drew them
    reward: HostOrDevice  # [R] float32
    group_ids: HostOrDevice  # [R] int32, in 0..R-1
    row_mask: HostOrDevice  # [R] bool, False: padding, or masked out
    row_weight: HostOrDevice  # [R] float32, multiplies the row's tokens' weights; 1 unless visit rates are undone
    alpha: HostOrDevice = None  # [R] float32, with beta: the posterior of the row's prompt before it was drawn;
    beta: HostOrDevice = None  # [R] float32; None where advantages do not come from it
    judged: HostOrDevice = None  # [R] bool, False: its verifier timed out or failed; None: all are judged


def completion_log_probs(
    params: Params, config: ModelConfig, batch: Batch, *, temperature: float, chunk: int, width: int | None = None
) -> Array:
    """[R, T] float32 log-probabilities of the completion's tokens, of the full vocabulary at `temperature`.

    A row is its prompt, its completion behind that without a gap, and padding up to `width` places: what the longest
    has at least; None: Tp + T. Logits are computed for completion tokens only, `chunk` of a row at a time, and again
    for their gradient: [R, width, V] is never held.
    """
    num_rows, limit = batch.tokens.shape
    longest = batch.prompt_tokens.shape[1]
    places = (longest + limit if width is None else width) - 1  # the last token is never read: nothing follows it
    place = jnp.arange(places, dtype=jnp.int32)[None]
    behind = place - batch.prompt_lengths[:, None]  # [R, places] how far behind the prompt's end; below 0: in it
    prompts = jnp.pad(batch.prompt_tokens[:, :places], ((0, 0), (0, max(places - longest, 0))))
    completions = jnp.take_along_axis(batch.tokens, jnp.clip(behind, 0, limit - 1), axis=1)
    tokens = jnp.where(behind < 0, prompts, completions)
    positions = jnp.broadcast_to(place, tokens.shape)
    read = jnp.clip(batch.prompt_lengths + batch.lengths - 1, 1, places)
    hidden, _ = model.forward(params, config, tokens, positions, Causal(read))
    before = batch.prompt_lengths[:, None] - 1 + jnp.arange(limit, dtype=jnp.int32)[None]  # what foretells each token
    hidden = jnp.take_along_axis(hidden, jnp.clip(before, 0, places - 1)[:, :, None], axis=1)  # [R, T, D]

    logits_of = model.chunked_logits(params, config)

    @jax.checkpoint
    def log_probs(hidden: Array, tokens: Array) -> Array:
        logits = logits_of(hidden) / temperature
        return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]

    chunk = min(chunk, limit)
    pieces = -(-limit // chunk)
    pad = pieces * chunk - limit
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(num_rows, pieces, chunk, -1)
    tokens = jnp.pad(batch.tokens, ((0, 0), (0, pad))).reshape(num_rows, pieces, chunk)
    out = jax.lax.map(lambda piece: log_probs(*piece), (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(tokens, 1, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(num_rows, pieces * chunk)[:, :limit]


def token_mask(batch: Batch) -> Array:
    """[R, T] bool, the places of the completions' tokens."""
    return jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None, :] < batch.lengths[:, None]


class Advantages(NamedTuple):
    """What each row and token of a step counts for: computed over the whole step, so that micro-batches are sums."""

    advantage: Array  # [R] float32, group-relative
    weights: Array  # [R, T] float32, of each token in the loss


def step_advantages(batch: Batch, config: LearnerConfig) -> Advantages:
    """Advantages and token weights of a step's rows; a row of advantage 0 counts in the weights' denominators."""
    groups = {"group_ids": batch.group_ids, "row_mask": batch.row_mask, "num_groups": batch.reward.shape[0]}
    if config.advantage in BY_POSTERIOR:
        normalised, share = config.advantage == "posterior_normalised", jnp.clip(batch.reward, 0.0, 1.0)
        advantage = grpo.posterior_advantages(share, batch.alpha, batch.beta, normalised=normalised, **groups)
    else:
        advantage = grpo.advantages(batch.reward, kind=config.advantage, judged=batch.judged, **groups)
    weights = grpo.token_weights(token_mask(batch), aggregation=config.aggregation, **groups)
    return Advantages(advantage, weights * batch.row_weight[:, None])


def live_rows(batch: Batch) -> np.ndarray:
    """[R] bool, the rows whose group was judged to hold two different rewards; as `grpo.has_variance`, on the host."""
    counted = batch.row_mask if batch.judged is None else batch.row_mask & batch.judged
    groups, reward = batch.group_ids[counted], batch.reward[counted]
    highest, lowest = (np.full(len(batch.reward), bound, np.float32) for bound in (-np.inf, np.inf))
    np.maximum.at(highest, groups, reward)
    np.minimum.at(lowest, groups, reward)
    return (highest > lowest)[batch.group_ids] & batch.row_mask


def rows_with_gradient(batch: Batch, advantages: Advantages, config: LearnerConfig) -> np.ndarray:
    """[R] bool: the rows that have an advantage, or, with a KL term, all but padding.

    Waits for the advantages: the host plans micro-batches by them.
    """
    if config.kl_coef:
        return np.asarray(batch.row_mask)
    least = config.least_advantage if config.advantage in BY_POSTERIOR else 0.0
    return np.abs(sharding.fetch(advantages.advantage)) > least


def grpo_loss(
    params: Params,
    ref_params: Params | None,
    batch: Batch,
    advantages: Advantages,
    *,
    model_config: ModelConfig,
    config: LearnerConfig,
    temperature: float,
    width: int | None = None,
) -> tuple[Array, dict[str, Array]]:
    """These rows' part of the step's loss, and their metrics as weighted sums: `finish` divides by the weight.

    width: as in `completion_log_probs`.
    """
    settings = {"temperature": temperature, "chunk": config.logit_chunk_tokens, "width": width}
    log_probs_of = partial(completion_log_probs, config=model_config, batch=batch, **settings)
    ref = None if ref_params is None else jax.lax.stop_gradient(log_probs_of(ref_params))
    loss, metrics = grpo.policy_loss(
        log_probs_of(params),
        batch.log_probs,
        advantages.advantage,
        advantages.weights,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_coef=config.kl_coef,
        ref_log_probs=ref,
    )
    total = advantages.weights.sum()
    return loss, {name: mean * total for name, mean in metrics.items()} | {"loss": loss, "weight": total}


class Learner(NamedTuple):
    """The functions that make and move a TrainState, jitted for one set of shapes and one mesh."""

    init: Callable[[Params], TrainState]  # fresh optimiser around parameters
    advantages: Callable[[Batch], Advantages]
    # (state, fixed, batch, advantages, learning rate [], rows with a gradient [R] bool) -> state, metrics
    step: Callable[..., tuple[TrainState, dict[str, Array]]]
    shardings: Any  # a NamedSharding for each part of a TrainState


def microbatch_rows(config: LearnerConfig, shards: int) -> int:
    """Rows of a micro-batch: as set, else a quarter of a step's, rounded up to a multiple of the mesh's row shards."""
    return config.rows_per_microbatch or -(-config.rows_per_step // 4 // shards) * shards


def token_limits(max_tokens: int) -> tuple[int, ...]:
    """Completion tokens that a micro-batch may be cut to: a quarter, a half and all."""
    return tuple(sorted({-(-max_tokens // part) for part in (4, 2, 1)}))


def make_optimizer(config: LearnerConfig) -> optax.GradientTransformation:
    """Adam as configured, without its rate."""
    return adam(config.adam_b1, config.adam_b2, config.adam_eps, config.weight_decay, config.max_grad_norm)


def make_learner(
    model_config: ModelConfig,
    vocab_size: int,
    config: LearnerConfig,
    temperature: float,
    mesh: Mesh,
    prompt_widths: tuple[int, ...] | None = None,
) -> Learner:
    """The learner. Raises ValueError where rows or parameters do not divide over the mesh, or attention cannot be had.

    prompt_widths: prompts' lengths that micro-batches are compiled for, as `data.prompt_widths` chooses them; None: Tp.
    """
    shards = sharding.row_shards(mesh)
    size = microbatch_rows(config, shards)
    if config.rows_per_step % shards or size % shards:
        raise ValueError(
            f"rows_per_step={config.rows_per_step} and rows_per_microbatch={size} must be multiples of data x fsdp = "
            f"{shards}"
        )
    model.kernel(model_config, mesh)
    stepper = make_stepper(model_config, vocab_size, make_optimizer(config), mesh)
    row_sharding = sharding.rows(mesh)
    of_params = stepper.shardings.params
    loss = sharding.on(mesh, partial(grpo_loss, model_config=model_config, config=config, temperature=temperature))

    @partial(jax.jit, out_shardings=(of_params, None))
    def nothing(params: Params):
        names = ("clip_share", "log_prob_mismatch", "loss", "weight", *(["kl"] if config.kl_coef else []))
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return zeros, dict.fromkeys(names, jnp.float32(0))

    @partial(jax.jit, static_argnames="shape", donate_argnames="so_far", out_shardings=(of_params, None))
    def add(so_far, params: Params, fixed: Fixed, batch: Batch, advantages: Advantages, rows, used, shape: Shape):
        batch, advantages = jax.tree.map(lambda x: x[rows], (batch, advantages))
        limit = shape.limit
        batch = batch._replace(tokens=batch.tokens[:, :limit], log_probs=batch.log_probs[:, :limit])
        advantages = advantages._replace(weights=jnp.where(used[:, None], advantages.weights[:, :limit], 0.0))
        batch, advantages = jax.lax.with_sharding_constraint((batch, advantages), row_sharding)
        ref = None if fixed.ref_params is None else lora.join(fixed.frozen, fixed.ref_params)

        def of_trained(params: Params):
            return loss(lora.join(fixed.frozen, params), ref, batch, advantages, width=shape.width)

        (_, metrics), grads = jax.value_and_grad(of_trained, has_aux=True)(params)
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), so_far, (grads, metrics))

    @partial(jax.jit, donate_argnames="state", out_shardings=(stepper.shardings, None))
    def finish(state: TrainState, summed, learning_rate: Array):
        grads, sums = summed
        total = jnp.maximum(sums.pop("weight"), 1e-20)
        means = {name: value if name == "loss" else value / total for name, value in sums.items()}
        norm = optax.tree.norm(grads)
        skipped = ~jnp.isfinite(norm + means["loss"])
        state = kept_unless(~skipped, stepper.apply(state, grads, learning_rate), state)
        return state, means | {"grad_norm": norm, "skipped": skipped}

    compiled = {}

    def step(state: TrainState, fixed: Fixed, batch: Batch, advantages: Advantages, learning_rate, rows: np.ndarray):
        shapes = shapes_for(prompt_widths or (batch.prompt_tokens.shape[1],), token_limits(batch.tokens.shape[1]))
        parts = microbatches(rows, np.asarray(batch.prompt_lengths), np.asarray(batch.lengths), size, shapes)
        batch, summed = sharding.place(batch, row_sharding), nothing(state.params)
        if not compiled:  # all shapes at the first call, so that none compiles in the middle of a run
            inputs = (summed, state.params, fixed, batch, advantages, *parts[0][:2])
            compiled.update({shape: add.lower(*inputs, shape=shape).compile() for shape in shapes})
        for part in parts:
            inputs = (summed, state.params, fixed, batch, advantages, part.rows, part.used)
            summed = compiled[part.shape](*inputs)
        return finish(state, summed, learning_rate)

    advantages_of = jax.jit(partial(step_advantages, config=config), out_shardings=row_sharding)
    return Learner(stepper.init, advantages_of, step, stepper.shardings)


def learning_rate(config: LearnerConfig, spent: int, total_budget: int) -> float:
    """The rate of a step with which `spent` of `total_budget` rollouts are drawn.

    Linear from 0 to the peak over warmup_share of the budget; then, but where it is constant, on to
    final_learning_rate_share of it at the end.
    """
    share = min(1.0, spent / total_budget)
    if share < config.warmup_share:
        return config.learning_rate * share / config.warmup_share
    falling = (share - config.warmup_share) / (1.0 - config.warmup_share)
    falling = {"linear": falling, "cosine": (1.0 - math.cos(math.pi * falling)) / 2, "constant": 0.0}[config.schedule]
    return config.learning_rate * (1.0 - (1.0 - config.final_learning_rate_share) * falling)
