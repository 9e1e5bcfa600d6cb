"""What a run is made of: every piece built and checked from the config; the state, fresh or the latest checkpoint's."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from cero_jax import lora, memory, sharding
from cero_jax.allocator.base import AllocatorState
from cero_jax.checkpoint import Checkpoints, Cursor
from cero_jax.config import Config, check_resumable, from_json, open_run_dir, to_json, write_settings
from cero_jax.data import Task, pass_order, prompts_hash
from cero_jax.huggingface import weights
from cero_jax.huggingface.families import read_config
from cero_jax.huggingface.tokenizer import FolderTokenizer
from cero_jax.learner import Fixed, Learner, TrainState, make_learner
from cero_jax.metrics import MetricsWriter, Progress
from cero_jax.model import Dtype, Params, init_params
from cero_jax.packing import StepPlan, plan
from cero_jax.sampler import Sampler, make_sampler
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.warm_start import warm_start


class State(NamedTuple):
    """Everything that training moves. A checkpoint holds all of it."""

    policy: TrainState
    allocation: AllocatorState
    num_rollouts: Array  # [N] int32, of the round under way
    mean_tokens: Array  # [N] float32, of each prompt's completions; until they are known the longest allowed


class Run(NamedTuple):
    """Everything that stays."""

    config: Config
    directory: Path
    task: Task
    sample: Sampler
    learner: Learner
    allocate: Callable  # jitted: AllocatorState -> (num_rollouts [N], AllocatorState)
    update: Callable  # jitted: (AllocatorState, prompt_ids [U], num_rollouts [U], num_correct [U]) -> AllocatorState
    fixed: Fixed
    checkpoints: Checkpoints
    metrics: MetricsWriter
    progress: Progress

    def policy(self, state: State) -> Params:
        """The policy's parameters, those that are frozen among them."""
        return lora.join(self.fixed.frozen, state.policy.params)

    def plan(self, num_rollouts: Array, epoch: int) -> list[StepPlan]:
        """The steps of a round. Reads [N] counts from the device, once a round: they decide how rows are laid."""
        counts = np.asarray(num_rollouts)
        return plan(
            counts,
            pass_order(len(counts), self.config.seed, epoch),
            rows_per_step=self.config.learner.rows_per_step,
            min_group=self.config.allocator.min_group,
        )

    def log(self, kind: str, at: Cursor, figures: dict, seconds: dict) -> None:
        """A row of the metrics, with where in the run it was taken."""
        where = {"step": at.step, "epoch": at.epoch, "spent": at.spent, "optimizer_steps": at.optimizer_steps}
        self.metrics.write({"kind": kind} | where | figures, seconds)

    def save(self, state: State, at: Cursor) -> Cursor:
        """Checkpoint the state, with how far the metrics files reach."""
        return self.checkpoints.save(at._replace(metrics=self.metrics.position()), state)

    def export(self, state: State, at: Cursor) -> Path | None:
        """Write the policy as a model folder within the run's, once, where it came from one; returns where."""
        if self.config.model_folder is None:
            return None
        folder = self.directory / f"export-{at.spent}"
        if not folder.exists():
            weights.save(folder, self.config.model_folder, self.config.model, self.policy(state))
        return folder

    def close(self) -> None:
        """Wait for what is still being written; raises what went wrong in it."""
        self.checkpoints.close()
        self.metrics.close()
        self.progress.close()


class Policy(NamedTuple):
    """A run's latest policy, to be measured."""

    config: Config
    task: Task
    sample: Sampler
    params: Params
    spent: int  # rollouts, when it was saved


