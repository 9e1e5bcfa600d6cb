"""Everything that a run needs to go on, saved and restored as one, so that no two files can disagree on the latest.

A checkpoint holds `state` (policy, optimiser, allocator with its ledger and key, the rollouts of the epoch under way)
and `cursor` (where in the run that is, how far the metrics files reach, the hash of the prompts, the settings). Each
array is kept under its name in the state, "policy.params.layers.attn.q", and read back by that name. Beside the cursor
lie a checksum of each array and one of all that: what a disk gives back is what was saved, or it is not gone on from.
"""

import errno
import itertools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cero_jax import hosts, starting
from cero_jax.checksums import described, text_checksum, type_of
from cero_jax.terminal import say

SPLIT_FROM = 2**20  # bytes of an array that Orbax writes in pieces, where several devices hold copies; it compiles each
SAVED_APART = 120  # seconds that a host's writers wait for those of the others, which may have failed
KEPT = 2  # the newest, and one more in case it is damaged
LAYOUT = 3  # of a checkpoint; 1 kept arrays by position, 2 had no checksums
# What the system says of a damaged file. Whatever else it says, of rights, memory, disks, mounts or networks, is
# that it cannot be read now: in its own words, and in TensorStore's.
_OF_DAMAGE = {"ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENOTEMPTY", "ELOOP", "ENAMETOOLONG", "ENODATA"} | {
    "EINVAL", "EDOM", "ERANGE", "EFBIG", "EOVERFLOW", "EILSEQ", "ESPIPE", "EBADF",
}  # fmt: skip
_NOT_NOW = *(os.strerror(number) for number, name in errno.errorcode.items() if name not in _OF_DAMAGE), *(
    "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED",
)  # fmt: skip


class Cursor(NamedTuple):
    """Where a run stands; plain values, saved as JSON."""

    config: dict  # the settings it runs under
    prompts_hash: str
    started: str = ""  # when the run began, local time in ISO 8601: what its chat template is told of the date
    step: int = 0  # steps of R rollouts drawn, verified and settled
    spent: int = 0  # rollouts
    optimizer_steps: int = 0
    epoch: int = 0  # the one under way
    epoch_step: int = 0  # steps of this epoch that are done; 0: its rollouts are still to be allocated
    finished: bool = False
    accuracy: float | None = None  # held out, when last measured
    evaluated: int = 0  # rollouts spent by then
    best_accuracy: float | None = None  # of all evaluations so far
    since_best: int = 0  # evaluations since
    best_checkpoint: int = 0  # the number of the one that holds that policy; 0: it is not kept
    start_hash: str = ""  # of the parameters that RL started from, where resuming reads them again
    devices: str = ""  # that it goes on with, in words
    wandb_id: str = ""  # of its run in W&B, whether it has one
    metrics_position: dict | None = None  # how far the metrics files reach
    checkpoint_number: int = 0
    saved_step: int = 0  # step of that checkpoint
    health: dict = {}  # of health.py  # noqa: RUF012 (never changed in place)


def is_key(leaf: Any) -> bool:
    """Whether an array holds typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(tree: Any, part: str) -> dict[str, Any]:
    """The arrays of a tree, which is that part of the state ("": all of it), by their names in the state."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    inner = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    named = {".".join(filter(None, (part, name))): leaf for name, (_, leaf) in zip(inner, leaves, strict=True)}
    assert len(named) == len(leaves), "two arrays of a state have one name"
    return named


def _pack(tree: Any, part: str = "") -> dict[str, Any]:
    """What a file can hold: typed PRNG keys as plain integers, and no array of size 0 (Orbax refuses both)."""
    named = _named(tree, part)
    return {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in named.items() if leaf.size}


def _unpack(packed: dict[str, Any], like: Any, part: str = "") -> Any:
    """The inverse: keys and empty arrays where `like` has them."""
    restored = [
        jax.random.wrap_key_data(packed[name]) if is_key(leaf) else packed[name] if leaf.size else leaf
        for name, leaf in _named(like, part).items()
    ]
    return jax.tree.structure(like).unflatten(restored)


