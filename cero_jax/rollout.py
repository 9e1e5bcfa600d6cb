"""One step's rollouts between sampler and learner: prompts in, scored rows out. The host's part of the loop, in NumPy.

Letters: R rows of a step, U visits (groups) in it, P prompt tokens, T completion tokens.
"""

from collections import Counter
from typing import Literal, NamedTuple

import numpy as np

from cero_jax.allocator.base import AllocatorState
from cero_jax.data import Prompts, Task
from cero_jax.evaluate import Verified
from cero_jax.learner import Batch
from cero_jax.packing import StepPlan
from cero_jax.rewards import STATUSES, TIMED_OUT, Verdict
from cero_jax.sampler import Rollouts


class Scored(NamedTuple):
    """A step's rollouts with their rewards."""

    batch: Batch  # [R] rows, in NumPy
    num_correct: np.ndarray  # [U] int32, successes of each visit
    num_evidence: np.ndarray  # [U] int32, its rows but those whose verification timed out
    truncated: np.ndarray  # [R] bool
    completions: list[str]  # [R] text, "" for padding
    verdicts: list[Verdict]  # [R]
    seconds: dict[str, float]  # what drawing and verifying took, for the log


def sampling_inputs(
    prompts: Prompts, steps: list[StepPlan], num_steps: int, mean_tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """What the sampler takes for steps drawn from one policy: each visit's prompt once, and the rows, step by step.

    Fewer than num_steps are padded with masked rows. mean_tokens: [N] float32, of each prompt's completions so far.
    """
    blank = steps[0]._replace(row_mask=np.zeros_like(steps[0].row_mask))
    fields = zip(*steps, *[blank] * (num_steps - len(steps)), strict=True)
    rows = StepPlan(*(np.concatenate(field) for field in fields))
    first_visit = np.arange(num_steps, dtype=np.int32) * len(blank.visit_ids)
    visits = np.maximum(rows.visit_ids, 0)  # an unused visit prefills prompt 0, and no row reads it
    prompt_ids = np.maximum(rows.prompt_ids, 0)
    return {
        "prompt_tokens": prompts.tokens[visits],
        "prompt_lengths": prompts.lengths[visits],
        "prompt_of_row": rows.group_ids + np.repeat(first_visit, len(blank.row_mask)),
        "row_mask": rows.row_mask,
        "prompt_ids": prompt_ids,
        "rollout_index": rows.rollout_index,
        "expected_tokens": mean_tokens[prompt_ids],
    }


def observed_tokens(mean_tokens: np.ndarray, rows: StepPlan, lengths: np.ndarray) -> np.ndarray:
    """The mean_tokens [N] float32 after a step: half of what was, half of what its completions [R] took."""
    ids, lengths = rows.prompt_ids[rows.row_mask], lengths[rows.row_mask]
    seen, place = np.unique(ids, return_inverse=True)
    means = np.bincount(place, lengths) / np.bincount(place)
    mean_tokens = mean_tokens.copy()
    mean_tokens[seen] = (mean_tokens[seen] + means.astype(np.float32)) / 2
    return mean_tokens


def step_of(i: int, num_rows: int, rollouts: Rollouts, verified: Verified) -> tuple[Rollouts, Verified]:
    """The rows of step `i` of those that were drawn together, num_rows [R] each."""
    here = slice(i * num_rows, (i + 1) * num_rows)
    completions, verdicts, reward = verified
    return Rollouts(*(each[here] for each in rollouts)), Verified(completions[here], verdicts[here], reward[here])


def score(
    task: Task,
    rows: StepPlan,
    rollouts: Rollouts,
    verified: Verified,
    truncated: Literal["wrong", "mask"],
    success_threshold: float,
    seconds: dict[str, float],
) -> Scored:
    """What a step's rollouts came to. A truncated one has reward 0; under `mask` it is out of the loss and its group.

    It is evidence all the same: a prompt whose completions never end in time would otherwise look untried for ever. One
    whose verification timed out has reward 0 and is none: that says nothing of the policy.
    """
    completions, verdicts, reward = verified
    cut = np.asarray(rollouts.truncated) & rows.row_mask
    judged = rows.row_mask & np.array([each.status != TIMED_OUT for each in verdicts])
    success = judged & (reward >= success_threshold)
    num_correct, num_evidence = (
        np.bincount(rows.group_ids[chosen], minlength=len(rows.visit_ids)).astype(np.int32)
        for chosen in (success, judged)
    )
    prompt_ids = np.maximum(rows.prompt_ids, 0)
    batch = Batch(
        prompt_tokens=task.train.tokens[prompt_ids],
        prompt_lengths=task.train.lengths[prompt_ids],
        tokens=np.asarray(rollouts.tokens),
        lengths=np.asarray(rollouts.lengths),
        log_probs=np.asarray(rollouts.log_probs),
        reward=reward,
        group_ids=rows.group_ids,
        row_mask=rows.row_mask & ~cut if truncated == "mask" else rows.row_mask,
        row_weight=np.ones(len(reward), np.float32),
    )
    return Scored(batch, num_correct, num_evidence, cut, completions, verdicts, seconds)


def live_rows(batch: Batch) -> np.ndarray:
    """[R] bool, the rows whose group holds two different rewards: those with a gradient."""
    highest, lowest = np.full(len(batch.reward), -np.inf), np.full(len(batch.reward), np.inf)
    np.maximum.at(highest, batch.group_ids[batch.row_mask], batch.reward[batch.row_mask])
    np.minimum.at(lowest, batch.group_ids[batch.row_mask], batch.reward[batch.row_mask])
    return (highest > lowest)[batch.group_ids] & batch.row_mask


def pack_live(batches: list[Batch], min_group: int) -> tuple[Batch, bool]:
    """One step's rows from several batches of R: their live groups, whole and in order, as many as R holds; padding.

    DAPO's dynamic sampling (Yu et al. 2025): what has no variance was drawn and charged, and is left out. Also returns
    whether the step is full: no group of `min_group` would fit any more, or a live group did not.
    """
    num_rows = len(batches[0].reward)
    groups, full = [], False  # (batch, rows) of each live group
    room = num_rows
    for batch in batches:
        live = live_rows(batch)
        for group in np.unique(batch.group_ids[live]):
            members = np.flatnonzero(live & (batch.group_ids == group))
            if len(members) <= room:
                groups.append((batch, members))
                room -= len(members)
            else:
                full = True
    packed = Batch(*(np.concatenate([column[:0], *(getattr(b, name)[m] for b, m in groups)])
                     for name, column in zip(Batch._fields, batches[0], strict=True)))  # fmt: skip
    sizes = [len(members) for _, members in groups]
    packed = packed._replace(group_ids=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    padded = Batch(*(np.pad(column, [(0, room)] + [(0, 0)] * (column.ndim - 1)) for column in packed))
    return padded, full or room < min_group


def visit_rate_weights(rows: StepPlan, allocation: AllocatorState, clip: float) -> tuple[np.ndarray, float]:
    """[R] float32 weights that undo the rate at which an allocation visits a prompt; their mean over real rows is 1.

    A prompt's rate is its rollouts so far, this round's included, over their mean; held within a factor of `clip`. Also
    returns the share of rows whose rate was held. Reads [N] counts from the device.
    """
    rollouts = np.asarray(allocation.cumulative_rollouts + allocation.reserved)
    rate = (rollouts / max(rollouts.mean(), 1e-9))[np.maximum(rows.prompt_ids, 0)]
    held = np.clip(rate, 1 / clip, clip)
    weight = np.where(rows.row_mask, 1 / held, 0.0)
    clipped = (held != rate)[rows.row_mask].mean()
    return (weight * rows.row_mask.sum() / weight.sum()).astype(np.float32), float(clipped)


def step_row(rows: StepPlan, scored: Scored) -> dict:
    """What the metrics file says of a step's rollouts: who was drawn how often, what came of it, and the shares."""
    used = rows.visit_ids >= 0
    drawn, lengths = rows.row_mask, scored.batch.lengths[rows.row_mask]
    status = Counter(each.status for each in scored.verdicts)
    return {
        "prompt_ids": rows.visit_ids[used].tolist(),
        "num_rollouts": rows.visit_sizes[used].tolist(),
        "num_correct": scored.num_correct[used].tolist(),
        "num_evidence": scored.num_evidence[used].tolist(),
        "reward": float(scored.batch.reward[drawn].mean()),
        "live_share": float(live_rows(scored.batch).sum() / drawn.sum()),
        "fill": float(drawn.mean()),
        "truncated_share": float(scored.truncated[drawn].mean()),
        "completion_tokens": float(lengths.mean()),
        "status": {name: status[name] for name in STATUSES},
    }


def step_samples(rows: StepPlan, scored: Scored) -> list[dict]:
    """One rollout of each visit, its first, for a person to read."""
    first = [int(np.argmax(rows.row_mask & (rows.group_ids == visit))) for visit in np.flatnonzero(rows.visit_ids >= 0)]
    return [
        {
            "prompt_id": int(rows.prompt_ids[row]),
            "completion": scored.completions[row],
            "extracted": scored.verdicts[row].extracted,
            "status": scored.verdicts[row].status,
            "reward": float(scored.batch.reward[row]),
            "length": int(scored.batch.lengths[row]),
        }
        for row in first
    ]
