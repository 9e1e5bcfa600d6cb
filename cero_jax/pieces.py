"""The pieces of a run that are built and checked from its config alone, before anything is written or drawn."""

import dataclasses
from datetime import datetime
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cero_jax import hosts, memory, sharding, weights_and_biases
from cero_jax.allocator.base import Allocator, AllocatorState, with_pass_rates
from cero_jax.checkpoint import Cursor
from cero_jax.config import Config
from cero_jax.data import Prompts, Task, prompt_widths
from cero_jax.huggingface import hub
from cero_jax.huggingface.families import read_config
from cero_jax.huggingface.tokenizer import FolderTokenizer
from cero_jax.initial_policy import dtypes
from cero_jax.learner import Learner, make_learner
from cero_jax.sampler import Sampler, make_sampler
from cero_jax.saved_config import flat
from cero_jax.starting import install
from cero_jax.tasks.dataset import Dataset
from cero_jax.verify import probe


class Pieces(NamedTuple):
    """What a run is made of, but for its policy and its directory."""

    config: Config  # with what was not named filled in
    task: Task
    mesh: Mesh
    allocator: Allocator
    learner: Learner
    sample: Sampler


def build(config: Config, begun: Cursor | None = None) -> Pieces:
    """Build and check all of it. Raises ValueError for whatever a run cannot begin with, OSError as `pinned` does.

    begun: what is known of the run that is gone on with; None: it begins.
    """
    if config.wandb is not None:
        hosts.of_first(partial(weights_and_biases.check, config.wandb))
    config = pinned(config, begun)
    config, task = hosts.alike(partial(build_task, config, begun.started if begun else ""))
    config.check(len(task.train.questions))
    check_context(config, task.train, task.heldout)
    mesh = sharding.make_mesh(config.mesh)
    check_rows(config, mesh)
    allocator = config.allocator.build(config.learner.advantage)
    temperature, widths = config.sampler.temperature, widths_of(config, task.train)
    learner = make_learner(config.model, task.tokenizer.vocab_size, config.learner, temperature, mesh, widths)
    return Pieces(config, task, mesh, allocator, learner, sampler_of(config, task, mesh))


def starting_allocator(allocator: Allocator, config: Config, train: Prompts) -> AllocatorState:
    """The allocator before the first rollout, with the pass rates that the task's data have."""
    state = allocator.init(len(train.questions), config.seed)
    if train.pass_rates is None:
        return state
    return with_pass_rates(state, train.pass_rates, config.allocator.pass_rate_rollouts)


def pinned(config: Config, begun: Cursor | None) -> Config:
    """The config with a commit in each name on the hub, so that a run has the same files whenever it is started.

    begun: of the run that is gone on with, whose commits stay. Raises as `hub.model_folder` does.
    """
    before = flat(begun.config) if begun else {}
    files = [before.get("task.path") or "", *(before.get("task.heldout_paths") or ())]

    def at_commit(given: str, kind: hub.Kind, kept: list[str]) -> str:
        return hosts.of_first(partial(hub.pinned, given, kind, kept)) if hub.is_name(given) else given

    if config.model_folder is not None:
        folder = at_commit(config.model_folder, "model", [before.get("model_folder") or ""])
        config = dataclasses.replace(config, model_folder=folder)
    if isinstance(config.task, Dataset):
        path = at_commit(config.task.path, "dataset", files)
        heldout = tuple(at_commit(each, "dataset", [*files, path]) for each in config.task.heldout_paths)
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, path=path, heldout_paths=heldout))
    return config


def build_task(config: Config, started: str = "") -> tuple[Config, Task]:
    """The task, and the config with what is not named filled in: by the allocator's rule, and from the model folder.

    started: when the run began, in ISO 8601, for a chat template that tells the date; "": now.
    """
    config = dataclasses.replace(config, allocator=config.allocator.resolved())
    if config.model_folder is None:
        task = config.task.build(config.seed, None)
        probe(task)
        return config, task
    kept = {name: getattr(config.model, name) for name in ("lora_rank", "lora_alpha", "remat", "attention")}
    folder = hub.model_folder(config.model_folder)
    model_config, _ = read_config(folder, **dtypes(config))
    tokenizer = FolderTokenizer(folder, datetime.fromisoformat(started) if started else None)
    task = config.task.build(config.seed, tokenizer)
    probe(task)
    model_config = dataclasses.replace(model_config, **kept)
    named = config.model_folder if hub.is_name(config.model_folder) else str(folder)
    return dataclasses.replace(config, model=model_config, model_folder=named), task


def check_context(config: Config, *parts: Prompts) -> None:
    """Raise ValueError where one of these prompts and its completion may be longer than the model's context."""
    longest = max(part.longest for part in parts)
    limit, completion = config.model.max_positions, config.sampler.max_completion_tokens
    if limit is not None and longest + completion > limit:
        raise ValueError(
            f"prompts of up to {longest} tokens and sampler.max_completion_tokens={completion} exceed the model's "
            f"context of {limit} tokens: lower task.max_prompt_tokens to {max(limit - completion, 1)}, or the other"
        )


def check_rows(config: Config, mesh: Mesh) -> None:
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


def slow_here(config: Config) -> str:
    """A word where a model of a folder meets a CPU, as under a jax without its accelerator's part; "" elsewhere."""
    if config.model_folder is None or jax.default_backend() != "cpu":
        return ""
    return (
        "WARNING: JAX sees no GPU and no TPU here: this model will run on the CPU, and slowly. For an NVIDIA GPU: "
        f"{install('train,cuda')}; for a TPU: {install('train,tpu')}"
    )
