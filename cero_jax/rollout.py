"""A step's rollouts on their way from the planner over the sampler to the learner: the host's part of the loop.

Letters: N prompts, R rows of a step, U visits in it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from cero_jax.allocator.base import AllocatorState
from cero_jax.data import Prompts
from cero_jax.learner import Batch, live_rows
from cero_jax.pace import Seconds
from cero_jax.packing import StepPlan
from cero_jax.rewards import CORRECT, STATUSES, Verdict
from cero_jax.sampler import Rollouts, SamplingBatch
from cero_jax.verify import Verified, correctness, is_judged, mean_parts, on_scale


class Beliefs(NamedTuple):
    """What the allocator held of each visit's prompt before it was drawn: Beta(alpha, beta) of its success."""

    alpha: np.ndarray  # [U] float32 > 0
    beta: np.ndarray  # [U] float32 > 0


class Rules(NamedTuple):
    """What a reward makes of a rollout: the fields of the config of these names."""

    truncated: Literal["wrong", "mask"] = "wrong"
    success_threshold: float = 0.5
    lowest_reward: float = 0.0
    overlong_tokens: int = 0
    overlong_penalty: float = 1.0


class ScoredStep(NamedTuple):
    """A step's rollouts with their rewards."""

    plan: StepPlan  # who was drawn
    batch: Batch  # [R] rows, in NumPy
    num_correct: np.ndarray  # [U] int32, successes of each visit
    num_evidence: np.ndarray  # [U] int32, its rows but those whose verification timed out or failed
    truncated: np.ndarray  # [R] bool
    completions: list[str]  # [R] text, "" for padding
    verdicts: list[Verdict]  # [R]
    seconds: Seconds  # that drawing and verifying took, of all steps drawn together


def sampling_batch(prompts: Prompts, plans: list[StepPlan], num_steps: int, mean_tokens: np.ndarray) -> SamplingBatch:
    """The sampler's input for steps that are drawn from one policy: each visit's prompt once, and the rows in order.

    Fewer plans than num_steps are padded with masked rows. mean_tokens: [N] float32, of each prompt's completions.
    """
    blank = plans[0]._replace(row_mask=np.zeros_like(plans[0].row_mask))
    fields = zip(*plans, *[blank] * (num_steps - len(plans)), strict=True)
    rows = StepPlan(*(np.concatenate(field) for field in fields))
    first_visit = np.arange(num_steps, dtype=np.int32) * len(blank.visit_ids)
    visits = np.maximum(rows.visit_ids, 0)  # an unused visit reads prompt 0, and no row looks at it
    prompt_ids = np.maximum(rows.prompt_ids, 0)
    tokens, lengths = prompts.rows(visits, prompts.longest)
    return SamplingBatch(
        prompt_tokens=tokens,
        prompt_lengths=lengths,
        prompt_of_row=rows.group_ids + np.repeat(first_visit, len(blank.row_mask)),
        row_mask=rows.row_mask,
        prompt_ids=prompt_ids,
        rollout_index=rows.rollout_index,
        expected_tokens=mean_tokens[prompt_ids],
    )


def observed_tokens(mean_tokens: np.ndarray, plan: StepPlan, lengths: np.ndarray) -> np.ndarray:
    """[N] float32 mean tokens: of each prompt drawn, the average of its old value and this step's mean length.

    mean_tokens: [N] float32. lengths: [R] tokens of the step's completions.
    """
    ids, lengths = plan.prompt_ids[plan.row_mask], lengths[plan.row_mask]
    seen, place = np.unique(ids, return_inverse=True)
    means = np.bincount(place, lengths) / np.bincount(place)
    mean_tokens = mean_tokens.copy()
    mean_tokens[seen] = (mean_tokens[seen] + means.astype(np.float32)) / 2
    return mean_tokens


