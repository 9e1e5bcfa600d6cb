"""The directory of a run: made, checked for whether a config may resume there, its settings written for readers."""

import json
import os
from pathlib import Path

import jax

from cero_jax.checkpoint import Cursor
from cero_jax.config import Config, flat, to_json
from cero_jax.data import Task

CHANGEABLE_ON_RESUME = (  # fields, or the beginnings of their names
    "version",
    "work_dir",
    "mesh",
    "evaluation",
    "checkpoint_every_steps",
    "max_unjudged_steps",
    "learner.max_skipped_steps",
    "extend",
    "model_folder",
    "task.class.module",
    "task.class.file",
    "task.path",
    "task.heldout_paths",
    "allocator.class.module",
    "allocator.class.file",
)


def check_resumable(cursor: Cursor, config: Config, prompts_hash: str) -> None:
    """Raise ValueError, naming each, where a field that changes the mathematics differs from the saved run's."""
    before, now = flat(cursor.config), flat(to_json(config))
    changeable = CHANGEABLE_ON_RESUME
    if config.extend:
        changeable += ("allocator.total_budget", "allocator.num_epochs")
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{each}.") for each in changeable)
    ]
    if changed:
        raise ValueError(
            f"{config.run_dir} holds a run with other settings: {'; '.join(changed)}. Give them back, or choose "
            "another --work-dir" + ("" if config.extend else "; to go on with a larger budget say --extend=True")
        )
    if prompts_hash != cursor.prompts_hash:
        raise ValueError(f"{config.run_dir} holds a run on other prompts, or in another order: give the same data back")
    if config.allocator.total_budget < cursor.config["allocator"]["total_budget"]:
        raise ValueError(
            f"--extend=True: allocator.total_budget={config.allocator.total_budget} is below the run's "
            f"{cursor.config['allocator']['total_budget']}: it may only grow"
        )


def open_run_dir(config: Config) -> tuple[Path, Path]:
    """The run directory, and the cache beside it for all runs.

    Turns on JAX's persistent compilation cache there, unless the environment names one: a restart is quick. Raises
    ValueError where it cannot be written.
    """
    run_dir = config.run_dir
    cache_dir = run_dir.parent / ".cache"
    try:
        for directory in (run_dir, cache_dir / "jax"):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return run_dir, cache_dir


def write_settings(run_dir: Path, config: Config, task: Task, prompts_hash: str) -> None:
    """Write what a reader of the run needs: the resolved config, and the prompts with their labels.

    The prompts are written once: a resumed run finds them there, with their hash as the first of them. One label
    stands for all prompts where they have the same. Raises ValueError where they cannot be written.
    """
    labels = task.train.labels[:1] if len(set(task.train.labels)) == 1 else task.train.labels
    prompts = {"hash": prompts_hash, "labels": labels, "questions": task.train.questions, "answers": task.train.answers}
    path, part = run_dir / "prompts.json", run_dir / "prompts.json.part"
    try:
        (run_dir / "config.json").write_text(json.dumps(to_json(config), indent=2))
        if not (path.is_file() and _begins_with(path, json.dumps({"hash": prompts_hash})[:-1])):
            part.write_text(json.dumps(prompts))
            part.replace(path)  # whole or not at all
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def _begins_with(path: Path, text: str) -> bool:
    with path.open("rb") as file:
        return file.read(len(text)) == text.encode()


def _unwritable(run_dir: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot write to the work directory {run_dir}: {error}: choose another --work-dir")