def _abstract(leaf: Any) -> Any:
    """Shape, dtype and place of an array to be restored; a NumPy array comes back as one."""
    if isinstance(leaf, np.ndarray):
        return np.empty_like(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


class Damaged(ValueError):
    """A checkpoint that holds something else than what was saved."""


def _check_asked(path: Path, asked: dict[str, Any], kept: dict[str, list], whole: bool) -> None:
    """Raise ValueError where the checkpoint was made of other arrays than those asked for."""
    wrong = [f"no {name}" for name in asked.keys() - kept.keys()]
    wrong += [f"{name}, which is not asked for" for name in kept.keys() - asked.keys() if whole]
    wrong += [
        f"{name} as {kept[name][0]}, not {type_of(leaf)}"
        for name, leaf in asked.items()
        if name in kept and kept[name][0] != type_of(leaf)
    ]
    if wrong:
        raise ValueError(
            f"{path} holds {'; '.join(sorted(wrong)[:4])}: go on with the version of cero_jax that began the run"
        )


def put_aside(path: Path) -> Path:
    """Move what is damaged or in the way into the folder put_aside beside it, under a free name; returns where."""
    into = path.parent / "put_aside"
    into.mkdir(exist_ok=True)
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    return path.rename(next(into / name for name in names if not (into / name).exists()))


class _NewestAndBest:
    """Which checkpoints stay, as Orbax asks: the newest KEPT, and the one with the best policy."""

    best = 0  # its number; 0: there is none

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """For each of the checkpoints, oldest first."""
        del context
        return [place >= len(checkpoints) - KEPT or each.step == self.best for place, each in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one run directory, over Orbax's CheckpointManager.

    One that is damaged is put aside, and the one before it takes its place; both are said on stderr. read_only: beside
    a run that is still writing; a damaged one is left where it is.
    """

    def __init__(self, directory: Path, read_only: bool = False):
        self._kept = _NewestAndBest()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,
            create=True,
            async_options=ocp.AsyncOptions(timeout_secs=SAVED_APART),
        )
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_from_orbax)
        _hush_closed_loops()
        self._directory, self._read_only = directory, read_only
        self._passed_over: set[int] = set()
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SPLIT_FROM)
        handlers = (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
        registry = ocp.type_handlers.create_type_handler_registry(*handlers)
        of_state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        items = {"state": of_state, "cursor": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=items)

    def cursor(self) -> Cursor | None:
        """The newest checkpoint's cursor, None where nothing was saved. Raises ValueError where none can be read."""
        return hosts.of_first(self._newest)

    def newest_whole(self) -> Cursor | None:
        """The newest cursor that is whole; None where none is.

        Moves nothing and says nothing: `cursor` speaks of damage. Raises as it does of what cannot be read now.
        """
        return hosts.of_first(self._newest_whole)

    def _newest_whole(self) -> Cursor | None:
        for number in sorted(self._numbers(), reverse=True):
            with suppress(Damaged):
                return self._read_cursor(number)[0]
        return None

    def _newest(self) -> Cursor | None:
        while numbers := self._numbers():
            try:
                return self._read_cursor(max(numbers))[0]
            except Damaged as error:
                self._pass_over(max(numbers), error)
        return None

    def best(self) -> Cursor | None:
        """The cursor of the checkpoint with the best policy; None where none is kept. Raises ValueError if damaged."""
        newest = self._newest()
        return self._read_cursor(newest.best_checkpoint)[0] if newest and newest.best_checkpoint else None

    def restore(self, cursor: Cursor, like: Any, part: str = "") -> tuple[Cursor, Any]:
        """The state saved with `cursor`, or a part of it by name ("policy.params"), read alone.

        like: the same tree, whose leaves give dtype, shape and sharding. Where what was saved is damaged, the newest
        before it that is whole, with its cursor. Raises ValueError where none is, OSError where it cannot be read now.
        """
        while True:
            try:
                return cursor, self._restore(cursor.checkpoint_number, like, part)
            except Damaged as error:
                hosts.of_first(partial(self._pass_over, cursor.checkpoint_number, error))
            before = self.cursor()
            assert before is not None  # else _pass_over raised
            cursor = before

    def save(self, cursor: Cursor, state: Any) -> Cursor:
        """Start saving; returns once the state is copied off the devices. Raises OSError if it, or the last, failed."""
        cursor = cursor._replace(checkpoint_number=cursor.checkpoint_number + 1, saved_step=cursor.step)
        packed = _pack(state)
        saved = {"layout": LAYOUT, "arrays": described(packed)} | cursor._asdict()
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(packed), cursor=ocp.args.JsonSave(saved | {"checksum": text_checksum(saved)})
        )
        with self._failures_named():
            self._manager.wait_until_finished()
            hosts.of_first(partial(self._make_way, cursor.checkpoint_number))
            self._manager.reload()
            self._kept.best = cursor.best_checkpoint
            if not self._manager.save(cursor.checkpoint_number, args=args):
                raise OSError("Orbax did not save it")
        return cursor

    def _make_way(self, next_number: int) -> None:
        """Put aside what is not this run's and would keep Orbax from saving, which it would not say."""
        for number in self._numbers():
            if number >= next_number:
                aside = put_aside(self._directory / str(number))
                say(f"{self._directory / str(number)}: not a checkpoint of this run, put aside as {aside}")

    def check(self) -> None:
        """Raise OSError where the last save failed; one that is still under way is not waited for."""
        if not self._manager.is_saving_in_progress():
            with self._failures_named():
                self._manager.wait_until_finished()  # its check_for_errors knows nothing of a save that has ended

    def close(self) -> None:
        """Wait for the save under way. Raises OSError if it failed."""
        with self._failures_named():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._manager.close()

    def _numbers(self) -> set[int]:
        """The numbers of the checkpoints that lie in the directory now, without those that were found damaged."""
        names = [path.name for path in self._directory.iterdir()]
        return {int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)} - self._passed_over

    def _read_cursor(self, number: int) -> tuple[Cursor, dict[str, list]]:
        """A checkpoint's cursor, and what its arrays must be: [dtype and shape, checksum] by name."""
        path = self._directory / str(number)
        with _damage_named(path):
            saved = json.loads((path / "cursor/metadata").read_bytes())  # as Orbax's JsonSave wrote it
            layout, checksum = saved.get("layout", 1), saved.pop("checksum", None)
            if checksum != text_checksum(saved) and (layout == LAYOUT or checksum is not None):
                raise ValueError("its cursor is not what was saved")
        if layout != LAYOUT:
            raise ValueError(
                f"{path}: a checkpoint of layout {layout}, and this version of cero_jax reads layout {LAYOUT}: finish "
                "the run with the version that began it, or begin anew in another --work-dir"
            )
        if saved["checkpoint_number"] != number:
            raise Damaged(f"{path}: a copy of checkpoint {saved['checkpoint_number']}")
        return Cursor(**{name: saved[name] for name in Cursor._fields if name in saved}), saved["arrays"]

    def _restore(self, number: int, like: Any, part: str) -> Any:
        packed = {name: _abstract(leaf) for name, leaf in _pack(like, part).items()}
        path, (_, kept) = self._directory / str(number), hosts.of_first(partial(self._read_cursor, number))
        _check_asked(path, packed, kept, whole=not part)
        args = ocp.args.PyTreeRestore(
            packed, ocp.checkpoint_utils.construct_restore_args(packed), partial_restore=bool(part)
        )
        with _damage_named(path):
            composite = ocp.args.Composite(state=args)
            restored = hosts.alike(lambda: self._manager.restore(number, args=composite)["state"])
            found = described(restored)
            if changed := [name for name in packed if found[name] != kept[name]]:
                raise ValueError(f"{', '.join(changed[:3])}: not the bits that were saved")
            return _unpack(restored, like, part)

    def _pass_over(self, number: int, error: Damaged) -> None:
        """Put a damaged checkpoint aside, or leave it where the directory is another's. Raises ValueError at the last.

        The last one stays: a run does not begin anew, over what it did, without being told to. Beside a run that has
        saved another meanwhile it may have been deleted while it was read: nothing is said, and the newest is read.
        """
        numbers = self._numbers()
        if self._read_only and max(numbers, default=0) > number:
            return
        before = [each for each in numbers if each < number]
        if not before:
            anew = f"move {self._directory} away to begin anew"
            raise ValueError(
                f"{error}, and there is none before it to go on from: put it back from a copy, or "
                f"{'let the run save another' if self._read_only else anew}"
            ) from error
        if self._read_only:
            self._passed_over.add(number)
            done = "left where it is"
        else:
            done = f"put aside as {put_aside(self._directory / str(number))}"
        say(f"{error}; {done}; checkpoint {max(before)} takes its place")

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind Orbax's writers met
            raise OSError(
                f"a checkpoint in {self._directory} could not be saved ({_in_short(error)}): make room or mend the "
                "folder; the same command goes on from the checkpoint before"
            ) from error


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of whatever kind Orbax's readers met
        why = _in_short(error)
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) or any(
            words in str(error) for words in _NOT_NOW
        ):
            raise OSError(
                f"{path}: a checkpoint that cannot be read now ({why}): mend that, or move it away"
            ) from error
        raise Damaged(f"{path}: a damaged checkpoint ({why})") from error


