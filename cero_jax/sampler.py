"""Prompts to completions: prefill once a prompt, then decode all rows together in one jitted loop.

Letters: U distinct prompts, R rows (rollouts), P prompt tokens (padded on the left), T completion tokens at most,
S = P + T places in the cache, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from cero_jax import model, sharding
from cero_jax.model import Cache, ModelConfig, Params

EVAL_STEP = 2**32 - 1  # stands for the step in the keys of an evaluation: training never reaches it


@dataclass(frozen=True)
class SamplerConfig:
    """How completions are drawn."""

    max_completion_tokens: int = 25
    """T, tokens; a completion that has not ended by then is cut and counts as truncated."""
    temperature: float = 1.0
    """0 is greedy (evaluation only)."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this; 1 is off."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 is off."""
    allow_biased_ratio: bool = False
    """Say that training with top_p < 1 or top_k > 0 is meant: the importance ratio is then biased."""

    def __post_init__(self):
        if self.max_completion_tokens < 1:
            raise ValueError(f"max_completion_tokens={self.max_completion_tokens} must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature={self.temperature} must be >= 0, top_p={self.top_p} in (0, 1], top_k={self.top_k} >= 0"
            )

    def check_for_training(self) -> None:
        """Raise ValueError where a policy gradient on these draws would be wrong."""
        if self.temperature == 0:
            raise ValueError("temperature=0 draws the same completion for a whole group: train at temperature > 0")
        if (self.top_p < 1 or self.top_k > 0) and not self.allow_biased_ratio:
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k} bias the importance ratio (log-probabilities are of the full "
                "vocabulary): use top_p=1 and top_k=0, or say allow_biased_ratio=True as well"
            )


class Rollouts(NamedTuple):
    """What was drawn, a row a rollout."""

    tokens: Array  # [R, T] int32, pad_id behind the end
    log_probs: Array  # [R, T] float32, of the full vocabulary at the sampling temperature; 0 behind the end
    lengths: Array  # [R] int32 tokens, the ending EOS counted; 0 for a padding row
    truncated: Array  # [R] bool, cut at T without an EOS


def row_keys(seed: Array, step: Array, prompt_ids: Array, rollout_index: Array) -> Array:
    """[R] keys, a function of (seed, step, prompt id, rollout index), not of the slot; `generate` adds the position."""
    root = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda prompt, rollout: jax.random.fold_in(jax.random.fold_in(root, prompt), rollout))(
        prompt_ids, rollout_index
    )


def keep_likely(logits: Array, top_k: int, top_p: float) -> Array:
    """Logits [R, V] with all but the `top_k` likeliest, and all outside the nucleus of mass `top_p`, set to -inf."""
    if top_k > 0:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        before = (
            jnp.cumsum(probability, axis=-1) - probability
        )  # mass of the likelier ones; 0 for the first, so it stays
        last_kept = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < last_kept, -jnp.inf, logits)
    return logits


def draw(logits: Array, keys: Array, config: SamplerConfig) -> tuple[Array, Array]:
    """One token a row by the Gumbel trick. logits [R, V] float32, keys [R] -> token [R] int32, log-probability [R]."""
    if config.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = logits / config.temperature
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
        token = jnp.argmax(keep_likely(logits, config.top_k, config.top_p) + noise, axis=-1).astype(jnp.int32)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=-1)[:, 0]
    return token, log_prob


def _prefill(params: Params, config: ModelConfig, tokens: Array, lengths: Array, space: int) -> tuple[Array, Cache]:
    """Logits of each prompt's next token [U, V], and a cache with `space` places behind the prompt."""
    num_prompts, width = tokens.shape
    valid, positions = model.left_padded(lengths, width)
    mask = jnp.pad(model.causal_mask(valid), ((0, 0), (0, 0), (0, space)))
    cache = model.init_cache(config, num_prompts, width + space)
    hidden, cache = model.forward(params, config, tokens, positions, mask, cache)
    assert cache is not None
    return model.logits(params, config, hidden[:, -1]), cache


