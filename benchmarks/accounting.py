"""Whole runs of every allocator with large budgets and many prompts: spent to the rollout, and never more.

    python benchmarks/accounting.py --prompts 1000 1000000 --allocators knapsack variance

Each run has 6 epochs, in which every second rollout is right. Bounds, sums and ledger are held against 64-bit integers;
the script ends with status 1 where one of them is off by a rollout.
"""

import argparse
import sys
import time

import jax
import numpy as np

import cero_jax
from cero_jax.allocator.ledger import MOST

ALLOCATORS = ("cero", "uniform", "variance", "knapsack", "cero_dual")
BUDGETS = (2**24 + 1, 2**25, 2**25 + 9, 2**28 + 5, 2**30 + 7, MOST - 7, MOST)
EPOCHS, LEAST = 6, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=ALLOCATORS)
    args, right = parser.parse_args(), True
    for num_prompts in args.prompts:
        largest = 3 * 2**31 // (EPOCHS * num_prompts)  # groups that can take in the largest budget, and no power of two
        for make in (getattr(cero_jax, name) for name in args.allocators):
            run = jax.jit(whole_run(make, num_prompts, largest))
            for budget in BUDGETS:
                began = time.perf_counter()
                handed, ledger, drawn = jax.device_get(run(budget))
                handed, drawn = handed.astype(np.int64), drawn.astype(np.int64)
                wanted = budget if make is not cero_jax.cero_dual else budget - budget % largest
                exact = handed.sum() == drawn.sum() == ledger.spent <= wanted
                exact &= make is cero_jax.cero_dual or handed.sum() == wanted
                exact &= bool(np.all((handed == 0) | ((handed >= LEAST) & (handed <= largest))))
                right &= bool(exact)
                print(
                    f"{make.__name__:<10}{num_prompts:>10,} prompts {budget:>14,} rollouts: {handed.sum():>14,} spent, "
                    f"{'exact' if exact else 'WRONG'}, {time.perf_counter() - began:.2f} s",
                    flush=True,
                )
    sys.exit(0 if right else 1)


def whole_run(make, num_prompts: int, largest: int):
    """A run: budget [] -> ([epochs, N] rollouts handed out, the ledger at the end, [N] rollouts of each prompt)."""

    def run(budget):
        own = {"group_size": largest, "units_per_group": 1} if make is cero_jax.cero_dual else {}
        allocator = make(total_budget=budget, num_epochs=EPOCHS, min_group=LEAST, max_group=largest, **own)

        def epoch(state, _):
            num_rollouts, state = allocator.allocate(state)
            return allocator.update(state, num_rollouts, num_rollouts // 2), num_rollouts

        state, handed = jax.lax.scan(epoch, allocator.init(num_prompts), length=EPOCHS)
        return handed, state.ledger, state.cumulative_rollouts

    return run


if __name__ == "__main__":
    main()
