"""Is a run safe in a bucket, into which it is copied while it goes on, as docs/clusters.md says?

    python benchmarks/bucket.py --times 5

A folder stands in for the bucket: an object is there whole or not at all, and there are no empty folders. The small run
of host_faults.py and what copies it both end at an object drawn at random; what the run had on its disk is lost; the
copy is brought back, and the same command has to end as the run that was never stopped, to the bit. Ends with status 1
where it does not.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random

import host_faults
from hosts import compile_once, made, spawn


def copy_to(bucket: Path, run: Path, most: int) -> int:
    """Copy what is new, at most so many objects, and return how many of them are left.

    Of the checkpoints those that are there by now, and last: the files then reach at least as far as any of them.
    """
    # os.walk passes over folders that are gone by now
    paths = [Path(folder, name) for folder, _, names in os.walk(run) for name in names if name != "lock"]
    saved = [path for path in paths if "checkpoints" in path.parts]
    whole = [path for path in saved if path.relative_to(run).parts[1].isdigit()]
    for path in [*(path for path in paths if path not in saved), *whole]:
        there = bucket / path.relative_to(run)
        with contextlib.suppress(FileNotFoundError):  # an old checkpoint, deleted meanwhile
            if not (there.exists() and there.stat().st_size == path.stat().st_size):
                there.parent.mkdir(parents=True, exist_ok=True)
                os.replace(shutil.copyfile(path, bucket / "under way"), there)
                most -= 1
        if not most:
            break
    return most


def die_and_go_on(folder: Path, most: int) -> bool:
    """Let the run and its copying die after so many objects, and go on from the copy; whether it ends as ever."""
    before = host_faults.never_stopped(folder)
    folder.mkdir()
    run, bucket = folder / "run", folder / "bucket"
    process = spawn(
        [sys.executable, host_faults.__file__, "--child", "small", "2", str(folder), ""], folder, "", 0, 1, 2
    )
    left = most
    while process.poll() is None and left:
        left = copy_to(bucket, run, left)
    process.kill()
    process.wait()
    shutil.rmtree(run)
    shutil.copytree(bucket, run)
    there = sorted(path.name for path in run.glob("checkpoints/*"))
    again = host_faults.started("small", folder, 1, 2)
    said = f"{again.printed[0].count('put aside as')} put aside"
    if again.statuses == [1] and "none before it to go on from" in again.printed[0]:
        said = "which is not whole: begun anew, as the run says"
        shutil.rmtree(run / "checkpoints")
        again = host_faults.started("small", folder, 1, 2)
    alike = again.statuses == [0] and made(folder) == made(before)
    print(
        f"{most} objects copied: checkpoints {' '.join(there) or 'none'}, {said}; the same command ends "
        f"{'as the run never stopped, to the bit' if alike else f'OTHERWISE {again.statuses}, {folder}'}",
        flush=True,
    )
    return alike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    times, folder, random = parser.parse_args().times, Path(tempfile.mkdtemp()), Random(0)
    compile_once(folder)
    good = [die_and_go_on(folder / f"{number}", random.randrange(10, 120)) for number in range(times)]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
