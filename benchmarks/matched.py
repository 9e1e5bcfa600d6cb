"""The control of an allocation: a finished run's counts at their times, each prompt's given to another prompt.

    python train.py configs/chain_sum.py --seed=3 --work-dir=runs/its
    python benchmarks/matched.py runs/its configs/chain_sum.py --seed=3 --work-dir=runs/permuted

What the first run gains over the second is worth the choice of prompts, not the sizes of groups or their times. The
permutation follows the seed. A run that is stopped cannot be resumed.
"""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from cero_jax.command_line import from_command_line  # noqa: E402
from train import start, train  # noqa: E402


def counts_of(directory: Path, num_prompts: int) -> np.ndarray:
    """[epochs, N] int32, rollouts of each prompt in a finished run."""
    steps = [row for row in map(json.loads, (directory / "metrics.jsonl").open()) if row["kind"] == "step"]
    counts = np.zeros((1 + max(row["epoch"] for row in steps), num_prompts), np.int32)
    for row in steps:
        np.add.at(counts[row["epoch"]], row["prompt_ids"], row["num_rollouts"])
    return counts


def main(directory: Path, arguments: list[str]) -> int:
    """Train; returns the exit status."""
    run, state, cursor = start(from_command_line(arguments))
    num_prompts = len(run.task.train.questions)
    order = np.random.default_rng(run.config.seed).permutation(num_prompts)
    epochs = iter(jnp.asarray(counts_of(directory, num_prompts)[:, order]))

    def allocate(allocator):
        counts = next(epochs, jnp.zeros(num_prompts, jnp.int32))
        ledger = allocator.ledger
        ledger = ledger._replace(reserved=ledger.reserved + counts.sum())
        return counts, allocator._replace(reserved=allocator.reserved + counts, ledger=ledger)

    return train(run._replace(allocate=allocate), state, cursor)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
