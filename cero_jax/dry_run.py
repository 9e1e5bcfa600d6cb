"""What a run would begin with, and whether it could: everything up to its first rollout, drawn and written nothing.

Its checks are the run's own, in its order, so that its error is the one that the run would have had. Parameters are
zeros: a model folder's files are looked at, not read, and no warm start is made.
"""

import dataclasses
import time
from collections.abc import Iterator
from textwrap import indent
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cero_jax import hosts, lora, model, sharding, warm_start
from cero_jax.best import waited_enough
from cero_jax.checkpoint import Checkpoints, Cursor
from cero_jax.config import Config
from cero_jax.data import Prompts, Task, epoch_order, prompts_hash
from cero_jax.evaluation import sampling_batches
from cero_jax.grpo import BY_POSTERIOR
from cero_jax.huggingface import hub, weights
from cero_jax.initial_policy import kept_from_start, needs_start
from cero_jax.learner import Batch
from cero_jax.pace import Seconds
from cero_jax.packing import StepPlan, plan
from cero_jax.pieces import Pieces, build, memory_needed, slow_here, starting_allocator, widths_of
from cero_jax.rewards import WRONG, Verdict
from cero_jax.rollout import Beliefs, sampling_batch, to_batch
from cero_jax.run import saved_run
from cero_jax.run_directory import changes_to_say, check_alike, check_free, check_resumable, check_work_dir
from cero_jax.sampler import Rollouts
from cero_jax.saved_config import check_saved_as_it_is, to_json
from cero_jax.terminal import one_line, printable
from cero_jax.verify import Verified, judge


def dry_run(config: Config) -> int:
    """Say what a run of this config would begin with; returns 0.

    Raises ValueError or OSError as the run would before its first rollout, but for what only shows in the doing: a
    value in a model folder's files that is no number, a warm start that diverges, a directory that hosts do not share,
    a checkpoint or a metrics file that was changed since.
    """
    check_work_dir(config.run_dir)
    check_saved_as_it_is(config)
    pieces = build(config, saved_run(config.run_dir))
    config, task = pieces.config, pieces.task
    fresh = Cursor(config=to_json(config), prompts_hash=prompts_hash(task.train))
    check_alike(config, fresh.prompts_hash)
    hosts.of_first(lambda: check_free(config.run_dir))
    cursor = _latest(config) or fresh
    check_resumable(cursor, config, fresh.prompts_hash)
    if needs_start(config, cursor):
        _check_start(pieces)
    needed = memory_needed(config, task, pieces.mesh), slow_here(config)
    for line in filter(None, (*_prompts(pieces), *changes_to_say(cursor, config), *needed)):
        hosts.tell(line)
    number = len(task.train.questions)
    counts, _ = jax.jit(pieces.allocator.allocate)(starting_allocator(pieces.allocator, config, task.train))
    plans = _steps(config, np.asarray(counts))
    hosts.tell(_budget(config, plans))
    # An allocator may leave an epoch empty: then a group of the first prompt stands for its steps.
    hosts.tell(_compiled(pieces, plans or _steps(config, config.allocator.min_group * (np.arange(number) == 0))))
    hosts.tell(f"dry run: nothing was drawn or written; {_would(config, cursor)} in {config.run_dir}")
    return 0


def _would(config: Config, cursor: Cursor) -> str:
    if waited_enough(cursor, config.evaluation) or (cursor.finished and not config.extend):
        return f"the run has ended after {cursor.spent:,} rollouts"
    return f"the run would go on after {cursor.spent:,} rollouts" if cursor.checkpoint_number else "the run would begin"


def _latest(config: Config) -> Cursor | None:
    """Where the run in the work directory stands; None where there is none."""
    folder = config.run_dir / "checkpoints"
    return Checkpoints(folder, read_only=True).cursor() if folder.is_dir() else None


def _check_start(pieces: Pieces) -> None:
    """Raise ValueError or OSError where the policy that RL starts from cannot be had."""
    config, task = pieces.config, pieces.task
    if config.model_folder is not None:
        weights.check(hub.model_folder(config.model_folder))
    else:
        warm_start.check_steps(config.warm_start, task, pieces.mesh)
        if config.warm_start.num_steps:
            rows, limit = config.warm_start.rows_per_step, config.sampler.max_completion_tokens
            warm_start.demonstration_batch(task, np.random.default_rng(config.seed), rows, limit)


def _prompts(pieces: Pieces) -> Iterator[str]:
    """A prompt as the model reads it, what the verifier says of its gold answer, and how many and how long all are."""
    train, widths = pieces.task.train, widths_of(pieces.config, pieces.task.train, pieces.task.heldout)
    yield f"prompt 0, {train.lengths[0]} tokens:\n{indent(printable(train.questions[0]), '    ')}"
    yield _gold(pieces.task)
    padded = " or ".join(map(str, widths))
    yield f"{_counted(train)} to train on, {_counted(pieces.task.heldout)} held out; padded to {padded} tokens"


