"""What a run is made of: every piece built and checked from the config; the state, fresh or the latest checkpoint's."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cero_jax import best, dynamic_sampling, health, hosts, lora, sharding
from cero_jax.allocator.base import AllocateFn, AllocatorState, UpdateFn
from cero_jax.allocator.posterior import under_fitted_prior
from cero_jax.checkpoint import Checkpoints, Cursor
from cero_jax.config import Config
from cero_jax.data import Task, epoch_order, prompts_hash
from cero_jax.evaluation import evaluate, scores_table
from cero_jax.grpo import BY_POSTERIOR
from cero_jax.health import Health
from cero_jax.huggingface import hub, weights
from cero_jax.initial_policy import (
    abstract_policy,
    check_same_start,
    kept_from_start,
    needs_start,
    starting_policy,
)
from cero_jax.learner import Batch, Fixed, Learner
from cero_jax.metrics import MetricsWriter, Progress, Unwritten, say_once
from cero_jax.model import Params
from cero_jax.optimizer import TrainState
from cero_jax.pace import Clock, Profile
from cero_jax.packing import StepPlan, plan
from cero_jax.pieces import build, memory_needed, slow_here, starting_allocator
from cero_jax.report.mechanism import epoch_row
from cero_jax.report.picture import draw_report
from cero_jax.report.read_run import read_run
from cero_jax.report.summary import describe
from cero_jax.rollout import Beliefs, ScoredStep, step_samples
from cero_jax.run_directory import (
    changes_to_say,
    check_alike,
    check_resumable,
    check_shared,
    check_work_dir,
    devices_here,
    open_run_dir,
    set_metrics_aside,
    write_settings,
)
from cero_jax.sampler import Sampler
from cero_jax.saved_config import check_saved_as_it_is, to_json
from cero_jax.terminal import one_line, printable
from cero_jax.weights_and_biases import WeightsAndBiases, new_id


class State(NamedTuple):
    """Everything that training moves. A checkpoint holds all of it."""

    policy: TrainState
    allocator: AllocatorState  # each prompt's posterior, and the ledger of the budget
    num_rollouts: Array  # [N] int32, of the epoch under way
    mean_tokens: np.ndarray  # [N] float32, of each prompt's completions; max_completion_tokens until one is drawn
    held: Batch | None = None  # [R] rows of live groups that wait for others, under dynamic sampling; else None


class Run(NamedTuple):
    """Everything that stays: what training reads, and what it calls."""

    config: Config
    directory: Path
    task: Task
    sample: Sampler
    learner: Learner
    allocate: AllocateFn  # jitted, as are `update` and all of the learner
    update: UpdateFn
    believe: Callable  # jitted: (AllocatorState, prompt_ids [U]) -> alpha, beta [U], under the prior fitted to all
    fixed: Fixed
    checkpoints: Checkpoints
    metrics: MetricsWriter | Unwritten
    progress: Progress | Unwritten
    clock: Clock
    profile: Profile

    def params(self, state: State) -> Params:
        """The policy's parameters, those that are frozen among them."""
        return lora.join(self.fixed.frozen, state.policy.params)

    def plan(self, num_rollouts: Array, epoch: int) -> list[StepPlan]:
        """The steps of an epoch. Reads [N] counts from the device, once an epoch: they decide how rows are laid."""
        counts = np.asarray(num_rollouts)
        return plan(
            counts,
            epoch_order(len(counts), self.config.seed, epoch),
            rows_per_step=self.config.learner.rows_per_step,
            min_group=self.config.allocator.min_group,
        )

    def beliefs(self, state: State, plans: list[StepPlan]) -> list[Beliefs] | list[None]:
        """What is held of each step's prompts before they are drawn, where advantages are taken over that."""
        if self.config.learner.advantage not in BY_POSTERIOR:
            return [None] * len(plans)
        # Read from the device, a few numbers a visit: the rows are laid out on the host.
        return [Beliefs(*jax.device_get(self.believe(state.allocator, plan.visit_ids))) for plan in plans]

    def log(self, kind: str, cursor: Cursor, metrics: dict, seconds: dict) -> None:
        """Write a row of metrics, with where in the run it was taken."""
        where = {name: getattr(cursor, name) for name in ("step", "epoch", "spent", "optimizer_steps")}
        self.metrics.write({"kind": kind} | where | metrics, seconds)

    def log_epoch(self, state: State, cursor: Cursor) -> None:
        """Write who gets the epoch that was just allocated, beside what is believed of all prompts."""
        # Reads four numbers a prompt from the device, once an epoch, before any of it is drawn; `plan` waits there too.
        ids = np.arange(len(state.mean_tokens), dtype=np.int32)
        believed = self.believe(state.allocator, ids), state.num_rollouts, state.allocator.cumulative_rollouts
        (alpha, beta), rollouts, before = jax.device_get(believed)
        if rollouts.any():
            allocator = self.config.allocator
            ahead = cursor.spent - cursor.epoch * allocator.total_budget / allocator.num_epochs
            row = epoch_row(alpha.astype(float), beta.astype(float), rollouts, before)
            self.log("epoch", cursor, row | {"ahead": ahead}, {})

    def save(self, state: State, cursor: Cursor) -> Cursor:
        """Checkpoint the state, with how far the metrics files reach."""
        with self.clock.beside():
            return self.checkpoints.save(cursor._replace(metrics_position=self.metrics.position()), state)

    def log_step(self, cursor: Cursor, step: ScoredStep, metrics: dict, learn_seconds: float) -> Cursor:
        """Write what a step came to, some of its completions, and show it; say what goes wrong, and remember it."""
        seen, more, told = health.observe(Health(**cursor.health), step, metrics, self.task.train.answers)
        cursor = cursor._replace(health=seen._asdict())
        phases, stalled = self.clock.step(step.seconds, learn_seconds)
        for text in filter(None, [*told, stalled]):
            say_once(f"step {cursor.step}: {text}")
        timings = {"sample_seconds": step.seconds.of_a_step, "learn_seconds": learn_seconds} | phases
        self.log("step", cursor, metrics | more, timings)
        self.profile.at(cursor.step)
        self.metrics.write_samples("train", cursor.spent, step_samples(step))
        reward, live = metrics["reward"], metrics["live_share"]
        self.progress.update(cursor.spent, reward=reward, accuracy=cursor.accuracy, live=live, epoch=cursor.epoch)
        return cursor

    def trouble(self, cursor: Cursor) -> str:
        """Why the run has to save and stop; "" where it need not."""
        return health.trouble(Health(**cursor.health), self.config)

    def ended(self, cursor: Cursor) -> bool:
        """Whether the budget is spent, or the patience."""
        return cursor.finished or best.waited_enough(cursor, self.config.evaluation)

    def evaluate(self, state: State, cursor: Cursor) -> Cursor:
        """Measure held-out accuracy, write it, and show one completion."""
        began, config = time.perf_counter(), self.config
        policy, scale = self.params(state), (config.success_threshold, config.lowest_reward)
        with self.clock.beside():
            result = evaluate(self.sample, policy, self.task, config.evaluation, config.seed, *scale)
        cursor = best.measured(cursor, result.accuracy, config.evaluation)
        self.log("eval", cursor, result.metrics(), {"eval_seconds": time.perf_counter() - began})
        self.metrics.write_samples("eval", cursor.spent, [each for each in result.samples if each["sample"] == 0])
        example = ", ".join(f"{key} {one_line(repr(value), 80)}" for key, value in result.example.items())
        say_once(f"{cursor.spent:>9,} rollouts: held-out accuracy {result.accuracy:.3f}; {example}")
        if self.ended(cursor):
            say_once(scores_table(result.scores))
        return self.save(state, cursor) if best.is_to_be_kept(cursor) else cursor

    def export(self, state: State, cursor: Cursor) -> Path | None:
        """Write the trained policy as a Hugging Face folder in the run's directory, if it is not there; returns where.

        None for a run without a model_folder.
        """
        if self.config.model_folder is None:
            return None
        folder = self.directory / f"export-{cursor.spent}"
        if not hosts.of_first(folder.exists):
            with _written(folder):
                weights.save(folder, hub.model_folder(self.config.model_folder), self.config.model, self.params(state))
        return folder

    def finish(self, state: State, cursor: Cursor, signal: int = 0) -> int:
        """Close; export the model and draw the report, or say how to go on. Returns the exit status."""
        self.close()
        if not self.ended(cursor):
            why = self.trouble(cursor) or "the same command goes on from there"
            hosts.tell(f"stopped and saved after {cursor.spent:,} rollouts; {why}")
            self.metrics.end()
            return 128 + signal if signal else 1
        for text in health.at_the_end(Health(**cursor.health), state.held):
            hosts.tell(text)
        if folder := self.export(state, cursor):
            hosts.tell(f"the trained model, for transformers or vLLM: {folder}")
        self.finish_best(state)
        if not hosts.leads():
            return 0
        picture = self.directory / "report.png"
        with _written(picture):
            draw_report([self.directory], picture)
        self.metrics.end(picture)
        hosts.tell(printable(describe(read_run(self.directory))))
        spent, accuracy = cursor.spent, cursor.accuracy
        hosts.tell(f"{spent:,} rollouts spent, held-out accuracy {accuracy:.3f}; who got them, and what for: {picture}")
        return 0

    def finish_best(self, state: State) -> None:
        """Say which checkpoint holds the best policy, where it is kept, and export that."""
        if found := best.restored(self.directory, state.policy.params) if self.config.evaluation.keep_best else None:
            cursor, params = found
            folder = self.export(state._replace(policy=state.policy._replace(params=params)), cursor)
            hosts.tell(
                f"the best held-out accuracy, {cursor.accuracy:.3f} after {cursor.spent:,} rollouts: checkpoint "
                f"{cursor.checkpoint_number}{f', {folder}' if folder else ''}"
            )

    def close(self) -> None:
        """Wait for what is still being written; raises what went wrong in it."""
        self.checkpoints.close()
        self.metrics.close()
        self.progress.close()
        self.profile.close()


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Name what could not be written at the end of a run, and how it still will be."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}): make room or mend the folder; the same command writes it, without "
            "training again"
        ) from error


