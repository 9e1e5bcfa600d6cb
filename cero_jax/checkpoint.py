"""Everything that a run needs to go on, saved and restored as one, so that no two files can disagree on the latest.

A checkpoint holds `state` (policy, optimiser, allocator with its ledger and key, the rollouts of the epoch under way)
and `cursor` (where in the run that is, how far the metrics files reach, the hash of the prompts, the settings). Each
array is kept under its name in the state, "policy.params.layers.attn.q", and read back by that name.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

KEPT = 2  # the newest, and one more in case it is damaged
LAYOUT = 2  # of a checkpoint; 1 kept arrays by position


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
    start_hash: str = ""  # of the parameters that RL started from, where resuming reads them again
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


def _check_restored(restored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError for an array that was not there, or is of another shape: what was asked for comes back then."""
    for name, leaf in asked.items():
        if restored[name] is leaf or isinstance(restored[name], jax.ShapeDtypeStruct):
            raise ValueError(f"no {name} in it")
        if restored[name].shape != leaf.shape:
            raise ValueError(f"{name} has shape {restored[name].shape}, not {leaf.shape}")


class Checkpoints:
    """The checkpoints of one run directory, over Orbax's CheckpointManager."""

    def __init__(self, directory: Path, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True, create=True)
        if read_only:  # beside a run that is still writing
            options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory, options=options)

    def cursor(self) -> Cursor | None:
        """The latest step's cursor, None where nothing was saved."""
        step = self._manager.latest_step()
        if step is None:
            return None
        with self._damage_named(step):
            saved = self._manager.restore(step, args=ocp.args.Composite(cursor=ocp.args.JsonRestore()))["cursor"]
        layout = saved.pop("layout", 1)
        if layout != LAYOUT:
            raise ValueError(
                f"{self._directory / str(step)}: a checkpoint of layout {layout}, and this version of cero_jax reads "
                f"layout {LAYOUT}: finish the run with the version that began it, or begin anew in another --work-dir"
            )
        with self._damage_named(step):
            return Cursor(**saved)

    def restore(self, cursor: Cursor, like: Any, part: str = "") -> Any:
        """The state saved with `cursor`, or a part of it by name ("policy.params"), read alone.

        like: the same tree, whose leaves give dtype, shape and sharding. Raises ValueError where it cannot be read.
        """
        packed = {name: _abstract(leaf) for name, leaf in _pack(like, part).items()}
        args = ocp.args.PyTreeRestore(
            packed, ocp.checkpoint_utils.construct_restore_args(packed), partial_restore=bool(part)
        )
        with self._damage_named(cursor.checkpoint_number):
            restored = self._manager.restore(cursor.checkpoint_number, args=ocp.args.Composite(state=args))["state"]
            _check_restored(restored, packed)
            return _unpack(restored, like, part)

    def save(self, cursor: Cursor, state: Any) -> Cursor:
        """Start saving; returns once the state is copied off the devices. Raises OSError if it, or the last, failed."""
        cursor = cursor._replace(checkpoint_number=cursor.checkpoint_number + 1, saved_step=cursor.step)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_pack(state)), cursor=ocp.args.JsonSave({"layout": LAYOUT} | cursor._asdict())
        )
        with self._failures_named():
            self._manager.check_for_errors()
            self._manager.save(cursor.checkpoint_number, args=args)
        return cursor

    def close(self) -> None:
        """Wait for the save under way. Raises OSError if it failed."""
        with self._failures_named():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._manager.close()

    @contextmanager
    def _damage_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind Orbax's readers met
            why = str(error).partition("\n")[0][:200]
            raise ValueError(
                f"{self._directory / str(step)}: a checkpoint that cannot be read ({type(error).__name__}: {why}): "
                "move it away, and the same command goes on from the one before"
            ) from error

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind Orbax's writers met
            raise OSError(
                f"a checkpoint in {self._directory} could not be saved ({error}): make room or mend the folder; the "
                "same command goes on from the checkpoint before"
            ) from error


def fail_at_once() -> NoReturn:
    """Print the exception being handled and end the process with status 1.

    sys.exit would wait for Orbax's writer threads, which never end after a failed save.
    """
    error = sys.exc_info()[1]
    if isinstance(error, OSError) and error.errno is None:  # one of ours, which says all
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exc()
    sys.stdout.flush()  # os._exit flushes nothing
    os._exit(1)
