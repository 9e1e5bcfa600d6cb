"""Post-train a policy by GRPO under one global budget of rollouts: allocate, sample, verify, settle, learn; repeat.

    python train.py configs/chain_sum.py --allocator.name=uniform --seed=3

The run ends when the budget is spent. Stopped at any time (SIGTERM, SIGINT, a crash), the same command goes on.
"""

import os
import sys
import time
import traceback
from textwrap import shorten

import jax
import numpy as np
from tqdm import tqdm

from cero_jax.checkpoint import Cursor, StopSignal
from cero_jax.config import Config, from_command_line
from cero_jax.evaluate import draw_verified, evaluate, table
from cero_jax.learner import Batch, learning_rate
from cero_jax.packing import StepPlan
from cero_jax.report.picture import draw_report
from cero_jax.rollout import (
    Scored,
    live_rows,
    observed_tokens,
    pack_live,
    sampling_inputs,
    score,
    step_of,
    step_row,
    step_samples,
    visit_rate_weights,
)
from cero_jax.run import Run, State, start


def main(config: Config) -> int:
    """Start or resume a run and train; returns the exit status. Raises ValueError on bad input, before any work."""
    return train(*start(config))


def train(run: Run, state: State, at: Cursor) -> int:
    """Train until the budget is spent (returns 0) or a signal comes (128 + its number)."""
    config = run.config
    if at.finished:
        print(f"{run.directory} has spent its budget; to go on, give a larger allocator.total_budget and --extend=True")
        close(run, state, at)
        return 0
    stop = StopSignal()
    waiting: list[Batch] = []  # rollouts that dynamic sampling holds until they fill a step; no checkpoint until then
    if at.accuracy is None:
        at = log_evaluation(run, state, at)
    while not at.finished and not (stop.number and not waiting):
        if at.epoch_step == 0:  # a new round gets its share of what is left of the budget
            num_rollouts, allocation = run.allocate(state.allocation)
            state = state._replace(allocation=allocation, num_rollouts=num_rollouts)
        steps = run.plan(state.num_rollouts, at.epoch)
        # A round that is allocated is begun: allocated again after a resume, its rollouts would be reserved twice.
        while at.epoch_step < len(steps) and (at.epoch_step == 0 or not (stop.number and not waiting)):
            now = steps[at.epoch_step :][: config.learner.steps_per_batch]
            for rows, rollouts in zip(now, draw(run, state, at, now), strict=True):
                state, at = learn(run, state, at, rows, rollouts, waiting)
            if at.spent >= at.evaluated + config.evaluation.every_rollouts:
                at = log_evaluation(run, state, at)
            if at.step >= at.saved_step + config.checkpoint_every_steps and not waiting:
                at = run.save(state, at)
        if at.epoch_step == len(steps):
            # A round of `cero_dual` may be empty, so that an empty one is not the end before the last.
            finished = not steps and at.epoch + 1 >= config.allocator.num_epochs
            at = at._replace(epoch=at.epoch + 1, epoch_step=0, finished=finished)
    stop.close()
    if waiting:
        tqdm.write(
            f"{len(waiting)} batches of dynamic sampling fill no step: they are not learned from", file=sys.stderr
        )
    if at.finished and at.evaluated < at.spent:
        at = log_evaluation(run, state, at)
    close(run, state, run.save(state, at))
    return 0 if at.finished else 128 + stop.number


def draw(run: Run, state: State, at: Cursor, now: list[StepPlan]) -> list[Scored]:
    """Rollouts of the next optimiser steps, all from the policy as it is now, and their rewards."""
    config, began = run.config, time.perf_counter()
    size, num_steps = config.learner.rows_per_step, config.learner.steps_per_batch
    inputs = sampling_inputs(run.task.train, now, num_steps, np.asarray(state.mean_tokens))
    steps = at.step + np.repeat(np.arange(num_steps, dtype=np.uint32), size)
    drawn = draw_verified(run.sample, run.policy(state), config.seed, steps, inputs, run.task)
    seconds = {"sample_seconds": (time.perf_counter() - began) / len(now)}
    return [
        score(run.task, rows, *step_of(i, size, *drawn), config.truncated, config.success_threshold, seconds)
        for i, rows in enumerate(now)
    ]


