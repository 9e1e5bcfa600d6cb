"""Kill a small run at random times, resume it each time, and compare its end with that of an uninterrupted run.

    python benchmarks/kill_resume.py --kills 20 --seed 0

SIGKILL comes after a random number of seconds, wherever the run then is: start-up, compilation, a step, a checkpoint.
Metrics, parameters and the allocator's state must be the same to the bit, and no kill may look like a damaged
checkpoint. The run is that of tests/tiny_run.py.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("NPROC", "8")  # fixes the size of XLA's thread pool, and with it the bits of a matrix product
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parent.parent
COMPARE = """
import sys
import numpy as np
from tests.tiny_run import runs_end
mine, theirs = (runs_end(path) for path in sys.argv[1:])
assert mine[0].spent == theirs[0].spent and all(np.array_equal(a, b) for a, b in zip(mine[1], theirs[1], strict=True))
"""


def run(work_dir: Path, seconds: float | None = None) -> int:
    """Start the run or resume it, and kill it after `seconds` where given. Returns the exit status."""
    command = [sys.executable, "-m", "tests.tiny_run", str(work_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, rng = Path(tempfile.mkdtemp()), random.Random(args.seed)
    run(folder / "whole")  # fills the cache of compiled programs, so that the next run's time is a resumed run's
    began = time.monotonic()
    run(folder / "timed")
    whole_seconds = time.monotonic() - began
    kills, part = 0, 0
    while kills < args.kills:
        part += 1
        while kills < args.kills and run(folder / f"cut{part}", rng.uniform(0.2, 1.0) * whole_seconds) != 0:
            kills += 1
        assert run(folder / f"cut{part}") == 0
        whole, cut = ((folder / name / "metrics.jsonl").read_bytes() for name in ("whole", f"cut{part}"))
        state = subprocess.run(
            [sys.executable, "-c", COMPARE, str(folder / "whole"), str(folder / f"cut{part}")], cwd=ROOT
        )
        damaged = (folder / f"cut{part}/checkpoints/put_aside").exists()
        same = whole == cut and state.returncode == 0 and not damaged
        what = "identical" if same else "DIFFER" if not damaged else "from a DAMAGED checkpoint"
        print(f"run {part}, {kills} kills so far: metrics, parameters, allocator {what}", flush=True)
        if not same:
            sys.exit(1)


if __name__ == "__main__":
    main()
