"""A run of 500 steps that saves at every fourth: does it hold on to memory, files or threads?

    python benchmarks/leaks.py --steps 500

The run is that of tests/tiny_run.py, with a longer budget. Its own resident memory, open files, threads and child
processes are read right after saves. Ends with status 1 where the last fifth of the run has over 20 MB more than its
second, or over 5 more of any count, where one kept at each save would be some 75. The first fifth compiles and fills
caches; the threads that save come and go.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import train
from cero_jax.config import AllocatorConfig
from cero_jax.evaluation import EvaluationConfig
from cero_jax.run import Run
from tests.tiny_run import tiny_config

ROWS, GROWN_MB, GROWN_COUNT = 16, 20.0, 5


def held() -> dict[str, float]:
    """What this process holds now."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "memory (MB)": resident / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "system threads": len(os.listdir("/proc/self/task")),
        "processes": len(children),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    seen, save = [], Run.save

    def measured(self, state, cursor):
        cursor = save(self, state, cursor)
        seen.append({"step": cursor.step} | held())
        return cursor

    Run.save = measured
    with tempfile.TemporaryDirectory() as folder:
        budget = AllocatorConfig(total_budget=ROWS * steps, num_epochs=steps // 2, min_group=2, max_group=8)
        evaluation = EvaluationConfig(every_rollouts=ROWS * steps // 5, samples=2, rows=ROWS)
        train.main(tiny_config(folder, allocator=budget, evaluation=evaluation))
        files = sum(path.is_file() for path in Path(folder).rglob("checkpoints/*/**/*"))
    parts = [seen[len(seen) * part // 5 : len(seen) * (part + 1) // 5] for part in range(5)]
    print(
        f"{len(seen)} saves in {seen[-1]['step']} steps; medians of each fifth; {files} files of checkpoints at the end"
    )
    grown = []
    for name in seen[0].keys() - {"step"}:
        medians = [statistics.median(each[name] for each in part) for part in parts]
        print(f"{name:>15}" + "".join(f"{x:>10.1f}" for x in medians))
        if medians[4] > medians[1] + (GROWN_MB if "MB" in name else GROWN_COUNT):
            grown.append(name)
    print(f"grown: {', '.join(grown) or 'nothing'}")
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main()