def score_steps(
    prompts: Prompts,
    plans: list[StepPlan],
    rollouts: Rollouts,
    verified: Verified,
    seconds: Seconds,
    beliefs: list[Beliefs] | list[None],
    rules: Rules,
) -> list[ScoredStep]:
    """Each step's share of what was drawn together; the arguments as in `to_batch`."""
    seconds = seconds._replace(steps=len(plans))
    parts = split_steps(rollouts, verified, len(plans[0].row_mask))
    return [
        to_batch(prompts, plan, *part, seconds, believed, rules)
        for plan, believed, part in zip(plans, beliefs, parts, strict=False)  # a padded batch has more parts
    ]


def split_steps(rollouts: Rollouts, verified: Verified, num_rows: int) -> Iterator[tuple[Rollouts, Verified]]:
    """What was drawn together, step by step: num_rows (R) rows each."""
    completions, verdicts, reward = verified
    for start in range(0, len(reward), num_rows):
        here = slice(start, start + num_rows)
        yield Rollouts(*(each[here] for each in rollouts)), Verified(completions[here], verdicts[here], reward[here])


def to_batch(
    prompts: Prompts,
    plan: StepPlan,
    rollouts: Rollouts,
    verified: Verified,
    seconds: Seconds,
    beliefs: Beliefs | None,
    rules: Rules,
) -> ScoredStep:
    """The learner's rows and the posterior's counts of a step that was drawn and verified.

    A truncated rollout has the lowest reward of the scale; under "mask" it counts neither in the loss nor in its group.
    For the posterior it is a failure all the same: a prompt whose completions never end in time would otherwise look
    untried for ever. A rollout whose verification timed out or failed has the lowest reward and is no evidence: that
    says nothing of the policy, and makes no group live.

    A success is a row whose correctness reaches `success_threshold`: a reward may have other parts, and a length may be
    penalised, and none of that moves the posterior. Every row pays for its length, a truncated one the whole
    `overlong_penalty`, so that no completion that ended is worse than the same one cut.

    beliefs: where advantages are taken over them, else None. With them, what is no evidence has no advantage either.
    """
    completions, verdicts, reward = verified
    cut = np.asarray(rollouts.truncated) & plan.row_mask
    judged, success = is_judged(verdicts) & plan.row_mask, correctness(reward, verdicts) >= rules.success_threshold
    success &= judged & ~cut
    reward = on_scale(reward, verdicts, rules.lowest_reward)
    if rules.overlong_tokens:
        penalty = rules.overlong_penalty * overlong(rollouts.lengths, rollouts.tokens.shape[1], rules.overlong_tokens)
        reward, verdicts = (
            reward + np.where(plan.row_mask, penalty, np.float32(0)),
            with_part("length", penalty, verdicts),
        )
    num_correct, num_evidence = (
        np.bincount(plan.group_ids[chosen], minlength=len(plan.visit_ids)).astype(np.int32)
        for chosen in (success, judged)
    )
    prompt_ids = np.maximum(plan.prompt_ids, 0)
    row_mask = plan.row_mask & ~cut if rules.truncated == "mask" else plan.row_mask
    prompt_tokens, prompt_lengths = prompts.rows(prompt_ids, prompts.longest)
    batch = Batch(
        prompt_tokens=prompt_tokens,
        prompt_lengths=prompt_lengths,
        tokens=np.asarray(rollouts.tokens),
        lengths=np.asarray(rollouts.lengths),
        log_probs=np.asarray(rollouts.log_probs),
        reward=reward,
        group_ids=plan.group_ids,
        row_mask=row_mask if beliefs is None else row_mask & judged,
        row_weight=np.ones(len(reward), np.float32),
        alpha=None if beliefs is None else beliefs.alpha[plan.group_ids],
        beta=None if beliefs is None else beliefs.beta[plan.group_ids],
        judged=judged,
    )
    return ScoredStep(plan, batch, num_correct, num_evidence, cut, completions, verdicts, seconds)