def _gold(task: Task) -> str:
    r"""What the verifier says of prompt 0's gold answer, as it is or, where that is not right, in \boxed{}."""
    question, answer = task.train.questions[0], task.train.answers[0]
    forms = answer, rf"\boxed{{{answer}}}"
    verdicts = judge(task, [(question, form, answer) for form in forms])
    form, found = max(zip(forms, verdicts, strict=True), key=lambda each: each[1].reward)
    parts = "".join(f", {name} {value:g}" for name, value in found.parts.items())
    read = f", read as {one_line(repr(found.extracted), 80)}" if found.extracted else ""
    asked = one_line(repr(form), 80)
    return f"its gold answer as a completion, {asked}: {found.status}, reward {found.reward:g}{parts}{read}"


def _counted(prompts: Prompts) -> str:
    lengths = prompts.lengths
    return f"{len(lengths):,} prompts of {lengths.min()} to {lengths.max()} tokens (median {np.median(lengths):g})"


def _steps(config: Config, num_rollouts: np.ndarray) -> list[StepPlan]:
    """The steps of a first epoch of these rollouts [N]."""
    order, rows = epoch_order(len(num_rollouts), config.seed, 0), config.learner.rows_per_step
    return plan(num_rollouts, order, rows_per_step=rows, min_group=config.allocator.min_group)


def _budget(config: Config, plans: list[StepPlan]) -> str:
    """The budget in epochs, steps and evaluations."""
    total, rows = config.allocator.total_budget, config.learner.rows_per_step
    drawn = sum(int(each.row_mask.sum()) for each in plans)
    prompts = len({int(i) for each in plans for i in each.visit_ids if i >= 0})
    return (
        f"{total:,} rollouts in {config.allocator.num_epochs} epochs, at least {-(-total // rows):,} steps of up to "
        f"{rows}; the first epoch: {drawn:,} rollouts of {prompts:,} prompts in {len(plans):,} steps; an evaluation "
        f"every {config.evaluation.every_rollouts:,} rollouts"
    )


def _compiled(pieces: Pieces, plans: list[StepPlan]) -> str:
    """Compile all that a run does, for its shapes, and say how long that took. Nothing is drawn; one row is learned.

    What that takes of the devices' memory is what a step takes: where it does not fit, it fails here as the run would.
    """
    config, task, vocab_size = pieces.config, pieces.task, pieces.task.tokenizer.vocab_size
    abstract = model.abstract_params(dataclasses.replace(config.model, lora_rank=None), vocab_size)
    places: Any = sharding.shard_params(abstract, pieces.mesh)
    zeros = jax.jit(lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), abstract), out_shardings=places)()
    fixed, trained = kept_from_start(config, vocab_size, pieces.learner, zeros)
    state, params = pieces.learner.init(trained), lora.join(fixed.frozen, trained)
    began, limit = time.perf_counter(), config.sampler.max_completion_tokens
    together = plans[: config.learner.steps_per_batch]
    mean_tokens = np.full(len(task.train.questions), limit, np.float32)
    for batch in (
        sampling_batch(task.train, together, config.learner.steps_per_batch, mean_tokens),
        next(sampling_batches(task.heldout, config.evaluation)),
    ):
        nothing = batch._replace(row_mask=np.zeros_like(batch.row_mask))
        pieces.sample(params, np.uint32(config.seed), np.uint32(0), nothing)
    sampled = time.perf_counter()
    batch = _batch_of_zeros(pieces, plans[0])
    advantages, rows = pieces.learner.advantages(batch), np.arange(len(batch.reward)) == 0
    jax.block_until_ready(pieces.learner.step(state, fixed, batch, advantages, np.float32(0), rows))
    learned = time.perf_counter()
    return (
        f"compiled in {learned - began:.1f} s: sampling {sampled - began:.1f}, learning {learned - sampled:.1f}; a run "
        "does so again, once: its compilation cache keeps it"
    )


def _batch_of_zeros(pieces: Pieces, step: StepPlan) -> Batch:
    """A step's rows as the learner takes them, each completion as long as one may be and of nothing but token 0."""
    config, rows = pieces.config, len(step.row_mask)
    limit, visits = config.sampler.max_completion_tokens, len(step.visit_ids)
    zeros = np.zeros((rows, limit), np.float32)
    rollouts = Rollouts(zeros.astype(np.int32), zeros, np.full(rows, limit, np.int32), np.zeros(rows, bool))
    verified = Verified([""] * rows, [Verdict(0.0, WRONG)] * rows, np.zeros(rows, np.float32))
    even = np.ones(visits, np.float32)
    beliefs = Beliefs(even, even) if config.learner.advantage in BY_POSTERIOR else None
    return to_batch(pieces.task.train, step, rollouts, verified, Seconds(0.0, 0.0), beliefs, config.rules).batch
