"""The directory of a run: made, held against other runs, its settings written; whether a config may resume there."""

import errno
import fcntl
import json
import os
import re
import socket
import tempfile
import time
from pathlib import Path

import jax

from cero_jax import hosts
from cero_jax.checkpoint import Cursor, put_aside
from cero_jax.config import Config
from cero_jax.data import Task
from cero_jax.metrics import FILES
from cero_jax.saved_config import default_values, flat, to_json
from cero_jax.terminal import say

CHANGEABLE_ON_RESUME = (  # fields, or the beginnings of their names
    "version",
    "name",
    "work_dir",
    "evaluation",
    "checkpoint_every_steps",
    "profile_steps",
    "wandb",
    "dry_run",
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
    "sampler.allow_biased_ratio",
)
_BITS = "the same mathematics, with sums in another order: from here on the run's last bits may be others"
_LIMITS = "which answers time out may change"
SAID_ON_RESUME = {  # changeable too, but not without a word
    "mesh": _BITS,
    "sampler.slots": _BITS,
    "sampler.window": _BITS,
    "model.remat": _BITS,
    "model.attention": _BITS,
    "learner.rows_per_microbatch": _BITS,
    "learner.logit_chunk_tokens": _BITS,
    "task.verifier_seconds": _LIMITS,
    "task.verifier_memory_mb": _LIMITS,
}
SHARED_SECONDS = 5.0  # until a file that one host made has to be seen by the others
_held: dict[Path, int] = {}  # the locks of this process, open files by directory, until it ends


def check_resumable(cursor: Cursor, config: Config, prompts_hash: str) -> None:
    """Raise ValueError, naming each, where a field that changes the mathematics differs from the saved run's."""
    changeable = CHANGEABLE_ON_RESUME + tuple(SAID_ON_RESUME)
    if config.extend:
        changeable += ("allocator.total_budget", "allocator.num_epochs")
    changed = [text for key, text in _changes(cursor, config).items() if not _is_of(key, changeable)]
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


def changes_to_say(cursor: Cursor, config: Config) -> list[str]:
    """A line for each change on resume, of a setting or of the devices, that changes no mathematics, but the bits."""
    now = devices_here()
    said = [f"warning: {cursor.devices} before, {now} now: {_BITS}"] if cursor.devices not in ("", now) else []
    return said + [
        f"warning: {text}: {SAID_ON_RESUME[field]}"
        for key, text in _changes(cursor, config).items()
        for field in SAID_ON_RESUME
        if _is_of(key, (field,))
    ]


def devices_here() -> str:
    """The processes and devices of this run, in words."""
    return f"{jax.process_count()} process(es), {jax.device_count()} device(s)"


