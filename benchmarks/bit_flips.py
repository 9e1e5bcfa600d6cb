"""Flip one random bit of a checkpoint, many times. Each flip must be found, or change nothing that is restored.

    python -m benchmarks.bit_flips --flips 100 --seed 0

The run is that of tests/tiny_run.py; its newest checkpoint is damaged, and so is the warm start in the cache beside it.
Every second bit is drawn from all bytes, the others from a file drawn first, so that small files have their share.
"found": the checkpoint was put aside and the one before it restored, or the warm start made again. "without effect":
cursor and every array are those that were saved, to the bit. "SILENT": something else was restored and not a word said.
"""

import argparse
import collections
import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import train
from cero_jax import run as runs
from cero_jax.checkpoint import Checkpoints, is_key
from cero_jax.initial_policy import starting_policy
from cero_jax.sharding import make_mesh
from tests.tiny_run import tiny_config

Read = Callable[[Path], tuple[object, list[np.ndarray]]]  # of a directory: what is read from it, as plain values


def arrays_of(tree: object) -> list[np.ndarray]:
    """Every array of a tree, on the host."""
    return [np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in jax.tree.leaves(tree)]


def flip(folder: Path, rng: random.Random, by_file: bool) -> str:
    """Flip a bit in a file of a folder; returns the file's name there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    weights = None if by_file else [path.stat().st_size for path in files]
    path = rng.choices(files, weights)[0]
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    name = str(path.relative_to(folder))
    return name if len(path.name) < 32 else f"{name[:-32]}<data>"


def outcome(read: Read, directory: Path, whole: tuple[object, list[np.ndarray]], aside: Path) -> str:
    """What came of a damaged directory."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            cursor, arrays = read(directory)
        except Exception as error:
            return f"an error: {type(error).__name__}: {str(error)[:80]}"
    if aside.exists():
        return "found" if "damaged" in said.getvalue() else "put aside WITHOUT A WORD"
    same = cursor == whole[0] and all(a.tobytes() == b.tobytes() for a, b in zip(arrays, whole[1], strict=True))
    return "without effect" if same else "SILENT"


def count(title: str, read: Read, source: Path, damaged: str, aside: str, flips: int, rng: random.Random) -> bool:
    """Damage copies of `source`, in its folder `damaged`; print what came of each. Returns whether all is well."""
    whole, found = read(source), collections.defaultdict(collections.Counter)
    for number in range(flips):
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / source.name
            shutil.copytree(source, copy)
            name = flip(copy / damaged, rng, by_file=number % 2 == 1)
            found[name][outcome(read, copy, whole, copy / aside)] += 1
    print(f"\n{title}: {flips} flips")
    total = sum(found.values(), collections.Counter())
    for name, outcomes in [*sorted(found.items()), ("all", total)]:
        print(f"  {name:60} {', '.join(f'{many} {what}' for what, many in outcomes.most_common())}", flush=True)
    return set(total) <= {"found", "without effect"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp())
    config = tiny_config(folder / "run")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert train.main(config) == 0
        run, like, _ = runs.start(config)
        run.close()
    mesh = make_mesh(config.mesh)

    def checkpoint(directory: Path) -> tuple[object, list[np.ndarray]]:
        checkpoints = Checkpoints(directory)
        cursor = checkpoints.cursor()
        assert cursor is not None
        cursor, state = checkpoints.restore(cursor, like)
        checkpoints.close()
        return cursor, arrays_of(state)

    def warm_start(directory: Path) -> tuple[object, list[np.ndarray]]:
        return None, arrays_of(starting_policy(config, run.task, mesh, directory))

    newest = str(max(int(path.name) for path in (folder / "run/checkpoints").glob("[0-9]*")))
    saved, cached = folder / "run/checkpoints", next((folder / ".cache").glob("warm_start-*"))
    (folder / "cache").mkdir()
    shutil.copytree(cached, folder / "cache" / cached.name)
    fine = count("a checkpoint", checkpoint, saved, newest, f"put_aside/{newest}", args.flips, rng)
    aside = f"put_aside/{cached.name}"
    fine &= count("the warm start", warm_start, folder / "cache", cached.name, aside, args.flips // 4, rng)
    shutil.rmtree(folder)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
