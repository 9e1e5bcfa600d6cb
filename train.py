"""Post-train a policy by GRPO under one global budget of rollouts: allocate, draw, verify, settle, learn; repeat.

    python train.py configs/chain_sum.py --allocator.name=uniform --seed=3

The run ends when the budget is spent. Stopped at any time (SIGTERM, SIGINT, a crash), the same command goes on.
"""

import os
import sys
import time
import traceback

import jax
import numpy as np

from cero_jax.checkpoint import Cursor, StopSignal
from cero_jax.config import Config, from_command_line
from cero_jax.dynamic_sampling import Collector
from cero_jax.learner import learning_rate, rows_with_gradient
from cero_jax.packing import StepPlan
from cero_jax.rollout import ScoredStep, observed_tokens, sampling_batch, score_steps, step_metrics, visit_rate_weights
from cero_jax.run import Run, State, start
from cero_jax.sampler import Rollouts
from cero_jax.verify import Verification


def main(config: Config) -> int:
    """Start or resume a run and train; returns the exit status. Raises ValueError on bad input, before any work."""
    return train(*start(config))


def train(run: Run, state: State, cursor: Cursor) -> int:
    """Train until the budget is spent (returns 0) or a signal comes (128 + its number)."""
    if cursor.finished:  # a run that had ended, started again
        return run.finish(state, cursor)
    stop, collector = StopSignal(), Collector(run.config.allocator.min_group)
    if cursor.accuracy is None:  # the start of the curve
        cursor = run.evaluate(state, cursor)
    while not (cursor.finished or must_stop(stop, collector)):
        state, cursor = train_epoch(run, state, cursor, stop, collector)
    stop.close()
    collector.close()
    if cursor.finished and cursor.evaluated < cursor.spent:
        cursor = run.evaluate(state, cursor)
    return run.finish(state, run.save(state, cursor), stop.number)


def must_stop(stop: StopSignal, collector: Collector) -> bool:
    """Whether a signal came, and no rollouts are held that a checkpoint would lose."""
    return bool(stop.number) and not collector.held


def train_epoch(run: Run, state: State, cursor: Cursor, stop: StopSignal, collector: Collector) -> tuple[State, Cursor]:
    """One epoch, or what a resumed run has left of it; a stop ends it behind a batch."""
    config = run.config
    if cursor.epoch_step == 0:
        state = allocate(run, state)
    plans = run.plan(state.num_rollouts, cursor.epoch)
    # The first batch is drawn whatever happens: an epoch allocated again after a resume would be reserved twice.
    while cursor.epoch_step < len(plans):
        batch = plans[cursor.epoch_step :][: config.learner.steps_per_batch]
        rollouts, verification = draw(run, state, cursor, batch)
        for step in verify(run, batch, rollouts, verification):
            state, cursor = settle(run, state, cursor, step)
            state, cursor = learn(run, state, cursor, step, collector)
        if cursor.spent >= cursor.evaluated + config.evaluation.every_rollouts:
            cursor = run.evaluate(state, cursor)
        if cursor.step >= cursor.saved_step + config.checkpoint_every_steps and not collector.held:
            cursor = run.save(state, cursor)
        if must_stop(stop, collector):
            break
    if cursor.epoch_step == len(plans):
        # An epoch without rollouts ends the run; `cero_dual` may have one before its last.
        finished = not plans and cursor.epoch + 1 >= config.allocator.num_epochs
        cursor = cursor._replace(epoch=cursor.epoch + 1, epoch_step=0, finished=finished)
    return state, cursor


def allocate(run: Run, state: State) -> State:
    """Give each prompt its rollouts of a new epoch; they are reserved out of what is left of the budget."""
    num_rollouts, allocation = run.allocate(state.allocation)
    return state._replace(allocation=allocation, num_rollouts=num_rollouts)


def draw(run: Run, state: State, cursor: Cursor, plans: list[StepPlan]) -> tuple[Rollouts, Verification]:
    """Draw the rollouts of the next steps from the policy as it is now; the verifier begins as the first ends."""
    num_steps = run.config.learner.steps_per_batch
    batch = sampling_batch(run.task.train, plans, num_steps, state.mean_tokens)
    step_of_row = cursor.step + np.arange(num_steps, dtype=np.uint32).repeat(run.config.learner.rows_per_step)
    verification = Verification(run.task, batch)
    params, seed = run.policy(state), np.uint32(run.config.seed)
    return run.sample(params, seed, step_of_row, batch, verification.on_end), verification


def verify(run: Run, plans: list[StepPlan], rollouts: Rollouts, verification: Verification) -> list[ScoredStep]:
    """Wait for the rewards, and give each step its rows with theirs."""
    rules = {"truncated": run.config.truncated, "success_threshold": run.config.success_threshold}
    verified, seconds = verification.result()
    return score_steps(run.task.train, plans, rollouts, verified, seconds, **rules)


def settle(run: Run, state: State, cursor: Cursor, step: ScoredStep) -> tuple[State, Cursor]:
    """Let the allocator take in what was drawn: the posterior of each prompt, and the budget that is spent."""
    plan = step.plan
    counts = {"prompt_ids": plan.visit_ids, "num_evidence": step.num_evidence}
    allocation = run.update(state.allocation, plan.visit_sizes, step.num_correct, **counts)
    mean_tokens = observed_tokens(state.mean_tokens, plan, step.batch.lengths)
    spent = cursor.spent + int(plan.visit_sizes.sum())
    cursor = cursor._replace(step=cursor.step + 1, epoch_step=cursor.epoch_step + 1, spent=spent)
    return state._replace(allocation=allocation, mean_tokens=mean_tokens), cursor


def learn(run: Run, state: State, cursor: Cursor, step: ScoredStep, collector: Collector) -> tuple[State, Cursor]:
    """Move the policy by the advantages of the step's rollouts; without a row that has a gradient it stays."""
    config, began = run.config.learner, time.perf_counter()
    batch, metrics = step.batch, step_metrics(step)
    if config.undo_visit_rate:
        weight, clipped = visit_rate_weights(step.plan, state.allocation, config.visit_rate_clip)
        batch, metrics = batch._replace(row_weight=weight), metrics | {"visit_rate_clipped": clipped}
    if run.config.dynamic_sampling:
        batch = collector.add(batch)
    if batch is not None and (rows := rows_with_gradient(batch, config)).any():
        advantages = run.learner.advantages(batch)
        rate = learning_rate(config, cursor.spent, run.config.allocator.total_budget)
        policy, measured = run.learner.step(state.policy, run.fixed, batch, advantages, np.float32(rate), rows)
        # Read at once: the next rollouts need this step, so the host has nothing else to do meanwhile.
        measured = {name: float(value) for name, value in jax.device_get(measured).items()}
        if not np.isfinite(measured["loss"] + measured["grad_norm"]):
            raise FloatingPointError(f"step {cursor.step}: {measured}: not finite; lower learner.learning_rate")
        metrics |= measured | {"learning_rate": rate}
        state, cursor = state._replace(policy=policy), cursor._replace(optimizer_steps=cursor.optimizer_steps + 1)
    run.log_step(cursor, step, metrics, learn_seconds=time.perf_counter() - began)
    return state, cursor


if __name__ == "__main__":
    try:
        started = start(from_command_line(sys.argv[1:]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped before the first step: the same command starts again", file=sys.stderr)
        sys.exit(130)
    try:
        status = train(*started)
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # behind a failed save, Orbax's writer threads wait for ever, and sys.exit would wait for them
    sys.exit(status)