def restore_policy(directory: Path, task_changes: dict, sampler_changes: dict) -> Policy:
    """The policy of a run's latest checkpoint; changes nothing in the directory, so that a live run may be measured.

    task_changes, sampler_changes: fields of config.task and config.sampler to replace.
    Raises FileNotFoundError where there is no run, ValueError where it has no checkpoint or a field does not fit.
    """
    path = Path(directory).absolute() / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: not the directory of a run")
    config = from_json(json.loads(path.read_text()))
    unknown = sorted(task_changes.keys() - {field.name for field in dataclasses.fields(config.task)})
    if unknown:
        raise ValueError(f"the run's task is {type(config.task).__name__}, which has no {', '.join(unknown)}")
    drawn_under = config.sampler
    config = dataclasses.replace(
        config,
        task=dataclasses.replace(config.task, **task_changes),
        sampler=dataclasses.replace(config.sampler, **sampler_changes),
    )
    if not (path.parent / "checkpoints").is_dir():
        raise ValueError(f"{path.parent}: no checkpoint in it yet: let the run go on")
    config, task = _model_and_task(config)
    try:
        mesh = sharding.make_mesh(config.mesh)
    except ValueError:  # of a run on other devices than those here
        mesh = sharding.make_mesh(sharding.MeshConfig())
    tokenizer = task.tokenizer
    checkpoints = Checkpoints(path.parent / "checkpoints", read_only=True)
    at = checkpoints.cursor()
    if at is None:
        raise ValueError(f"{path.parent}: no checkpoint in it yet: let the run go on")
    num_prompts = len(json.loads((path.parent / "prompts.json").read_text())["labels"])
    learner = make_learner(config.model, tokenizer.vocab_size, config.learner, 1.0, mesh)
    _, trained = lora.split(jax.eval_shape(lambda: init_params(config.model, tokenizer.vocab_size, 0)))
    shapes = jax.eval_shape(learner.init, trained)
    policy = jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes, learner.shardings
    )
    allocation, *counts = jax.device_put(
        (config.allocator.build().init(num_prompts), jnp.zeros(num_prompts, jnp.int32), jnp.zeros(num_prompts)),
        sharding.replicated(mesh),
    )
    state = checkpoints.restore(at, like=State(policy, allocation, *counts))
    sample = make_sampler(config.model, config.sampler, tokenizer.eos_ids, tokenizer.pad_id, mesh)
    frozen: Params = {}
    if config.model.lora_rank:
        as_started = dataclasses.replace(config, sampler=drawn_under)
        frozen = starting_policy(as_started, task, mesh, path.parent.parent / ".cache")
        _same_start(at, frozen, config)
    return Policy(config, task, sample, lora.join(frozen, state.policy.params), at.spent)


def _model_and_task(config: Config) -> tuple[Config, Task]:
    """The task, and the config with the shape of its model folder's model where there is one."""
    if config.model_folder is None:
        return config, config.task.build(config.seed)
    if isinstance(config.task, ChainSum):
        raise ValueError(
            f"model_folder={config.model_folder} brings a tokenizer, and ChainSum has its own: give it a task of text, "
            "like Dataset"
        )
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
    longest = int(max(task.train.lengths.max(), task.heldout.lengths.max()))
    limit, completion = config.model.max_positions, config.sampler.max_completion_tokens
    if limit is not None and longest + completion > limit:
        raise ValueError(
            f"prompts of up to {longest} tokens and sampler.max_completion_tokens={completion} exceed the model's "
            f"context of {limit} tokens: lower task.max_prompt_tokens to {max(limit - completion, 1)}, or the other"
        )


def _same_start(at: Cursor, params: Params, config: Config) -> Cursor:
    """The cursor with the hash of the parameters that RL started from. Raises ValueError where they were others."""
    found = weights.fingerprint(params)
    if at.start_hash not in ("", found):
        source = config.model_folder or "the warm start in the cache beside the run"
        raise ValueError(f"{source}: not the weights that this run started from, which it still needs: put those back")
    return at._replace(start_hash=found)


def fresh_adapters(config: Config, vocab_size: int, learner: Learner) -> Params:
    """Adapters with which the policy is what it is without; the jitted function computes nothing else."""

    def adapters() -> Params:
        return lora.split(init_params(config.model, vocab_size, config.seed))[1]

    return jax.jit(adapters, out_shardings=learner.shardings.params)()