def overlong(lengths: np.ndarray, limit: int, last: int) -> np.ndarray:
    """[R] float32 in [-1, 0]: 0 for completions that leave `last` of `limit` tokens, then linear, to -1 at the limit.

    lengths: [R] int tokens. Source: DAPO's soft overlong punishment, Yu et al. 2025 (arXiv 2503.14476), equation 13.
    """
    return np.clip((limit - last - lengths) / last, -1, 0).astype(np.float32)


def with_part(name: str, values: np.ndarray, verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts with one more part of their rewards, of these values [R]. What was one number becomes CORRECT."""
    return [
        each._replace(parts={**(each.parts or {CORRECT: each.reward}), name: float(value)}) if each.status else each
        for each, value in zip(verdicts, values, strict=True)
    ]


def visit_rate_weights(plan: StepPlan, allocation: AllocatorState, clip: float) -> tuple[np.ndarray, float]:
    """[R] float32 weights that undo the rate at which an allocation visits a prompt; their mean over real rows is 1.

    A prompt's rate is its rollouts so far, this epoch's included, over their mean; clipped to [1 / clip, clip]. Also
    returns the share of rows whose rate was clipped. Reads [N] counts from the device.
    """
    rollouts = np.asarray(allocation.cumulative_rollouts + allocation.reserved)
    rate = (rollouts / max(rollouts.mean(), 1e-9))[np.maximum(plan.prompt_ids, 0)]
    held = np.clip(rate, 1 / clip, clip)
    weight = np.where(plan.row_mask, 1 / held, 0.0)
    clipped = (held != rate)[plan.row_mask].mean()
    return (weight * plan.row_mask.sum() / weight.sum()).astype(np.float32), float(clipped)


def step_metrics(step: ScoredStep) -> dict:
    """What the metrics file says of a step's rollouts: who was drawn how often, what came of it, and the shares.

    "entropy": of the policy, nats a token: the mean of -log p over the tokens drawn, which has that as its expectation
    where they were drawn from the whole vocabulary.
    """
    plan, used = step.plan, step.plan.visit_ids >= 0
    drawn, lengths = plan.row_mask, step.batch.lengths[plan.row_mask]
    effective = (step.num_correct > 0) & (step.num_correct < step.num_evidence)
    status, rewards = Counter(each.status for each in step.verdicts), mean_parts(each.parts for each in step.verdicts)
    return {
        "prompt_ids": plan.visit_ids[used].tolist(),
        "num_rollouts": plan.visit_sizes[used].tolist(),
        "num_correct": step.num_correct[used].tolist(),
        "num_evidence": step.num_evidence[used].tolist(),
        "reward": float(step.batch.reward[drawn].mean()),
        "effective_share": float(effective[used].mean()),
        "live_share": float(live_rows(step.batch).sum() / drawn.sum()),
        "fill": float(drawn.mean()),
        "truncated_share": float(step.truncated[drawn].mean()),
        "completion_tokens": float(lengths.mean()),
        "entropy": -float(step.batch.log_probs[drawn].sum(dtype=np.float64) / max(lengths.sum(), 1)),
        "status": {name: status[name] for name in STATUSES},
    } | ({"rewards": rewards} if rewards else {})


def step_samples(step: ScoredStep) -> list[dict]:
    """One rollout of each visit, its first, for a person to read."""
    plan = step.plan
    first = [int(np.argmax(plan.row_mask & (plan.group_ids == visit))) for visit in np.flatnonzero(plan.visit_ids >= 0)]
    return [
        {
            "prompt_id": int(plan.prompt_ids[row]),
            "completion": step.completions[row],
            "extracted": step.verdicts[row].extracted,
            "status": step.verdicts[row].status,
            "reward": float(step.batch.reward[row]),
            "length": int(step.batch.lengths[row]),
        }
        | ({"rewards": step.verdicts[row].parts} if step.verdicts[row].parts else {})
        for row in first
    ]
