"""The supervised phase before RL: a policy learns to imitate the task's demonstrations. It costs no rollouts.

Its result is cached beside the runs, under a hash of all that determines it: runs of one seed start from the very same
policy, whatever allocates their rollouts.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from tqdm import tqdm

from cero_jax import hosts, model, sharding
from cero_jax.checkpoint import LAYOUT, Checkpoints, Cursor, put_aside
from cero_jax.data import Task, encode_prompts
from cero_jax.learner import (
    Batch,
    LearnerConfig,
    completion_log_probs,
    make_optimizer,
    token_mask,
)
from cero_jax.metrics import say_once
from cero_jax.model import ModelConfig, Params
from cero_jax.optimizer import Stepper, TrainState, make_stepper
from cero_jax.settings import check
from cero_jax.terminal import Stderr


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on the task's demonstrations."""

    num_steps: int = 0
    """0 starts RL from random parameters."""
    rows_per_step: int = 64
    """Demonstrations a step."""
    learning_rate: float = 1e-3
    """Peak, of Adam; falls linearly to 0."""

    def __post_init__(self):
        check(self, num_steps=(0, 2**31 - 1), rows_per_step=(1, 2**24), learning_rate=(1e-30, 1e30))


def demonstration_batch(task: Task, rng: np.random.Generator, num_rows: int, max_tokens: int) -> Batch:
    """`num_rows` demonstrations as rows; raises ValueError for one longer than `max_tokens`."""
    assert task.demonstrations is not None
    questions, completions = task.demonstrations(rng, num_rows)
    prompts = encode_prompts(questions, [""] * num_rows, ["all"] * num_rows, task.tokenizer)
    width = task.train.longest
    while width < prompts.longest:  # longer than any prompt: a program of its own
        width *= 2
    prompt_tokens, prompt_lengths = prompts.rows(np.arange(num_rows), width)
    tokens = np.full((num_rows, max_tokens), task.tokenizer.pad_id, np.int32)
    lengths = np.zeros(num_rows, np.int32)
    for row, completion in enumerate(completions):
        ids = [*task.tokenizer.encode(completion), task.tokenizer.eos_ids[0]]
        if len(ids) > max_tokens:
            raise ValueError(
                f"a demonstration has {len(ids)} tokens, sampler.max_completion_tokens={max_tokens}: raise the limit"
            )
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    ones = np.ones(num_rows, np.float32)
    return Batch(
        prompt_tokens=prompt_tokens, prompt_lengths=prompt_lengths, tokens=tokens, lengths=lengths,
        log_probs=np.zeros(tokens.shape, np.float32), reward=ones, group_ids=np.zeros(num_rows, np.int32),
        row_mask=np.ones(num_rows, bool), row_weight=ones,
    )  # fmt: skip


def check_steps(config: WarmStartConfig, task: Task, mesh: jax.sharding.Mesh) -> None:
    """Raise ValueError where steps are asked for and the task has no demonstrations, or rows do not divide."""
    shards = sharding.row_shards(mesh)
    if config.num_steps and config.rows_per_step % shards:
        raise ValueError(
            f"warm_start.rows_per_step={config.rows_per_step} must be a multiple of data x fsdp = {shards}"
        )
    if config.num_steps and task.demonstrations is None:
        raise ValueError(f"warm_start.num_steps={config.num_steps}: this task has no demonstrations, set it to 0")


def warm_start(
    config: WarmStartConfig,
    model_config: ModelConfig,
    task: Task,
    *,
    seed: int,
    max_tokens: int,
    mesh: jax.sharding.Mesh,
    cache_dir: Path,
) -> Params:
    """Parameters after the supervised phase, from the cache where they are there and whole; sharded over the mesh.

    Raises ValueError where steps are asked for and the task has no demonstrations, OSError where the cache cannot be
    read or written.
    """
    check_steps(config, task, mesh)
    vocab_size = task.tokenizer.vocab_size
    stepper = make_stepper(model_config, vocab_size, make_optimizer(LearnerConfig(weight_decay=0.0)), mesh)
    init = jax.jit(lambda: model.init_params(model_config, vocab_size, seed), out_shardings=stepper.shardings.params)
    if config.num_steps == 0:
        return init()
    assert task.demonstrations is not None  # checked
    # What the demonstrations are, not how they were asked for: mixes that differ in gold answers share a warm start.
    probe = task.demonstrations(np.random.default_rng(seed), 1024)
    settings = [dataclasses.asdict(config), dataclasses.asdict(model_config), seed, max_tokens, jax.__version__, LAYOUT]
    identity = json.dumps([settings, probe, task.heldout.questions], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    cached = cache_dir / f"warm_start-{digest}"
    target = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        model.abstract_params(model_config, vocab_size), stepper.shardings.params,
    )  # fmt: skip
    params = read_cache(cached, target)
    if params is None:
        step = make_supervised_step(model_config, stepper, mesh)
        params = _imitate(config, step, stepper.init(init()), task, seed, max_tokens)
        write_cache(cached, params)
    return params