def start(config: Config) -> tuple[Run, State, Cursor]:
    """Build, check and restore. Raises ValueError on bad input, before any work is done or lost."""
    config, task = _model_and_task(config)
    num_prompts, tokenizer = len(task.train.questions), task.tokenizer
    config.check(num_prompts)
    _check_context(config, task)
    mesh = sharding.make_mesh(config.mesh)
    everywhere = sharding.replicated(mesh)
    rows, slots, shards = config.evaluation.rows, config.sampler.slots, sharding.row_shards(mesh)
    if rows % shards or (slots or 0) % shards:
        raise ValueError(
            f"evaluation.rows={rows} and sampler.slots={slots} must be multiples of data x fsdp = {shards}"
        )
    allocator = config.allocator.build()
    learner = make_learner(config.model, tokenizer.vocab_size, config.learner, config.sampler.temperature, mesh)
    sample = make_sampler(config.model, config.sampler, tokenizer.eos_ids, tokenizer.pad_id, mesh)
    print(memory_needed(config, task, mesh))
    directory, cache_dir = open_run_dir(config)

    checkpoints = Checkpoints(directory / "checkpoints")
    fresh = Cursor(config=to_json(config), prompts_hash=prompts_hash(task.train))
    at = checkpoints.cursor() or fresh
    check_resumable(at, config, fresh.prompts_hash)
    write_settings(directory, config, task)

    frozen, params = {}, starting_policy(config, task, mesh, cache_dir)
    if config.model.lora_rank or config.learner.kl_coef:
        at = _same_start(at, params, config)
    if config.model.lora_rank:
        frozen, params = params, fresh_adapters(config, tokenizer.vocab_size, learner)
    # A copy: the step donates the parameters it is given.
    ref_params = jax.tree.map(jnp.copy, params) if config.learner.kl_coef else None
    mean_tokens = jnp.full(num_prompts, config.sampler.max_completion_tokens, jnp.float32)
    allocation, *counts = jax.device_put(
        (allocator.init(num_prompts, config.seed), jnp.zeros(num_prompts, jnp.int32), mean_tokens), everywhere
    )
    state = State(learner.init(params), allocation, *counts)
    if at.save:
        state = checkpoints.restore(at, like=state)
    if config.extend:
        total = jax.device_put(jnp.int32(config.allocator.total_budget), everywhere)
        ledger = state.allocation.ledger._replace(total=total)
        state = state._replace(allocation=state.allocation._replace(ledger=ledger))
        at = at._replace(finished=False, config=fresh.config)
    run = Run(
        config=config,
        directory=directory,
        task=task,
        sample=sample,
        learner=learner,
        allocate=jax.jit(allocator.allocate, out_shardings=everywhere),
        # Every rollout of a round is drawn: release=False keeps the rest of a group cut over two steps reserved.
        update=jax.jit(partial(allocator.update, release=False), out_shardings=everywhere),
        fixed=Fixed(frozen, ref_params),
        checkpoints=checkpoints,
        metrics=MetricsWriter(directory, position=at.metrics),
        progress=Progress(total=config.allocator.total_budget, initial=at.spent),
    )
    held, total = len(task.heldout.questions), config.allocator.total_budget
    print(
        f"{config.name}, {config.allocator.name}: {num_prompts:,} prompts, {held:,} held out; {at.spent:,} of "
        f"{total:,} rollouts spent; {directory}"
    )
    return run, state, at


def memory_needed(config: Config, task: Task, mesh: Mesh) -> str:
    """What the run needs of each device, in words."""
    needed = memory.estimate(
        config.model,
        task.tokenizer.vocab_size,
        config.learner,
        config.sampler,
        mesh,
        prompt_tokens=task.train.tokens.shape[1],
        min_group=config.allocator.min_group,
    )
    return memory.describe(needed, memory.device_bytes())
