"""What a run is made of: every piece built and checked from the config; the state, fresh or the latest checkpoint's."""

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from cero_jax import lora, memory, sharding
from cero_jax.allocator.base import AllocateFn, AllocatorState, UpdateFn
from cero_jax.allocator.posterior import under_fitted_prior
from cero_jax.checkpoint import Checkpoints, Cursor
from cero_jax.config import Config, check_saved_as_it_is, to_json
from cero_jax.data import Prompts, Task, epoch_order, prompt_widths, prompts_hash
from cero_jax.evaluation import evaluate, scores_table
from cero_jax.grpo import BY_POSTERIOR
from cero_jax.huggingface import weights
from cero_jax.huggingface.families import read_config
from cero_jax.huggingface.tokenizer import FolderTokenizer
from cero_jax.learner import Fixed, Learner, TrainState, make_learner
from cero_jax.metrics import MetricsWriter, Progress
from cero_jax.model import Dtype, Params, init_params
from cero_jax.packing import StepPlan, plan
from cero_jax.report.mechanism import epoch_row
from cero_jax.report.picture import draw_report
from cero_jax.report.read_run import read_run
from cero_jax.report.summary import describe
from cero_jax.rollout import Beliefs, ScoredStep, step_samples
from cero_jax.run_directory import check_resumable, open_run_dir, write_settings
from cero_jax.sampler import Sampler, make_sampler
from cero_jax.warm_start import warm_start


class State(NamedTuple):
    """Everything that training moves. A checkpoint holds all of it."""

    policy: TrainState
    allocator: AllocatorState  # each prompt's posterior, and the ledger of the budget
    num_rollouts: Array  # [N] int32, of the epoch under way
    mean_tokens: np.ndarray  # [N] float32, of each prompt's completions; max_completion_tokens until one is drawn


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
    metrics: MetricsWriter
    progress: Progress

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
        return self.checkpoints.save(cursor._replace(metrics_position=self.metrics.position()), state)

    def log_step(self, cursor: Cursor, step: ScoredStep, metrics: dict, learn_seconds: float) -> None:
        """Write what a step came to, some of its completions, and show it."""
        self.log("step", cursor, metrics, {"sample_seconds": step.seconds, "learn_seconds": learn_seconds})
        self.metrics.write_samples("train", cursor.spent, step_samples(step))
        reward, live = metrics["reward"], metrics["live_share"]
        self.progress.update(cursor.spent, epoch=cursor.epoch, reward=reward, accuracy=cursor.accuracy, live=live)

    def evaluate(self, state: State, cursor: Cursor) -> Cursor:
        """Measure held-out accuracy, write it, and show one completion."""
        began, config = time.perf_counter(), self.config
        policy, threshold = self.params(state), config.success_threshold
        result = evaluate(self.sample, policy, self.task, config.evaluation, config.seed, threshold)
        cursor = cursor._replace(accuracy=result.accuracy, evaluated=cursor.spent)
        self.log("eval", cursor, result.metrics(), {"eval_seconds": time.perf_counter() - began})
        self.metrics.write_samples("eval", cursor.spent, [each for each in result.samples if each["sample"] == 0])
        example = {key: shorten(str(value), 80, placeholder=" ...") for key, value in result.example.items()}
        line = f"{cursor.spent:>9,} rollouts: held-out accuracy {result.accuracy:.3f}; {example}"
        tqdm.write(line, file=sys.stderr)
        if cursor.finished:
            tqdm.write(scores_table(result.scores), file=sys.stderr)
        return cursor

    def export(self, state: State, cursor: Cursor) -> Path | None:
        """Write the trained policy as a Hugging Face folder in the run's directory, if it is not there; returns where.

        None for a run without a model_folder.
        """
        if self.config.model_folder is None:
            return None
        folder = self.directory / f"export-{cursor.spent}"
        if not folder.exists():
            weights.save(folder, self.config.model_folder, self.config.model, self.params(state))
        return folder

    def finish(self, state: State, cursor: Cursor, signal: int = 0) -> int:
        """Close; export the model and draw the report, or say how to go on. Returns the exit status."""
        self.close()
        if not cursor.finished:
            print(f"stopped and saved after {cursor.spent:,} rollouts; the same command goes on from there")
            return 128 + signal
        if folder := self.export(state, cursor):
            print(f"the trained model, for transformers or vLLM: {folder}")
        picture = self.directory / "report.png"
        draw_report([self.directory], picture)
        print(describe(read_run(self.directory)))
        spent, accuracy = cursor.spent, cursor.accuracy
        print(f"{spent:,} rollouts spent, held-out accuracy {accuracy:.3f}; who got them, and what for: {picture}")
        return 0

    def close(self) -> None:
        """Wait for what is still being written; raises what went wrong in it."""
        self.checkpoints.close()
        self.metrics.close()
        self.progress.close()


