"""Measure the latest checkpoint of a run on held-out prompts: avg@k, pass@k, intervals, samples to read.

python -m cero_jax.evaluate RUN [--data FILE ...] [--samples 16]
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cero_jax import starting

if __name__ == "__main__":
    starting.name_what_is_missing()

import jax

from cero_jax import hosts, lora, model, sharding
from cero_jax.checkpoint import Checkpoints, fail_at_once
from cero_jax.config import Config, check_seed
from cero_jax.data import Task
from cero_jax.evaluation import evaluate, scores_table
from cero_jax.initial_policy import check_same_start, starting_policy
from cero_jax.metrics import say_once
from cero_jax.model import Params
from cero_jax.paths import local_path
from cero_jax.pieces import build_task, check_context, check_rows, pinned, sampler_of
from cero_jax.sampler import Sampler
from cero_jax.saved_config import from_json
from cero_jax.terminal import printable


class Checkpointed(NamedTuple):
    """A run's latest policy, with what it takes to measure it."""

    config: Config
    task: Task
    sample: Sampler
    params: Params
    spent: int  # rollouts, when it was saved


def restore_policy(
    directory: Path,
    task_changes: dict,
    sampler_changes: dict,
    evaluation_changes: dict | None = None,
    best: bool = False,
) -> Checkpointed:
    """The policy of a run's latest checkpoint; changes nothing there, so that a running one may be measured.

    best: of the one that was kept as the best (evaluation.keep_best) instead.

    task_changes, sampler_changes, evaluation_changes: fields of these parts of the config to replace.
    Raises FileNotFoundError where there is no run, ValueError where it has no checkpoint or a field does not fit.
    """
    path = local_path(str(directory)).absolute() / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: not the directory of a run")
    try:
        saved = from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    changed = _changed(saved, task_changes, sampler_changes, evaluation_changes or {})
    checkpoints = cursor = None
    if (path.parent / "checkpoints").is_dir():
        checkpoints = Checkpoints(path.parent / "checkpoints", read_only=True)
        cursor = hosts.of_first(checkpoints.best) if best else checkpoints.cursor()
    if checkpoints is None or cursor is None:
        if best:
            raise ValueError(
                f"{path.parent}: no best checkpoint in it: the run has to keep it, evaluation.keep_best=True"
            )
        raise ValueError(f"{path.parent}: no checkpoint in it yet: let the run go on")
    config, task = hosts.alike(partial(build_task, pinned(changed, cursor), cursor.started))
    check_context(config, task.heldout)
    try:
        mesh = sharding.make_mesh(config.mesh)
    except ValueError:  # of a run on other devices than those here
        mesh = sharding.make_mesh(sharding.MeshConfig())
    check_rows(config, mesh)
    _, trained = lora.split(model.abstract_params(config.model, task.tokenizer.vocab_size))
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        trained, sharding.shard_params(trained, mesh),
    )  # fmt: skip
    cursor, params = checkpoints.restore(cursor, like, part="policy.params")
    if config.model.lora_rank:
        as_started = dataclasses.replace(config, sampler=saved.sampler)
        frozen = starting_policy(as_started, task, mesh, path.parent.parent / ".cache")
        check_same_start(cursor, frozen, config)
        params = lora.join(frozen, params)
    return Checkpointed(config, task, sampler_of(config, task, mesh), params, cursor.spent)


def _changed(config: Config, task_changes: dict, sampler_changes: dict, evaluation_changes: dict) -> Config:
    task: Any = config.task
    unknown = sorted(task_changes.keys() - {field.name for field in dataclasses.fields(task)})
    if unknown:
        raise ValueError(f"the run's task is {type(task).__name__}, which has no {', '.join(unknown)}")
    return dataclasses.replace(
        config,
        task=dataclasses.replace(task, **task_changes),
        sampler=dataclasses.replace(config.sampler, **sampler_changes),
        evaluation=dataclasses.replace(config.evaluation, **evaluation_changes),
    )


def write_samples(path: Path | str, samples: list[dict[str, Any]]) -> None:
    """Write the samples, a JSON object a line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in samples)


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with one line where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m cero_jax.evaluate", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's directory, e.g. runs/gsm8k-cero-0")
    add("--data", nargs="+", metavar="FILE", help="held-out files or globs instead of the run's own, each a data set")
    for name in ("question-field", "answer-field", "template", "verifier"):
        add(f"--{name}", help=f"task.{name.replace('-', '_')} for these files (default: the run's)")
    add("--best", action="store_true", help="the best policy, where the run kept it, and not the latest")
    add("--samples", type=int, default=4, help="completions a prompt, k (default: %(default)s)")
    add("--rows", type=int, help="completions drawn at once (default: the run's)")
    add("--temperature", type=float, help="default: the run's; 0 is greedy")
    add("--max-completion-tokens", type=int, help="default: the run's")
    add("--seed", type=int, default=0)
    add("--output", help="the samples, a JSON object a line (default: RUN/samples-SPENT.jsonl)")
    given = vars(parser.parse_args(args))
    task_changes = {key: given[key] for key in ("question_field", "answer_field", "template", "verifier") if given[key]}
    if given["data"]:
        task_changes |= {"path": "", "heldout_paths": tuple(given["data"])}  # what the run trained on is not read
    sampler_changes = {key: given[key] for key in ("temperature", "max_completion_tokens") if given[key] is not None}
    evaluation_changes = {"samples": given["samples"]} | ({} if given["rows"] is None else {"rows": given["rows"]})
    try:
        if args is None:  # as a command; a caller has joined, if there is anybody to join
            hosts.join()
        check_seed(given["seed"])
        policy = restore_policy(Path(given["run"]), task_changes, sampler_changes, evaluation_changes, given["best"])
        config = policy.config
        scale = config.success_threshold, config.lowest_reward
        result = evaluate(policy.sample, policy.params, policy.task, config.evaluation, given["seed"], *scale)
        output = local_path(given["output"] or str(Path(given["run"]) / f"samples-{policy.spent}.jsonl"))
        hosts.of_first(partial(write_samples, output, result.samples))
    except Exception as error:
        if hosts.several():  # of whatever kind it is: the others may be waiting
            fail_at_once(OSError, ValueError, FloatingPointError)
        if not isinstance(error, OSError | ValueError | FloatingPointError):
            raise
        parser.error(printable(str(error)))
    hosts.tell(scores_table(result.scores))
    say_once(f"{policy.spent:,} rollouts spent; {len(result.samples):,} samples to read in {output}")


if __name__ == "__main__":
    main()
