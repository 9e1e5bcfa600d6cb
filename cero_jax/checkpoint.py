"""Everything that a run needs to go on, saved and restored as one, so that no two files can disagree on the latest.

A checkpoint holds `state` (policy, optimiser, allocator with its ledger and key, the `num_rollouts` of the round under
way) and `cursor` (where in the run that is, how far the metrics files reach, the hash of the prompts, the settings).
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

KEPT = 2  # the newest, and one more in case it is damaged


class Cursor(NamedTuple):
    """Where a run stands; plain values, saved as JSON."""

    config: dict  # the settings it runs under
    prompts_hash: str
    step: int = 0  # steps of R rollouts drawn, verified and settled
    spent: int = 0  # rollouts
    optimizer_steps: int = 0
    epoch: int = 0  # the round under way
    epoch_step: int = 0  # steps of this round that are done; 0: the round is still to be allocated
    finished: bool = False
    accuracy: float | None = None  # held out, when last measured
    evaluated: int = 0  # rollouts spent by then
    start_hash: str = ""  # of the parameters that RL started from, where resuming reads them again
    metrics: dict | None = None  # how far the metrics files reach
    save: int = 0  # number of this checkpoint
    saved_step: int = 0


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _pack(state: Any) -> Any:
    """What a file can hold: typed PRNG keys as plain integers, and no array of size 0 (Orbax refuses both)."""
    leaves = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(state)]
    return {str(i): leaf for i, leaf in enumerate(leaves) if leaf.size}


def _unpack(packed: Any, like: Any) -> Any:
    """The inverse: keys and empty arrays where `like` has them."""
    leaves, structure = jax.tree.flatten(like)
    restored = [packed.get(str(i), leaf) for i, leaf in enumerate(leaves)]
    return structure.unflatten(
        jax.random.wrap_key_data(new) if _is_key(leaf) else new for leaf, new in zip(leaves, restored, strict=True)
    )


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
            return Cursor(**saved)

    def restore(self, cursor: Cursor, like: Any) -> Any:
        """The state saved with `cursor`, laid out (dtype, shape, sharding) as `like` is."""
        packed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _pack(like)
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(packed))
        with self._damage_named(cursor.save):
            restored = self._manager.restore(cursor.save, args=args)["state"]
        return _unpack(restored, like)

    def save(self, cursor: Cursor, state: Any) -> Cursor:
        """Start saving; returns once the state is copied off the devices. Raises OSError if it, or the last, failed."""
        cursor = cursor._replace(save=cursor.save + 1, saved_step=cursor.step)
        args = ocp.args.Composite(state=ocp.args.StandardSave(_pack(state)), cursor=ocp.args.JsonSave(cursor._asdict()))
        with self._failures_named():
            self._manager.check_for_errors()
            self._manager.save(cursor.save, args=args)
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


class StopSignal:
    """Turns SIGTERM and SIGINT into a wish that the loop reads between steps; a second one acts as it always did."""

    def __init__(self):
        self.number = 0  # of the signal that came; 0: none
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame) -> None:
        self.number = number
        self.close()

    def close(self) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
