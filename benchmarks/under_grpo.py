"""What an allocation does under GRPO's advantage: `cero` and the others beside equal shares, on twenty seeds and more.

    python benchmarks/under_grpo.py --when       # 0 to 60 % wrong gold answers: when does it pay?
    python benchmarks/under_grpo.py --savings    # with how many rollouts is `cero` where `uniform` ends?
    python benchmarks/under_grpo.py --allocators # every allocator, a third of the budget
    python benchmarks/under_grpo.py --groups     # may a group of `cero` fill a whole step, or half of one?
    python benchmarks/under_grpo.py --effects    # less noise, or more weight? (five seeds)

Each arm at the setting where its climb in sample_efficiency.py ended; runs are lines of the same file, and those that
are there are not run again. Some seeds are hard for every arm, and which arm loses one is mostly luck: the last bits of
a sum decide it. With five seeds one such run is two or three points of the mean; so here are twenty, and forty where it
is close.
"""

import argparse

import numpy as np
from sample_efficiency import (
    LATE,
    THIRD,
    WHOLE,
    Arm,
    Setting,
    cell,
    end,
    in_words,
    mean_and_error,
    name_other_starts,
    run_all,
    savings,
    tuned,
)

from cero_jax.statistics import bootstrap_interval

SEEDS = tuple(range(20))
FEW_SEEDS, MORE_SEEDS = SEEDS[:5], tuple(range(20, 40))
COLUMNS = (
    "| | accuracy at the end | median | worst | over the first, points (95 %) | seeds above it | rows with variance "
    "| rollouts on wrong gold | optimiser steps |\n" + "|---" * 9 + "|"
)


def compare(title: str, named: dict[str, list[dict]]) -> None:
    """Print each arm's ends, and how many points they are above the first arm's, seed by seed: [seeds] of each arm."""
    print(f"\n{title}\n{COLUMNS}")
    first = np.array([end(r) for r in next(iter(named.values()))])
    for name, results in named.items():
        ends = np.array([end(r) for r in results])
        points = 100 * (ends - first)
        low, high = bootstrap_interval(points, scale=(-100, 100))
        over = (
            [f"{points.mean():+.1f} ({low:+.1f} to {high:+.1f})", str(np.sum(points > 0))] if points.any() else ["", ""]
        )
        shares = [f"{np.mean([r[key] for r in results]):.0%}" for key in ("live_share", "wrong_gold_share")]
        steps = f"{np.mean([r['curve'][-1][1] for r in results]):.0f}"
        cells = [name, mean_and_error(ends), f"{np.median(ends):.3f}", f"{ends.min():.3f}", *over, *shares, steps]
        print(f"| {' | '.join(cells)} |", flush=True)
    name_other_starts(named)


def when(best: dict[str, Setting]) -> None:
    """`uniform` and `cero` with the whole budget: what the share of hopeless prompts makes of them."""
    forty = SEEDS + MORE_SEEDS
    for mix, seeds in ((0.0, forty), (0.2, SEEDS), (0.4, forty), (0.6, SEEDS)):
        named = {arm: run_all([cell(arm, best[arm], seed, WHOLE, mix) for seed in seeds]) for arm in best}
        compare(f"{mix:.0%} wrong gold answers, {WHOLE:,} rollouts", named)


def largest_group(best: dict[str, Setting]) -> None:
    """`cero` with groups of half a step at most, beside those of up to a step that its climb had."""
    half = {"allocator.max-group": best["cero"].rows // 2}
    arms = {"cero, up to a step": ("cero", {}), "cero, up to half a step": ("cero", half), "uniform": ("uniform", {})}
    for mix in (0.0, 0.4):
        named = {
            name: run_all([cell(arm, best[arm], seed, WHOLE, mix, **flags) for seed in MORE_SEEDS])
            for name, (arm, flags) in arms.items()
        }
        compare(f"the largest group, {mix:.0%} wrong gold answers, {WHOLE:,} rollouts", named)


def budgets_needed(best: dict[str, Setting]) -> None:
    """With how many rollouts `cero` is where `uniform` ends with the whole budget, as sample_efficiency.py counts."""
    uniform = run_all([cell("uniform", best["uniform"], seed, WHOLE) for seed in SEEDS])
    results = run_all([cell("cero", best["cero"], seed, budget) for seed in SEEDS for budget in LATE])
    ends = np.array([end(r) for r in results]).reshape(len(SEEDS), -1)
    saved = savings(np.array([end(r) for r in uniform]), WHOLE, ends, LATE)
    print(f"\ncero, 40 % wrong gold answers: {dict(zip(LATE, map(mean_and_error, ends.T), strict=True))}")
    print(f"times fewer rollouts than uniform's {WHOLE:,}: {in_words(saved)}, {saved['ratios']}")
    name_other_starts({"uniform": uniform, "cero": results})


def allocators(best: dict[str, Setting]) -> None:
    """Every allocator with a third of the budget, at the setting of `cero` or `uniform`.

    Those that choose a group's size get room: half as large again as the smallest on average, up to a step's rows.
    """
    named = {}
    for name in ("uniform", "cero", "cero_dual", "variance", "knapsack"):
        setting = best["cero" if name.startswith("cero") else "uniform"]
        room = {"allocator.group-size": 3 * setting.group // 2} if name in ("variance", "knapsack") else {}
        named[name] = run_all([cell(Arm(name, "grpo"), setting, seed, THIRD, **room) for seed in SEEDS])
    compare(f"every allocator, 40 % wrong gold answers, {THIRD:,} rollouts", named)


def effects(setting: Setting) -> None:
    """Less noise against more weight: by row, leave-one-out, rows over their prompt's rate keep uniform's objective."""
    plain = {"learner.aggregation": "sequence"}
    arms = {
        "uniform, rloo by row": ("uniform", plain),
        "cero, rloo by row, visit rates undone (less noise alone)": ("cero", plain | {"learner.undo-visit-rate": True}),
        "cero, rloo by row (less noise and more weight)": ("cero", plain),
    }
    named = {
        name: run_all([cell(Arm(allocator, "rloo"), setting, seed, WHOLE, **flags) for seed in FEW_SEEDS])
        for name, (allocator, flags) in arms.items()
    }
    compare(f"the two effects of an allocation, {setting}, {WHOLE:,} rollouts", named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("when", "savings", "allocators", "groups", "effects"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    best = {arm: tuned(arm) for arm in ("uniform", "cero")}
    if args.when:
        when(best)
    if args.savings:
        budgets_needed(best)
    if args.allocators:
        allocators(best)
    if args.groups:
        largest_group(best)
    if args.effects:
        effects(best["uniform"])


if __name__ == "__main__":
    main()