def _changes(cursor: Cursor, config: Config) -> dict[str, str]:
    """Each setting that differs from the saved run's, by its name, in words.

    One that is newer than the run counts as its default, which is what was done before there was such a setting.
    """
    now = flat(to_json(config))
    before = {key: value for key, value in flat(default_values(config)).items() if key in now} | flat(cursor.config)
    return {
        key: f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def _is_of(key: str, fields: tuple[str, ...]) -> bool:
    """Whether a setting is one of these fields, or lies in one."""
    return any(f"{key}.".startswith(f"{field}.") for field in fields)


def check_work_dir(run_dir: Path) -> None:
    """Raise ValueError for a path under which Orbax loses what it saves: it reads it as a pattern."""
    if odd := re.findall(r"[*?\[\\]", str(run_dir)):
        raise ValueError(
            f"the work directory {run_dir} holds {' '.join(dict.fromkeys(odd))}, which would lose its checkpoints: "
            "choose a --work-dir without"
        )


def open_run_dir(config: Config) -> tuple[Path, Path]:
    """The run directory, held by this process until it ends, and the cache beside it for all runs.

    Of several processes the first holds it for all.

    Turns on JAX's persistent compilation cache there, unless the environment names one: a restart is quick. Raises
    ValueError where it cannot be written, or another process holds it.
    """
    run_dir = config.run_dir
    cache_dir = run_dir.parent / ".cache"
    hosts.of_first(lambda: _make(run_dir, cache_dir))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return run_dir, cache_dir


def check_free(run_dir: Path) -> None:
    """Raise ValueError where `open_run_dir` would, for a directory that cannot be written or is held; write nothing."""
    there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        number = errno.EACCES if there.is_dir() else errno.ENOTDIR
        raise _unwritable(run_dir, OSError(number, os.strerror(number), str(there)))
    if run_dir in _held or not (run_dir / "lock").is_file():
        return
    with open(run_dir / "lock", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(run_dir) from None
        except OSError:  # no locks here: a run says so
            return


def _make(run_dir: Path, cache_dir: Path) -> None:
    try:
        for directory in (run_dir, cache_dir / "jax"):
            directory.mkdir(parents=True, exist_ok=True)
        hold(run_dir)
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def check_shared(run_dir: Path) -> None:
    """Raise ValueError where the processes of a run do not all see one directory, and so one set of checkpoints."""
    if not hosts.several():
        return
    trace = hosts.of_first(lambda: _leave_a_trace(run_dir))
    seen = hosts.each_has(lambda: _is_seen(trace))
    hosts.of_first(trace.unlink)
    if not all(seen):
        blind = ", ".join(str(index) for index, sees in enumerate(seen) if not sees)
        raise ValueError(
            f"the work directory {run_dir} of process 0 is not that of process {blind}: give a --work-dir on a file "
            "system that all hosts share"
        )


def check_alike(config: Config, prompts_hash: str) -> None:
    """Raise ValueError, naming what and where, if a process was given other settings or prompts than the first."""
    given = hosts.each_has(lambda: flat(to_json(config)) | {"run_dir": str(config.run_dir), "prompts": prompts_hash})
    for index, other in enumerate(given):
        for key in given[0].keys() | other.keys():
            if other.get(key) != given[0].get(key):
                raise ValueError(
                    f"process {index} has {key}={other.get(key)!r}, process 0 {given[0].get(key)!r}: give all the same "
                    "command and data"
                )


def _leave_a_trace(run_dir: Path) -> Path:
    """A new file, under a name that no host has looked for yet: file systems remember what was not there."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix="seen-by-all-", dir=run_dir)
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    os.close(handle)
    return Path(path)


def _is_seen(path: Path) -> bool:
    until = time.monotonic() + SHARED_SECONDS
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)
    return path.exists()


def hold(run_dir: Path) -> None:
    """Lock a directory for this process's life, however that ends: the system gives the lock back.

    Raises ValueError that names the process which holds it. One process may hold it twice, as after a run that failed.
    """
    path = run_dir / "lock"
    if run_dir in _held:
        if path.exists() and os.path.samestat(os.fstat(_held[run_dir]), path.stat()):
            return
        os.close(_held.pop(run_dir))  # the directory was made anew
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise _in_use(run_dir) from None
    except OSError as error:
        say(f"warning: {run_dir}: no locks here ({error}): see that no other run uses it")
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    os.truncate(lock, 0)
    os.write(lock, holder.encode())
    _held[run_dir] = lock


def _in_use(run_dir: Path) -> ValueError:
    holder = (run_dir / "lock").read_text(encoding="utf-8").strip() or "another process"
    return ValueError(f"{run_dir} is in use by {holder}: let that run end, or choose another --work-dir")


def set_metrics_aside(run_dir: Path) -> None:
    """Where a run begins in a directory that has metrics but no checkpoint, put those aside, and say so."""
    there = [path for path in (run_dir / name for name in FILES) if path.exists() and path.stat().st_size]
    if there:
        moved = ", ".join(str(put_aside(path)) for path in there)
        say(f"{run_dir}: metrics of a run without a checkpoint, put aside as {moved}; it begins anew")


def write_settings(run_dir: Path, config: Config, task: Task, prompts_hash: str) -> None:
    """Write what a reader of the run needs: the resolved config, and the prompts with their labels.

    The prompts are written once: a resumed run finds them there, with their hash as the first of them. One label
    stands for all prompts where they have the same. Raises ValueError where they cannot be written.
    """
    labels = task.train.labels[:1] if len(set(task.train.labels)) == 1 else task.train.labels
    prompts = {"hash": prompts_hash, "labels": labels, "questions": task.train.questions, "answers": task.train.answers}
    if task.train.pass_rates is not None:
        prompts["pass_rates"] = [None if rate != rate else rate for rate in task.train.pass_rates.tolist()]
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
