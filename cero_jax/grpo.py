"""GRPO on ragged groups: advantages and loss of R rows that belong to groups of any size.

Rows, not groups, are the unit. `group_ids` [R] int32 names each row's group, 0..G-1; a row outside `row_mask` is
padding and counts nowhere. Nothing here knows how many rows a group should have.

What an allocation does to the objective. Where a prompt with success p is visited with n rows, the expected coefficient
on grad p is 1 for `rloo` and `reward`, (n-1)/n for `dr_grpo` and E[sqrt(S (n-S))] / (n p (1-p)) for `grpo`, S ~
Binomial(n, p): that still depends on n (at p = 0.02: 1.0, 2.6, 4.8 for n = 2, 8, 32). It is multiplied by the group's
share of the weight (its tokens under `token`, its rows under `sequence`, alike for all groups under `prompt`) and by
the rate at which the prompt is visited. So an allocation acts as a *weight* too. `rloo` by `sequence`, each row over
its prompt's rate of rollouts, undoes that.

Letters: R rows, T completion tokens, G groups (static).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

AdvantageKind = Literal["grpo", "dr_grpo", "rloo", "reward", "posterior", "posterior_normalised"]
BY_POSTERIOR = ("posterior", "posterior_normalised")  # advantages that need what was believed before the group
WITHOUT_GROUP = ("reward", *BY_POSTERIOR)  # advantages that a row has by itself, in a group of one too
LEAST_DEVIATION = 0.1  # that a normalised posterior advantage is divided by: of a success rate of 1 %
Aggregation = Literal["token", "sequence", "prompt"]


def _group_sum(values: Array, group_ids: Array, row_mask: Array, num_groups: int) -> Array:
    """[R] -> [G]; padding rows add nothing."""
    return jax.ops.segment_sum(jnp.where(row_mask, values, 0.0), group_ids, num_segments=num_groups)


def has_variance(
    reward: Array, group_ids: Array, row_mask: Array, num_groups: int, judged: Array | None = None
) -> Array:
    """[R] bool: whether the row's group holds two different rewards (max > min: a rounded mean leaves a residue).

    judged: [R] bool, the rows whose reward is a verifier's, which alone can differ; None: all.
    """
    counted = row_mask if judged is None else row_mask & judged
    highest = jax.ops.segment_max(jnp.where(counted, reward, -jnp.inf), group_ids, num_segments=num_groups)
    lowest = jax.ops.segment_min(jnp.where(counted, reward, jnp.inf), group_ids, num_segments=num_groups)
    return (highest > lowest)[group_ids] & row_mask


def advantages(
    reward: Array,
    group_ids: Array,
    row_mask: Array,
    *,
    num_groups: int,
    kind: AdvantageKind = "grpo",
    judged: Array | None = None,
) -> Array:
    """Group-relative advantage of each row.

    Args:
      reward: [R] float32.
      group_ids: [R] int32 in 0..G-1.
      row_mask: [R] bool, False for padding.
      num_groups: G, static.
      kind: `grpo` subtracts the group's mean and divides by its population standard deviation (Shao et al. 2024),
        `dr_grpo` subtracts the mean only (Liu et al. 2025), `rloo` the mean of the others (Kool et al. 2019);
        `reward` subtracts nothing (Williams 1992): of rewards 0 and 1, successes alone teach.
      judged: [R] bool, False for rows whose reward is no verdict: they make no group live. None: all are judged.

    Returns:
      [R] float32; exactly 0 for padding and, but for `reward`, for a group whose judged rewards are all equal.
    """
    if kind == "reward":
        return jnp.where(row_mask if judged is None else row_mask & judged, reward, 0.0)
    size = _group_sum(jnp.ones_like(reward), group_ids, row_mask, num_groups)
    mean = _group_sum(reward, group_ids, row_mask, num_groups) / jnp.maximum(size, 1.0)
    centred = reward - mean[group_ids]
    if kind == "rloo":
        # reward - mean of the others = (reward - mean) n / (n - 1)
        advantage = centred * (size / jnp.maximum(size - 1.0, 1.0))[group_ids]
    elif kind == "grpo":
        variance = _group_sum(centred * centred, group_ids, row_mask, num_groups) / jnp.maximum(size, 1.0)
        # A live group has variance > 0; the guard is for the others, whose quotient is thrown away below.
        advantage = centred * jax.lax.rsqrt(jnp.where(variance > 0, variance, 1.0))[group_ids]
    elif kind == "dr_grpo":
        advantage = centred
    else:
        raise ValueError(f"advantage kind={kind!r} must be one of 'grpo', 'dr_grpo', 'rloo', 'reward' here")
    return jnp.where(has_variance(reward, group_ids, row_mask, num_groups, judged), advantage, 0.0)


def posterior_advantages(
    reward: Array,
    alpha: Array,
    beta: Array,
    group_ids: Array,
    row_mask: Array,
    *,
    num_groups: int,
    normalised: bool = False,
) -> Array:
    """Advantage of each row over what its prompt's posterior expected, given the other rows of its group.

    Row j of a group with n rows and reward sum S, of a prompt believed to succeed as Beta(a, b) before the group, has
    the baseline b_j = (a + S - r_j) / (a + b + n - 1): the mean of the posterior that has seen the other rows. Neither
    (a, b) nor the others depend on r_j, so E[b_j grad log pi(y_j)] = E[b_j] E[grad log pi(y_j)] = 0, whatever (a, b)
    is: the gradient stays unbiased, and so it does behind a division by any function of b_j. A group without variance
    teaches (all wrong where success was expected), and a group of one has an advantage. The price: where the belief is
    wrong, b_j is noise that a group's own mean does not have.

    Args:
      reward: [R] float32, 0 or 1, or between: the sum of the others then stands for their successes.
      alpha, beta: [R] float32 > 0, of the row's prompt before its group, in rollouts.
      group_ids: [R] int32 in 0..G-1.
      row_mask: [R] bool, False for padding and for rows that are no evidence.
      num_groups: G, static.
      normalised: divide by sqrt(b_j (1 - b_j)), at least LEAST_DEVIATION.

    Returns:
      [R] float32, 0 for masked rows. Source: this project's; conjugacy of the Beta-Bernoulli.
    """
    size = _group_sum(jnp.ones_like(reward), group_ids, row_mask, num_groups)[group_ids]
    total = _group_sum(reward, group_ids, row_mask, num_groups)[group_ids]
    baseline = (alpha + total - reward) / (alpha + beta + size - 1.0)
    advantage = reward - baseline
    if normalised:
        variance = jnp.maximum(baseline * (1.0 - baseline), LEAST_DEVIATION**2)
        advantage = advantage * jax.lax.rsqrt(variance)
    return jnp.where(row_mask, advantage, 0.0)


def token_weights(
    token_mask: Array, group_ids: Array, row_mask: Array, *, num_groups: int, aggregation: Aggregation = "token"
) -> Array:
    """The weight of each completion token in the loss, over a whole optimiser step: they sum to 1.

    Computed before any split of the step, so that accumulation, dropped rows and sharding stay plain sums. Rows of
    advantage 0 count in the denominators.

    Args:
      token_mask: [R, T] bool, the tokens that were drawn.
      group_ids, row_mask: as in `advantages`.
      num_groups: G, static.
      aggregation: `token`: 1 / all tokens (DAPO). `sequence`: 1 / (rows x own length) (GRPO).
        `prompt`: 1 / (prompts x the group's tokens).

    Returns:
      [R, T] float32, 0 on padding.
    """
    mask = (token_mask & row_mask[:, None]).astype(jnp.float32)
    length = mask.sum(axis=1)
    if aggregation == "token":
        per_row = jnp.full_like(length, 1.0) / jnp.maximum(length.sum(), 1.0)
    elif aggregation == "sequence":
        rows = (length > 0).sum().astype(jnp.float32)
        per_row = 1.0 / (jnp.maximum(rows, 1.0) * jnp.maximum(length, 1.0))
    elif aggregation == "prompt":
        group_tokens = _group_sum(length, group_ids, row_mask, num_groups)
        prompts = (group_tokens > 0).sum().astype(jnp.float32)
        per_row = (1.0 / (jnp.maximum(prompts, 1.0) * jnp.maximum(group_tokens, 1.0)))[group_ids]
    else:
        raise ValueError(f"aggregation={aggregation!r} must be one of 'token', 'sequence', 'prompt'")
    return mask * per_row[:, None]


def k3(log_probs: Array, ref_log_probs: Array) -> Array:
    """Schulman's k3 estimate of KL(policy || reference) a token: r - 1 - log r, r = reference / policy; >= 0."""
    log_ratio = ref_log_probs - log_probs
    return jnp.expm1(log_ratio) - log_ratio  # exp(x) - 1 would round to below x near zero


def policy_loss(
    log_probs: Array,
    old_log_probs: Array,
    advantage: Array,
    weights: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    ref_log_probs: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Clipped policy-gradient loss (PPO's, with separate clips as in DAPO), plus `kl_coef` times k3 to a reference.

    Args:
      log_probs: [R, T] float32 under the policy being trained.
      old_log_probs: [R, T] float32 under the policy that drew the tokens.
      advantage: [R] float32.
      weights: [R, T] float32, of `token_weights`, 0 on padding.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      kl_coef: weight of the KL term; 0 leaves it out.
      ref_log_probs: [R, T] float32 under the frozen reference; required where kl_coef is not 0.

    Returns:
      The scalar loss, and a dict of weighted means: `clip_share`, `log_prob_mismatch` (mean |new - old|), `kl`.
    """
    # Padding holds arbitrary numbers: exp of them may overflow, and 0 x inf is NaN.
    log_ratio = jnp.where(weights > 0, log_probs - old_log_probs, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    gain = jnp.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    loss = -(weights * gain).sum()
    total = jnp.maximum(weights.sum(), 1e-20)
    clips = clipped * advantage[:, None] < ratio * advantage[:, None]
    metrics = {
        "clip_share": jnp.where(clips, weights, 0.0).sum() / total,
        "log_prob_mismatch": (weights * jnp.abs(log_ratio)).sum() / total,
    }
    if kl_coef:
        if ref_log_probs is None:
            raise ValueError(f"kl_coef={kl_coef} needs ref_log_probs, the frozen reference's log-probabilities")
        # Both masked before k3: behind it the gradient of padding would still be 0 x inf.
        on_tokens = (jnp.where(weights > 0, each, 0.0) for each in (log_probs, ref_log_probs))
        kl = (weights * k3(*on_tokens)).sum()
        loss = loss + kl_coef * kl
        metrics["kl"] = kl / total
    return loss, metrics
