"""Post-train a policy by GRPO under one global budget of rollouts. Each epoch: allocate. Each batch: draw, verify. Each
step of a batch: settle (posterior and budget), learn (advantages and policy).

    python train.py configs/chain_sum.py --allocator.name=uniform --seed=3

The run ends when there is nothing left to allocate. Stopped by SIGTERM, SIGINT or a crash, the same command resumes it.
"""

import sys
import time
from contextlib import closing

from cero_jax import starting

if __name__ == "__main__":  # before the slow imports, which so leave no traceback
    starting.without_traceback()

import jax
import numpy as np

from cero_jax import hosts
from cero_jax.checkpoint import Cursor, fail_at_once
from cero_jax.command_line import from_command_line
from cero_jax.config import Config
from cero_jax.dry_run import dry_run
from cero_jax.dynamic_sampling import collect
from cero_jax.learner import learning_rate, rows_with_gradient
from cero_jax.packing import StepPlan
from cero_jax.rollout import ScoredStep, observed_tokens, sampling_batch, score_steps, step_metrics, visit_rate_weights
from cero_jax.run import Run, State, start
from cero_jax.sampler import Rollouts
from cero_jax.stop_signal import StopSignal, quit_while_starting
from cero_jax.verify import Verification


def main(config: Config) -> int:
    """Start or resume a run and train, from Python; returns the exit status. Raises ValueError on bad input first."""
    return dry_run(config) if config.dry_run else train(*start(config))


def train(run: Run, state: State, cursor: Cursor) -> int:
    """Train until budget or patience is spent (returns 0), or a signal (128 + its number) or trouble (1) is met."""
    if run.ended(cursor):  # a run that had ended, started again
        return run.finish(state, cursor)
    with closing(StopSignal()) as stop, closing(run.metrics):
        if cursor.accuracy is None:  # never evaluated: the point at 0 rollouts
            cursor = run.evaluate(state, cursor)
        while not (run.ended(cursor) or stop.agreed() or run.trouble(cursor)):
            state, cursor = train_epoch(run, state, cursor, stop)
        if run.ended(cursor) and cursor.evaluated < cursor.spent:
            cursor = run.evaluate(state, cursor)
        return run.finish(state, run.save(state, cursor), stop.agreed())


def train_epoch(run: Run, state: State, cursor: Cursor, stop: StopSignal) -> tuple[State, Cursor]:
    """One epoch, or what a resumed run has left of it. A signal or trouble ends it after a batch."""
    config = run.config
    if cursor.epoch_step == 0:
        state = allocate(run, state)
        run.log_epoch(state, cursor)
    epoch_plans = run.plan(state.num_rollouts, cursor.epoch)  # the same after a resume
    while cursor.epoch_step < len(epoch_plans):
        plans = epoch_plans[cursor.epoch_step :][: config.learner.steps_per_batch]
        rollouts, verification = draw(run, state, cursor, plans)
        for scored in verify(run, state, plans, rollouts, verification):
            state, cursor = settle(run, state, cursor, scored)
            state, cursor = learn(run, state, cursor, scored)
        if cursor.spent >= cursor.evaluated + config.evaluation.every_rollouts:
            cursor = run.evaluate(state, cursor)
        hosts.alike(run.checkpoints.check)  # a save goes on in the background, and may have failed there
        if cursor.step >= cursor.saved_step + config.checkpoint_every_steps:
            cursor = run.save(state, cursor)
        if stop.agreed() or run.trouble(cursor) or run.ended(cursor):  # after a batch: a resume would allocate again
            break
    if cursor.epoch_step == len(epoch_plans):
        # Nothing was left to allocate; but `cero_dual` may also leave an epoch empty that is not the last.
        finished = not epoch_plans and cursor.epoch + 1 >= config.allocator.num_epochs
        cursor = cursor._replace(epoch=cursor.epoch + 1, epoch_step=0, finished=finished)
    return state, cursor


def allocate(run: Run, state: State) -> State:
    """Give each prompt its rollouts of a new epoch, and reserve them out of what is left of the budget."""
    num_rollouts, allocator = run.allocate(state.allocator)
    return state._replace(allocator=allocator, num_rollouts=num_rollouts)