def learn(
    run: Run, state: State, at: Cursor, rows: StepPlan, scored: Scored, waiting: list[Batch]
) -> tuple[State, Cursor]:
    """Settle a step's rollouts with the allocator, and move the policy by those whose group has variance."""
    config, began = run.config, time.perf_counter()
    allocation = run.update(state.allocation, rows.visit_ids, rows.visit_sizes, scored.num_correct, scored.num_evidence)
    at = at._replace(step=at.step + 1, epoch_step=at.epoch_step + 1, spent=at.spent + int(rows.visit_sizes.sum()))
    policy, batch, figures, full = state.policy, scored.batch, {}, True
    if config.learner.undo_visit_rate:
        weight, clipped = visit_rate_weights(rows, allocation, config.learner.visit_rate_clip)
        batch, figures = batch._replace(row_weight=weight), {"visit_rate_clipped": clipped}
    if config.dynamic_sampling:
        waiting.append(batch)
        batch, full = pack_live(waiting, config.allocator.min_group)
    live = live_rows(batch)
    wanted = batch.row_mask if config.learner.kl_coef else live  # without variance and without KL there is no gradient
    if full and wanted.any():
        waiting.clear()
        rate = learning_rate(config.learner, at.spent, config.allocator.total_budget)
        policy, measured = run.learner.step(policy, run.fixed, batch, np.float32(rate), live)
        # Read at once: the next rollouts need this step, so the host has nothing else to do meanwhile.
        figures |= {name: float(value) for name, value in measured.items()} | {"learning_rate": rate}
        if not np.isfinite(figures["loss"] + figures["grad_norm"]):
            raise FloatingPointError(f"step {at.step}: {figures}: not finite; lower learner.learning_rate")
        at = at._replace(optimizer_steps=at.optimizer_steps + 1)
    row = step_row(rows, scored) | figures
    run.log("step", at, row, scored.seconds | {"learn_seconds": time.perf_counter() - began})
    run.metrics.write_samples("train", at.spent, step_samples(rows, scored))
    run.progress.update(at.spent, epoch=at.epoch, reward=row["reward"], accuracy=at.accuracy, live=row["live_share"])
    # [N] numbers through the host, which orders the rollouts by them; kept in the state for a resume to order alike.
    mean_tokens = observed_tokens(np.asarray(state.mean_tokens), rows, scored.batch.lengths)
    return State(policy, allocation, state.num_rollouts, jax.device_put(mean_tokens, state.mean_tokens.sharding)), at


def log_evaluation(run: Run, state: State, at: Cursor) -> Cursor:
    """Measure held-out accuracy, and show one completion."""
    began = time.perf_counter()
    config = run.config
    result = evaluate(run.sample, run.policy(state), run.task, config.evaluation, config.seed, config.success_threshold)
    at = at._replace(accuracy=result.accuracy, evaluated=at.spent)
    run.log("eval", at, result.figures(), {"eval_seconds": time.perf_counter() - began})
    run.metrics.write_samples("eval", at.spent, [each for each in result.samples if each["sample"] == 0])
    example = {key: shorten(str(value), 80, placeholder=" ...") for key, value in result.example.items()}
    tqdm.write(f"{at.spent:>9,} rollouts: held-out accuracy {result.accuracy:.3f}; {example}", file=sys.stderr)
    if at.finished:
        tqdm.write(table(result.scores), file=sys.stderr)
    return at


def close(run: Run, state: State, at: Cursor) -> None:
    """Wait for what is still being written; export the model and draw the report, or say how to go on."""
    run.close()
    if not at.finished:
        print(f"stopped and saved after {at.spent:,} rollouts; the same command goes on from there")
        return
    if folder := run.export(state, at):
        print(f"the trained model, for transformers or vLLM: {folder}")
    picture = run.directory / "report.png"
    draw_report([run.directory], picture)
    print(f"{at.spent:,} rollouts spent, held-out accuracy {at.accuracy:.3f}; who got them, and what for: {picture}")


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
