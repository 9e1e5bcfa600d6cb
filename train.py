"""Post-train a policy by GRPO under one global budget of rollouts: allocate, sample, verify, settle, learn; repeat.

    python train.py configs/chain_sum.py --allocator.name=uniform --seed=3

The run ends when the budget is spent. Stopped at any time (SIGTERM, SIGINT, a crash), the same command goes on.
"""

import runpy
import sys
import time

import jax
import numpy as np

from cero_jax.checkpoint import Cursor, StopSignal
from cero_jax.config import Config, parse
from cero_jax.evaluate import evaluate
from cero_jax.learner import Batch, learning_rate
from cero_jax.report import draw_report
from cero_jax.rollout import live_rows, pack_live, sampling_inputs, score, step_row, visit_rate_weights
from cero_jax.rows import Rows
from cero_jax.run import Run, State, start


def main(config: Config) -> int:
    """Train until the budget is spent (returns 0) or a signal comes (128 + its number). Raises ValueError on bad input."""
    run, state, at = start(config)
    if at.finished:
        print(f"{run.directory} has spent its budget; to go on, give a larger allocator.total_budget and --extend=True")
    stop = StopSignal()
    waiting: list[Batch] = []  # rollouts with which dynamic sampling has not filled a step yet; a save waits for it
    if at.step == 0:
        log_evaluation(run, state, at)
    while not at.finished and not stop.number:
        if at.epoch_step == 0:  # a new round gets its share of what is left of the budget
            num_rollouts, allocation = run.allocate(state.allocation)
            state = state._replace(allocation=allocation, num_rollouts=num_rollouts)
        steps = run.plan(state.num_rollouts, at.epoch)
        while at.epoch_step < len(steps) and not (stop.number and not waiting):
            before, batch = at, steps[at.epoch_step :][: config.learner.steps_per_batch]
            state, at = train_on(run, state, at, batch, waiting)
            if at.spent // config.evaluation.every_rollouts > before.spent // config.evaluation.every_rollouts:
                log_evaluation(run, state, at)
            if at.step // config.checkpoint_every_steps > at.saved_step // config.checkpoint_every_steps and not waiting:
                at = run.save(state, at)
        if at.epoch_step >= len(steps):
            at = at._replace(epoch=at.epoch + 1, epoch_step=0, finished=not steps)
    if at.step > at.saved_step:
        if at.finished:
            log_evaluation(run, state, at)
        at = run.save(state, at)
    run.close()
    if at.finished:
        print(f"accuracy against rollouts, and who got them: {draw_report([run.directory], run.directory / 'report.png')}")
    else:
        print(f"stopped and saved at {at.spent:,} rollouts; the same command goes on from there")
    return 128 + stop.number if stop.number and not at.finished else 0


def train_on(run: Run, state: State, at: Cursor, batch: list[Rows], waiting: list[Batch]) -> tuple[State, Cursor]:
    """Draw the rollouts of a few steps from the policy as it is now, settle them, and take the steps."""
    config, seed, began = run.config, np.uint32(run.config.seed), time.perf_counter()
    inputs = [sampling_inputs(run.task.train, rows) for rows in batch]
    drawn = [run.sample(state.policy.params, seed, np.uint32(at.step + i), rows) for i, rows in enumerate(inputs)]
    jax.block_until_ready(drawn)  # the host must wait here: a verifier reads text
    sampled = time.perf_counter()
    scored = [score(run.task, rows, each, config) for rows, each in zip(batch, drawn, strict=True)]
    seconds = {"sample_seconds": sampled - began, "verify_seconds": time.perf_counter() - sampled}

    for rows, each in zip(batch, scored, strict=True):
        # The posterior learns what came of the rollouts, the ledger what they cost.
        allocation = run.update(state.allocation, rows.visit_ids, rows.visit_sizes, each.num_correct)
        state = state._replace(allocation=allocation)
        at = at._replace(step=at.step + 1, epoch_step=at.epoch_step + 1, spent=at.spent + int(rows.visit_sizes.sum()))
        train_batch = each.batch
        if config.dynamic_sampling:
            waiting.append(train_batch)
            if sum(live_rows(b).sum() for b in waiting) < config.learner.rows_per_step and at.spent < budget:
                continue
            train_batch = pack_live(waiting)
            waiting.clear()
        ...
    return state, at