def _in_short(error: Exception) -> str:
    """An exception in one line: its beginning says what, its end why."""
    while "Barrier timed out" in str(error):  # Orbax waits for the other hosts after an error too, and raises this
        if not isinstance(error.__context__, Exception):
            return f"what another host was to write did not come within {SAVED_APART} s"
        error = error.__context__
    line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return line if len(line) <= 300 else f"{line[:100]} ... {line[-180:]}"


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs what it raises too, with a traceback from each of its threads, and asyncio does from each task."""
    return record.levelno < logging.WARNING or not ("orbax" in record.pathname or "orbax" in record.getMessage())


@cache  # once is enough
def _hush_closed_loops() -> None:
    """Let nothing be printed of a loop that is closed.

    Where several arrays are damaged, Orbax closes its event loop at the first, and TensorStore then has nobody to tell
    of the others: Python would print a traceback for each.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def fail_at_once(*expected: type[Exception]) -> NoReturn:
    """Print the exception being handled, in one line where it is `expected`, and end the process with status 1.

    sys.exit would wait for Orbax's writer threads, which never end after a failed save, and for other processes.
    """
    error = sys.exc_info()[1]
    try:
        if hosts.is_broken_off(error):
            why = str(error).partition("\n")[0][:200]
            say(f"error: another process is gone ({why}): JAX will say which, by its number: {hosts.names()}")
            hosts.wait_for_the_dead()
        elif isinstance(error, expected):
            say(f"error: {hosts.noted(error)}")
        elif line := starting.what_to_install(error):
            say(f"error: {line}")
        else:
            traceback.print_exc()
        sys.stdout.flush()  # os._exit flushes nothing
    finally:  # also where nobody can read that any more
        os._exit(1)