def generate(
    params: Params,
    prompt_tokens: Array,
    prompt_lengths: Array,
    prompt_of_row: Array,
    row_mask: Array,
    keys: Array,
    *,
    model_config: ModelConfig,
    config: SamplerConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
    row_sharding: NamedSharding,
) -> Rollouts:
    """Draw a completion for each row.

    Args:
      params: of the policy; cast to the compute dtype here, once a call.
      prompt_tokens: [U, P] int32, padded on the left.
      prompt_lengths: [U] int32, tokens.
      prompt_of_row: [R] int32 in 0..U-1, the prompt that each row continues.
      row_mask: [R] bool, False for a padding row: nothing is drawn for it.
      keys: [R], of `row_keys`.
      model_config, config: shapes, and how to draw.
      eos_ids, pad_id: of the tokenizer.
      row_sharding: how rows are laid over the mesh.

    Returns:
      Rollouts; the loop ends as soon as every row has.
    """
    params = model.cast(params, model_config.compute_dtype)
    (_, width), (num_rows,) = prompt_tokens.shape, prompt_of_row.shape
    limit = config.max_completion_tokens
    eos = jnp.asarray(eos_ids, jnp.int32)
    rows = partial(jax.lax.with_sharding_constraint, shardings=row_sharding)

    logits, cache = _prefill(params, model_config, prompt_tokens, prompt_lengths, limit)
    logits = rows(logits[prompt_of_row])
    cache = Cache(*(jnp.moveaxis(rows(jnp.moveaxis(c, 1, 0)[prompt_of_row]), 0, 1) for c in cache))
    lengths = prompt_lengths[prompt_of_row]
    in_prompt, _ = model.left_padded(lengths, width)
    sees = jnp.concatenate([in_prompt, jnp.zeros((num_rows, limit), bool)], axis=1)  # [R, S]

    def write(rollouts: Rollouts, logits: Array, done: Array, t: Array) -> tuple[Rollouts, Array]:
        token, log_prob = draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, t), config)
        token = jnp.where(done, pad_id, token)
        rollouts = rollouts._replace(
            tokens=rollouts.tokens.at[:, t].set(token),
            log_probs=rollouts.log_probs.at[:, t].set(jnp.where(done, 0.0, log_prob)),
            lengths=rollouts.lengths + (~done).astype(jnp.int32),
        )
        return rollouts, done | (token[:, None] == eos[None, :]).any(axis=-1)

    def decode(carry):
        t, rollouts, done, cache, sees = carry
        sees = sees.at[:, width + t - 1].set(True)
        last = jax.lax.dynamic_index_in_dim(rollouts.tokens, t - 1, axis=1)
        positions = (lengths + t - 1)[:, None]
        hidden, cache = model.forward(params, model_config, last, positions, sees[:, None], cache, width + t - 1)
        rollouts, done = write(rollouts, model.logits(params, model_config, hidden[:, 0]), done, t)
        return t + 1, rollouts, done, cache, sees

    empty = Rollouts(
        tokens=rows(jnp.full((num_rows, limit), pad_id, jnp.int32)),
        log_probs=rows(jnp.zeros((num_rows, limit), jnp.float32)),
        lengths=rows(jnp.zeros(num_rows, jnp.int32)),
        truncated=rows(jnp.zeros(num_rows, bool)),
    )
    rollouts, done = write(empty, logits, ~row_mask, jnp.int32(0))
    _, rollouts, done, _, _ = jax.lax.while_loop(
        lambda carry: (carry[0] < limit) & ~carry[2].all(), decode, (jnp.int32(1), rollouts, done, cache, sees)
    )
    return rollouts._replace(truncated=~done)


Sampler = Callable[..., Rollouts]


def make_sampler(
    model_config: ModelConfig, config: SamplerConfig, eos_ids: tuple[int, ...], pad_id: int, mesh: Mesh
) -> Sampler:
    """`generate` jitted for one set of shapes: (params, seed, step, batch) -> Rollouts.

    The batch is a dict of `prompt_tokens`, `prompt_lengths`, `prompt_of_row`, `row_mask`, `prompt_ids` [R] and
    `rollout_index` [R].
    """

    @jax.jit
    def sample(params: Params, seed: Array, step: Array, batch: dict[str, Array]) -> Rollouts:
        keys = row_keys(seed, step, batch["prompt_ids"], batch["rollout_index"])
        return generate(
            params,
            batch["prompt_tokens"],
            batch["prompt_lengths"],
            batch["prompt_of_row"],
            batch["row_mask"],
            keys,
            model_config=model_config,
            config=config,
            eos_ids=eos_ids,
            pad_id=pad_id,
            row_sharding=sharding.rows(mesh),
        )

    return sample