def read_cache(cached: Path, target: Params) -> Params | None:
    """The parameters of a warm start; None where it is not there, or is damaged: then it is put aside, with a word."""
    if not hosts.of_first(cached.exists):
        return None
    checkpoints = Checkpoints(cached, read_only=True)
    try:
        cursor = checkpoints.cursor()
        if cursor is None:
            raise ValueError(f"{cached}: a damaged warm start, with nothing in it")
        return checkpoints.restore(cursor, target)[1]
    except ValueError as error:
        why = error.__cause__ or error  # that it is the only one matters not here
        aside = hosts.of_first(lambda: put_aside(cached))
        say_once(f"{why}; put aside as {aside}; the warm start is made again")
        return None
    finally:
        checkpoints.close()


def write_cache(cached: Path, params: Params) -> None:
    """Keep the parameters of a warm start. Raises OSError where they cannot be written."""
    scratch = hosts.of_first(lambda: _scratch(cached.parent))
    try:
        checkpoints = Checkpoints(scratch / "params")
        checkpoints.save(Cursor(config={}, prompts_hash=""), params)
        checkpoints.close()
        hosts.of_first(lambda: _move(scratch / "params", cached))
    finally:
        if hosts.leads():
            shutil.rmtree(scratch, ignore_errors=True)


def _scratch(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder))


def _move(made: Path, cached: Path) -> None:
    try:
        os.rename(made, cached)  # atomic: a run beside this one sees all of it or nothing
    except OSError:
        assert cached.exists()  # a run beside this one was first, with the same content


SupervisedStep = Callable[[TrainState, Batch, ArrayLike], tuple[TrainState, Array]]


def make_supervised_step(model_config: ModelConfig, stepper: Stepper, mesh: jax.sharding.Mesh) -> SupervisedStep:
    """The jitted step: (state, batch, learning rate []) -> state, mean negative log-likelihood a completion token."""

    def nll(params: Params, batch: Batch) -> Array:
        chunk = LearnerConfig.logit_chunk_tokens
        log_probs = completion_log_probs(params, model_config, batch, temperature=1.0, chunk=chunk)
        mask = token_mask(batch) & batch.row_mask[:, None]
        return -jnp.where(mask, log_probs, 0.0).sum() / jnp.maximum(mask.sum(), 1)

    @partial(jax.jit, donate_argnames="state", out_shardings=(stepper.shardings, None))
    def step(state: TrainState, batch: Batch, learning_rate: Array) -> tuple[TrainState, Array]:
        batch = jax.lax.with_sharding_constraint(batch, sharding.rows(mesh))
        loss, grads = jax.value_and_grad(sharding.on(mesh, nll))(state.params, batch)
        return stepper.apply(state, grads, learning_rate), loss

    return step


def _imitate(
    config: WarmStartConfig, step: SupervisedStep, state: TrainState, task: Task, seed: int, max_tokens: int
) -> Params:
    rng = np.random.default_rng((seed, 0x5EED))  # a stream of its own, apart from the task's data
    loss = jnp.float32(0)
    bar: dict[str, Any] = {"desc": "warm start", "unit": "step", "mininterval": 1.0, "file": Stderr()}
    progress = tqdm(range(config.num_steps), disable=not hosts.leads(), **bar)
    for number in progress:
        rate = np.float32(config.learning_rate * (1 - number / config.num_steps))
        state, loss = step(state, demonstration_batch(task, rng, config.rows_per_step, max_tokens), rate)
        if number == 0:  # it was compiled for, which is no part of the rate
            jax.block_until_ready(loss)
            progress.unpause()
        if number % 50 == 49:  # reading the loss waits for the step, so not at each
            progress.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    if not np.isfinite(loss):  # before it is cached: a parameter that is no number makes every later loss none
        raise ValueError(
            f"the warm start's loss is {float(loss)} after {config.num_steps} steps: lower warm_start.learning_rate="
            f"{config.learning_rate}"
        )
    return state.params