def draw(run: Run, state: State, cursor: Cursor, plans: list[StepPlan]) -> tuple[Rollouts, Verification]:
    """Draw the rollouts of a batch of steps, all from the present policy; each is verified as soon as it ends."""
    num_steps, seed = run.config.learner.steps_per_batch, np.uint32(run.config.seed)
    prompts = sampling_batch(run.task.train, plans, num_steps, state.mean_tokens)
    step_of_row = cursor.step + np.arange(num_steps, dtype=np.uint32).repeat(run.config.learner.rows_per_step)
    verification = Verification(run.task, prompts)
    return run.sample(run.params(state), seed, step_of_row, prompts, verification.on_end), verification


def verify(
    run: Run, state: State, plans: list[StepPlan], rollouts: Rollouts, verification: Verification
) -> list[ScoredStep]:
    """Wait for the rewards, and part the batch into steps: each with its rows, their rewards, and what was believed."""
    beliefs = run.beliefs(state, plans)
    return score_steps(run.task.train, plans, rollouts, *verification.result(), beliefs, run.config.rules)


def settle(run: Run, state: State, cursor: Cursor, scored: ScoredStep) -> tuple[State, Cursor]:
    """Take in what was drawn: its rewards move each prompt's posterior, its rollouts go from reserved to spent."""
    ids, sizes = scored.plan.visit_ids, scored.plan.visit_sizes  # a visit: a prompt's rollouts in one step
    allocator = run.update(state.allocator, sizes, scored.num_correct, prompt_ids=ids, num_evidence=scored.num_evidence)
    mean_tokens = observed_tokens(state.mean_tokens, scored.plan, scored.batch.lengths)
    spent = cursor.spent + int(sizes.sum())
    cursor = cursor._replace(step=cursor.step + 1, epoch_step=cursor.epoch_step + 1, spent=spent)
    return state._replace(allocator=allocator, mean_tokens=mean_tokens), cursor


def learn(run: Run, state: State, cursor: Cursor, scored: ScoredStep) -> tuple[State, Cursor]:
    """Move the policy by the advantages of a step's rollouts; it stays where no group of them has variance."""
    config, began = run.config.learner, time.perf_counter()
    batch, metrics = scored.batch, step_metrics(scored)
    if config.undo_visit_rate:
        weight, clipped = visit_rate_weights(scored.plan, state.allocator, config.visit_rate_clip)
        batch, metrics = batch._replace(row_weight=weight), metrics | {"visit_rate_clipped": clipped}
    if state.held is not None:  # dynamic sampling: live groups of several steps, once they fill one; None until then
        held, batch = collect(state.held, batch, run.config.allocator.min_group)
        state = state._replace(held=held)
    if batch is not None:
        advantages = run.learner.advantages(batch)
        if (rows := rows_with_gradient(batch, advantages, config)).any():
            rate = learning_rate(config, cursor.spent, run.config.allocator.total_budget)
            policy, measured = run.learner.step(state.policy, run.fixed, batch, advantages, np.float32(rate), rows)
            measured = {name: float(value) for name, value in jax.device_get(measured).items()}  # all else waits for it
            skipped = int(measured.pop("skipped"))  # 1: the gradient is no number, and nothing was moved
            metrics |= {"skipped_steps": 1} if skipped else measured | {"learning_rate": rate}
            cursor = cursor._replace(optimizer_steps=cursor.optimizer_steps + 1 - skipped)
            state = state._replace(policy=policy)
    return state, run.log_step(cursor, scored, metrics, learn_seconds=time.perf_counter() - began)


if __name__ == "__main__":
    try:
        with quit_while_starting():
            hosts.join()
            config = from_command_line(sys.argv[1:])
            started = sys.exit(dry_run(config)) if config.dry_run else start(config)
    except Exception:
        fail_at_once(ValueError, OSError)
    try:
        sys.exit(train(*started))
    except Exception:
        fail_at_once(OSError, FloatingPointError)  # the latter: a policy that is no number, not worth saving