def saved_run(run_dir: Path) -> Cursor | None:
    """What the checkpoints in a run's directory know of it before it is built; None where there are none yet."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return None
    with closing(Checkpoints(folder, read_only=True)) as checkpoints:
        return checkpoints.newest_whole()


def start(config: Config) -> tuple[Run, State, Cursor]:
    """Build, check and restore. Raises ValueError on bad input, before any work is done or lost."""
    check_work_dir(config.run_dir)
    check_saved_as_it_is(config)
    check_shared(config.run_dir)
    now = hosts.of_first(lambda: datetime.now().isoformat(timespec="seconds"))
    begun = saved_run(config.run_dir) or Cursor({}, "", started=now)
    config, task, mesh, allocator, learner, sample = build(config, begun)
    num_prompts, tokenizer, everywhere = len(task.train.questions), task.tokenizer, sharding.replicated(mesh)
    assert config.allocator.prior is not None  # filled in
    for line in filter(None, (memory_needed(config, task, mesh), slow_here(config))):
        hosts.tell(line)
    fresh = Cursor(config=to_json(config), prompts_hash=prompts_hash(task.train), started=begun.started)
    check_alike(config, fresh.prompts_hash)
    directory, cache_dir = open_run_dir(config)

    checkpoints = Checkpoints(directory / "checkpoints")
    cursor = checkpoints.cursor() or fresh
    check_resumable(cursor, config, fresh.prompts_hash)
    hosts.of_first(lambda: write_settings(directory, config, task, fresh.prompts_hash))

    @partial(jax.jit, out_shardings=everywhere)
    def at_start() -> tuple[AllocatorState, Array]:
        return starting_allocator(allocator, config, task.train), jnp.zeros(num_prompts, jnp.int32)

    allocator_state, num_rollouts = at_start()
    mean_tokens = np.full(num_prompts, config.sampler.max_completion_tokens, np.float32)
    held = None
    if config.dynamic_sampling:
        width, limit = task.train.longest, config.sampler.max_completion_tokens
        held = dynamic_sampling.nothing_held(config.learner.rows_per_step, width, limit)
    policy = abstract_policy(config.model, tokenizer.vocab_size, learner)
    state = State(policy, allocator_state, num_rollouts, mean_tokens, held)
    if cursor.checkpoint_number:
        cursor, state = checkpoints.restore(cursor, like=state)
        check_resumable(cursor, config, fresh.prompts_hash)  # again: it may be an earlier one, under an earlier budget
        cursor = cursor._replace(health=health.tried_again(Health(**cursor.health), config)._asdict())
        for text in changes_to_say(cursor, config):
            say_once(text)
    else:
        hosts.of_first(lambda: set_metrics_aside(directory))
    fixed = Fixed({}, None)
    if needs_start(config, cursor):
        params = starting_policy(config, task, mesh, cache_dir)
        if config.model.lora_rank or config.learner.kl_coef:
            cursor = check_same_start(cursor, params, config)
        fixed, params = kept_from_start(config, tokenizer.vocab_size, learner, params)
        if not cursor.checkpoint_number:
            state = state._replace(policy=learner.init(params))
    if config.extend:
        total = sharding.place(np.int32(config.allocator.total_budget), everywhere)
        ledger = state.allocator.ledger._replace(total=total)
        state = state._replace(allocator=state.allocator._replace(ledger=ledger))
        cursor = cursor._replace(finished=False, config=fresh.config)
    writes = hosts.leads()
    cursor = cursor._replace(devices=devices_here())
    if config.wandb is not None:
        cursor = cursor._replace(wandb_id=cursor.wandb_id or hosts.of_first(new_id))
    run = Run(
        config=config,
        directory=directory,
        task=task,
        sample=sample,
        learner=learner,
        allocate=jax.jit(allocator.allocate, out_shardings=everywhere),
        # Every rollout of an epoch is drawn: release=False keeps the rest of a group cut over two steps reserved.
        update=jax.jit(partial(allocator.update, release=False), out_shardings=everywhere),
        believe=jax.jit(partial(believe, prior=config.allocator.prior), out_shardings=everywhere),
        fixed=fixed,
        checkpoints=checkpoints,
        metrics=hosts.alike(lambda: _writer(directory, cursor, config) if writes else Unwritten()),
        progress=Progress(total=config.allocator.total_budget, initial=cursor.spent) if writes else Unwritten(),
        clock=Clock(),
        profile=Profile(config.profile_steps, directory / "profile" / f"process-{jax.process_index()}"),
    )
    held, total = len(task.heldout.questions), config.allocator.total_budget
    hosts.tell(
        f"{config.name}, {config.allocator.name}: {num_prompts:,} prompts, {held:,} held out; {cursor.spent:,} of "
        f"{total:,} rollouts spent; {directory}"
    )
    if cursor.finished:
        hosts.tell(
            f"{directory} has spent its budget; to go on, give a larger allocator.total_budget and --extend=True"
        )
    elif run.ended(cursor):
        hosts.tell(f"{directory}: {cursor.since_best} evaluations without a better accuracy; to go on, give a larger "
                   "evaluation.patience")  # fmt: skip
    return run, state, cursor


def _writer(directory: Path, cursor: Cursor, config: Config) -> MetricsWriter:
    """What takes the run's metrics, W&B among it where that is asked for."""
    wandb = config.wandb and WeightsAndBiases(config.wandb, directory, cursor.wandb_id, to_json(config))
    return MetricsWriter(directory, cursor.metrics_position, wandb or None)


def believe(allocator: AllocatorState, prompt_ids: Array, prior: tuple[float, float]) -> tuple[Array, Array]:
    """The posterior of these prompts' success, alpha and beta [U], under the prior fitted to the population."""
    alpha, beta = under_fitted_prior(allocator.alpha, allocator.beta, prior)
    ids = jnp.maximum(prompt_ids, 0)  # an unused visit reads prompt 0, and no row looks at it
    return alpha[ids], beta[ids]