def build_task(config: Config) -> tuple[Config, Task]:
    """The task, and the config with what is not named filled in: by the allocator's rule, and from the model folder."""
    config = dataclasses.replace(config, allocator=config.allocator.resolved())
    if config.model_folder is None:
        return config, config.task.build(config.seed, None)
    kept = {name: getattr(config.model, name) for name in ("lora_rank", "lora_alpha", "remat")}
    model_config, _ = read_config(config.model_folder, **_dtypes(config))
    task = config.task.build(config.seed, FolderTokenizer(config.model_folder))
    return dataclasses.replace(config, model=dataclasses.replace(model_config, **kept)), task


def _dtypes(config: Config) -> dict[str, Dtype]:
    return {"param_dtype": config.model.param_dtype, "compute_dtype": config.model.compute_dtype}


def starting_policy(config: Config, task: Task, mesh: Mesh, cache_dir: Path) -> Params:
    """The policy that RL starts from, without adapters: the model folder's, or one warm-started here."""
    if config.model_folder is not None:
        return weights.load(config.model_folder, mesh, **_dtypes(config))[1]
    return warm_start(
        config.warm_start,
        dataclasses.replace(config.model, lora_rank=None),
        task,
        seed=config.seed,
        max_tokens=config.sampler.max_completion_tokens,
        mesh=mesh,
        cache_dir=cache_dir,
    )


def _check_context(config: Config, task: Task) -> None:
    """Raise ValueError where a prompt and its completion may be longer than the model's context."""
    longest = max(task.train.longest, task.heldout.longest)
    limit, completion = config.model.max_positions, config.sampler.max_completion_tokens
    if limit is not None and longest + completion > limit:
        raise ValueError(
            f"prompts of up to {longest} tokens and sampler.max_completion_tokens={completion} exceed the model's "
            f"context of {limit} tokens: lower task.max_prompt_tokens to {max(limit - completion, 1)}, or the other"
        )


def check_same_start(cursor: Cursor, params: Params, config: Config) -> Cursor:
    """The cursor with the hash of the parameters that RL started from. Raises ValueError where it began from others."""
    found = weights.fingerprint(params)
    if cursor.start_hash not in ("", found):
        source = config.model_folder or "the warm start in the cache beside the run"
        raise ValueError(f"{source}: not the weights that this run started from, which it still needs: put those back")
    return cursor._replace(start_hash=found)


def fresh_adapters(config: Config, vocab_size: int, learner: Learner) -> Params:
    """Fresh adapters: B is zero, so the policy is unchanged. The jitted function computes no other parameter."""

    def adapters() -> Params:
        return lora.split(init_params(config.model, vocab_size, config.seed))[1]

    return jax.jit(adapters, out_shardings=learner.shardings.params)()


def _check_rows(config: Config, mesh: Mesh) -> None:
    """Raise ValueError where what is drawn at once does not divide over the mesh."""
    rows, slots, shards = config.evaluation.rows, config.sampler.slots, sharding.row_shards(mesh)
    if rows % shards or (slots or 0) % shards:
        raise ValueError(
            f"evaluation.rows={rows} and sampler.slots={slots} must be multiples of data x fsdp = {shards}"
        )


def widths_of(config: Config, *parts: Prompts) -> tuple[int, ...]:
    """The few widths that the prompts of all `parts` are padded to."""
    return prompt_widths(np.concatenate([part.lengths for part in parts]), config.sampler.max_completion_tokens)


def sampler_of(config: Config, task: Task, mesh: Mesh) -> Sampler:
    """The sampler for the task's prompts, those to train on and those held out."""
    tokenizer, widths = task.tokenizer, widths_of(config, task.train, task.heldout)
    return make_sampler(config.model, config.sampler, tokenizer.eos_ids, tokenizer.pad_id, mesh, widths)


def start(config: Config) -> tuple[Run, State, Cursor]:
    """Build, check and restore. Raises ValueError on bad input, before any work is done or lost."""
    check_saved_as_it_is(config)
    config, task = build_task(config)
    num_prompts, tokenizer = len(task.train.questions), task.tokenizer
    assert config.allocator.prior is not None  # filled in
    config.check(num_prompts)
    _check_context(config, task)
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(config, mesh)
    everywhere = sharding.replicated(mesh)
    allocator = config.allocator.build(config.learner.advantage)
    temperature, widths = config.sampler.temperature, widths_of(config, task.train)
    learner = make_learner(config.model, tokenizer.vocab_size, config.learner, temperature, mesh, widths)
    sample = sampler_of(config, task, mesh)
    print(memory_needed(config, task, mesh))
    directory, cache_dir = open_run_dir(config)

    checkpoints = Checkpoints(directory / "checkpoints")
    fresh = Cursor(config=to_json(config), prompts_hash=prompts_hash(task.train))
    cursor = checkpoints.cursor() or fresh
    check_resumable(cursor, config, fresh.prompts_hash)
    write_settings(directory, config, task)

    frozen, params = {}, starting_policy(config, task, mesh, cache_dir)
    if config.model.lora_rank or config.learner.kl_coef:
        cursor = check_same_start(cursor, params, config)
    if config.model.lora_rank:
        frozen, params = params, fresh_adapters(config, tokenizer.vocab_size, learner)
    # A copy: the step donates the parameters it is given.
    ref_params = jax.tree.map(jnp.copy, params) if config.learner.kl_coef else None
    at_start = allocator.init(num_prompts, config.seed), jnp.zeros(num_prompts, jnp.int32)
    allocator_state, num_rollouts = jax.device_put(at_start, everywhere)
    mean_tokens = np.full(num_prompts, config.sampler.max_completion_tokens, np.float32)
    state = State(learner.init(params), allocator_state, num_rollouts, mean_tokens)
    if cursor.checkpoint_number:
        state = checkpoints.restore(cursor, like=state)
    if config.extend:
        total = jax.device_put(jnp.int32(config.allocator.total_budget), everywhere)
        ledger = state.allocator.ledger._replace(total=total)
        state = state._replace(allocator=state.allocator._replace(ledger=ledger))
        cursor = cursor._replace(finished=False, config=fresh.config)
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
        fixed=Fixed(frozen, ref_params),
        checkpoints=checkpoints,
        metrics=MetricsWriter(directory, position=cursor.metrics_position),
        progress=Progress(total=config.allocator.total_budget, initial=cursor.spent),
    )
    held, total = len(task.heldout.questions), config.allocator.total_budget
    print(
        f"{config.name}, {config.allocator.name}: {num_prompts:,} prompts, {held:,} held out; {cursor.spent:,} of "
        f"{total:,} rollouts spent; {directory}"
    )
    if cursor.finished:
        print(f"{directory} has spent its budget; to go on, give a larger allocator.total_budget and --extend=True")
    return run, state, cursor


def believe(allocator: AllocatorState, prompt_ids: Array, prior: tuple[float, float]) -> tuple[Array, Array]:
    """The posterior of these prompts' success, alpha and beta [U], under the prior fitted to the population."""
    alpha, beta = under_fitted_prior(allocator.alpha, allocator.beta, prior)
    ids = jnp.maximum(prompt_ids, 0)  # an unused visit reads prompt 0, and no row looks at it
    return alpha[ids], beta[ids]


def memory_needed(config: Config, task: Task, mesh: Mesh) -> str:
    """What the run needs of each device, in words."""
    needed = memory.estimate(
        config.model,
        task.tokenizer.vocab_size,
        config.learner,
        config.sampler,
        config.evaluation,
        mesh,
        prompt_widths=widths_of(config, task.train, task.heldout),
        min_group=config.allocator.min_group,
    )
    return memory.memory_report(needed, memory.device_bytes())
