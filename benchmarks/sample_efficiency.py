"""How many rollouts does a method save? Allocations and advantages on the embedded task, each arm at its best setting.

    python benchmarks/sample_efficiency.py              # tune each arm, judge it on other seeds; tables and picture
    python benchmarks/sample_efficiency.py --mixes      # 60, 0 and 20 % wrong gold answers, not 40

The question of a user: where does uniform GRPO end with 12,800 rollouts, and what budget takes another arm there? Each
arm is run with several budgets, each a whole run that falls to its last learning rate. Every arm climbs the same grid
of learning rate, rows a step and group size from the same place, on seeds that are not judged, until no neighbour is
better: no chosen setting lies at an edge that could be moved. Each finished run is a line of sample_efficiency.jsonl
and is not run again: a stopped benchmark goes on. Runs share the machine, one core each; rollouts and steps do not
depend on that, seconds do.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

from cero_jax.grpo import WITHOUT_GROUP

HERE = Path(__file__).parent
RESULTS = HERE / "sample_efficiency.jsonl"
WHOLE, THIRD, EIGHTH = 12_800, 4_266, 1_600
BUDGETS = (800, EIGHTH, 3_200, THIRD, 6_400, WHOLE)  # rollouts
LATE, EARLY = BUDGETS[2:], BUDGETS[:3]  # where an arm is judged: around where it reaches uniform's end
RATES = (6e-5, 9e-5, 1.25e-4, 1.8e-4, 2.5e-4, 3.5e-4, 5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3)
ROWS = (2, 4, 8, 16, 32, 64)  # of an optimiser step, which has two at least
GROUPS = (1, 2, 4, 8, 16, 32)
START = (5e-4, 8, 4)  # learning rate, rows, group
TUNING_SEEDS, SEEDS = (100, 101, 102, 103, 104), (0, 1, 2, 3, 4)


class Arm(NamedTuple):
    """A method: what it is made of, the budget with which it is tuned, and those with which it is judged."""

    allocator: str
    advantage: str
    budget: int = THIRD
    judged: tuple[int, ...] = LATE
    dynamic_sampling: bool = False


ARMS = {
    "uniform": Arm("uniform", "grpo", WHOLE),  # tuned for the end that the others are to reach
    "uniform + posterior": Arm("uniform", "posterior"),
    "uniform + reward": Arm("uniform", "reward", EIGHTH, (*EARLY, WHOLE)),
    "cero": Arm("cero", "grpo"),
    "cero + posterior": Arm("cero", "posterior"),
    "cero + reward": Arm("cero", "reward", EIGHTH, (*EARLY, WHOLE)),
    "dynamic": Arm("uniform", "grpo", WHOLE, dynamic_sampling=True),  # DAPO
}
MAIN = ("uniform", "uniform + posterior", "uniform + reward", "cero", "cero + posterior", "cero + reward")


class Setting(NamedTuple):
    """What is tuned."""

    learning_rate: float
    rows: int
    group: int


def cell(arm: str | Arm, setting: Setting, seed: int, budget: int, wrong_share: float = 0.4, **flags) -> dict:
    """What identifies a run."""
    arm = ARMS[arm] if isinstance(arm, str) else arm
    of_arm = {key: value for key, value in arm._asdict().items() if key not in ("budget", "judged")}
    return {**of_arm, **setting._asdict(), "seed": seed, "budget": budget, "wrong_share": wrong_share, "flags": flags}


def command(cell: dict) -> list[str]:
    """The train.py call of one run."""
    flags = {
        "seed": cell["seed"],
        "allocator.name": cell["allocator"],
        "allocator.total-budget": cell["budget"],
        "allocator.min-group": cell["group"],  # cero's groups start here
        "allocator.group-size": cell["group"],  # the others' are of this size
        "allocator.max-group": max(cell["group"], min(32, cell["rows"])),
        "learner.advantage": cell["advantage"],
        "learner.rows-per-step": cell["rows"],
        "learner.learning-rate": cell["learning_rate"],
        "task.wrong-share": cell["wrong_share"],
        "dynamic-sampling": cell["dynamic_sampling"],
        "evaluation.every-rollouts": cell["budget"] // 16,
        "checkpoint-every-steps": 1_000_000,
        **cell["flags"],
    }
    return [
        sys.executable,
        str(HERE.parent / "train.py"),
        str(HERE.parent / "configs/chain_sum.py"),
        *(f"--{k}={v}" for k, v in flags.items()),
    ]


def run(cell: dict, core: int, scratch: Path) -> dict:
    """Train once on one core; the cell and its curve: rollouts, steps, accuracy and seconds at each evaluation."""
    with tempfile.TemporaryDirectory(dir=scratch) as work_dir:
        done = subprocess.run(
            [*command(cell), f"--work-dir={work_dir}"],
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command(cell))} failed:\n{done.stderr[-3000:]}")
        rows, timings = (
            [json.loads(line) for line in (Path(work_dir) / name).open()] for name in ("metrics.jsonl", "timings.jsonl")
        )
        labels = json.loads((Path(work_dir) / "prompts.json").read_text())["labels"]
    spent_seconds, curve = 0.0, []
    for row, timing in zip(rows, timings, strict=True):
        if row["kind"] == "step":
            spent_seconds += timing["sample_seconds"] + timing["learn_seconds"]
        elif row["kind"] == "eval":
            curve.append([row["spent"], row["optimizer_steps"], round(row["accuracy"], 5), round(spent_seconds, 2)])
    steps = [row for row in rows if row["kind"] == "step"]
    wrong = sum(
        n for r in steps for p, n in zip(r["prompt_ids"], r["num_rollouts"], strict=True) if labels[p] == "wrong gold"
    )
    live = sum(row["live_share"] * sum(row["num_rollouts"]) for row in steps)
    total = sum(sum(row["num_rollouts"]) for row in steps)
    return cell | {"curve": curve, "live_share": round(live / total, 4), "wrong_gold_share": round(wrong / total, 4)}


def finished() -> dict[str, dict]:
    """Runs done so far, by their cell."""
    if not RESULTS.exists():
        return {}
    keys = cell("uniform", Setting(*START), 0, WHOLE)
    runs = [json.loads(line) for line in RESULTS.open()]
    return {json.dumps({key: r[key] for key in keys}): r for r in runs}


def run_all(cells: list[dict]) -> list[dict]:
    """Every cell's result, running those that are not there yet, one a core."""
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    scratch = Path(os.environ.get("SCRATCH", tempfile.gettempdir())) / "sample_efficiency"
    scratch.mkdir(parents=True, exist_ok=True)
    there = finished()
    todo = [c for c in cells if json.dumps(c) not in there]
    # Runs of one seed share a warm start: the first of each seed goes alone, so that it is computed once.
    first = {c["seed"]: c for c in reversed(todo)}.values()
    later = [c for c in todo if c not in first]

    def one(c: dict) -> None:
        core = cores.get()
        try:
            line = json.dumps(run(c, core, scratch))
        finally:
            cores.put(core)
        with RESULTS.open("a") as file:
            file.write(line + "\n")
        print("  " + " ".join(str(value) for value in c.values()), flush=True)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(one, first))
        list(pool.map(one, later))
    there = finished()
    return [there[json.dumps(c)] for c in cells]


def end(result: dict) -> float:
    """Held-out accuracy when the budget is spent."""
    return result["curve"][-1][2]


def neighbours(setting: Setting, least_group: int) -> list[Setting]:
    """The settings one step away along each axis. Raises ValueError at an edge of the grid that could be moved."""
    found = []
    for field, grid in zip(Setting._fields, (RATES, ROWS, GROUPS), strict=True):
        place = grid.index(getattr(setting, field))
        least = least_group if field == "group" else grid[0]
        if place == len(grid) - 1 or (place == 0 and field == "learning_rate"):
            raise ValueError(f"{setting} lies at the edge of the grid: widen {field}")
        around = [grid[i] for i in (place - 1, place + 1) if i >= 0 and grid[i] >= least]
        found += [setting._replace(**{field: value}) for value in around]
    return [s for s in found if s.group <= s.rows]


def tuned(arm: str) -> Setting:
    """Where a climb over the grid ends, by the mean accuracy at the end of the arm's budget.

    Two seeds look at a setting; one that leads is run with all tuning seeds before its neighbours are looked at, since
    two seeds praise many that fall apart on a third.
    """
    least_group = 1 if ARMS[arm].advantage in WITHOUT_GROUP else 2
    scores: dict[Setting, float] = {}
    sure: set[Setting] = set()

    def score(settings: list[Setting], seeds: tuple[int, ...]) -> None:
        results = run_all([cell(arm, s, seed, ARMS[arm].budget) for s in settings for seed in seeds])
        means = np.array([end(r) for r in results]).reshape(len(settings), -1).mean(axis=1)
        scores.update(zip(settings, means.tolist(), strict=True))

    score([Setting(*START)], TUNING_SEEDS[:2])
    while True:
        best = max(scores, key=lambda s: scores[s])
        if best not in sure:
            score([best], TUNING_SEEDS)
            sure.add(best)
        elif new := [s for s in neighbours(best, least_group) if s not in scores]:
            score(new, TUNING_SEEDS[:2])
        else:
            break
    for s in sorted(sure, key=lambda s: -scores[s]):
        print(f"{arm}: rate {s.learning_rate:g}, {s.rows} rows, groups from {s.group}: {scores[s]:.4f}", flush=True)
    return best


def budget_needed(budgets: tuple[int, ...], ends: np.ndarray, target: float) -> float:
    """Rollouts with which a run ends at `target`; inf: none of the budgets is enough.

    ends: [budgets] accuracies at the end, fitted by the closest that never fall; between budgets, linear in the
    budget's logarithm.
    """
    fitted = isotonic_regression(ends).x
    above = np.flatnonzero(fitted >= target)
    if not above.size:
        return np.inf
    i = above[0]
    if i == 0:
        return float(budgets[0])
    return float(np.exp(np.interp(target, fitted[i - 1 : i + 1], np.log(budgets[i - 1 : i + 1]))))


def savings(target: np.ndarray, whole: int, ends: np.ndarray, budgets: tuple[int, ...]) -> dict:
    """How many times fewer rollouts than `whole` end at `target`.

    target: [seeds] accuracies that `whole` rollouts of another arm end at; ends: [seeds, budgets]. Geometric mean over
    seeds with a bootstrap interval. A seed that never gets there is `censored` and counts as the whole budget; one that
    is there with the least counts as that.
    """
    needs = [budget_needed(budgets, row, wanted) for wanted, row in zip(target, ends, strict=True)]
    ratio = np.log(whole / np.minimum(needs, whole))
    # Paired: a seed brings both sides.
    draws = np.random.default_rng(0).choice(ratio, (10_000, len(ratio))).mean(axis=1)
    low, high = np.exp(np.quantile(draws, [0.025, 0.975]))
    return {
        "ratio": float(np.exp(ratio.mean())),
        "low": float(low),
        "high": float(high),
        "ratios": np.exp(ratio).round(2).tolist(),
        "censored": int(np.sum(~np.isfinite(needs))),
    }


def name_other_starts(found: dict[str, list[dict]]) -> None:
    """Say which seeds are no pairs: the last bits of a warm start, and so its policy, hang on the kind of CPU."""
    starts: dict[int, set[float]] = {}
    for result in chain.from_iterable(found.values()):
        starts.setdefault(result["seed"], set()).add(result["curve"][0][2])
    if apart := sorted(seed for seed, accuracies in starts.items() if len(accuracies) > 1):
        print(f"seeds whose runs did not start from one policy, and so are not paired: {apart}")


def mean_and_error(values) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def judge(best: dict[str, Setting], wrong_share: float, judged: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Run each arm at its setting with its budgets, print the table; each arm's accuracies [seeds, budgets]."""
    found = {
        arm: run_all([cell(arm, best[arm], seed, b, wrong_share) for seed in SEEDS for b in judged[arm]])
        for arm in judged
    }
    ends = {arm: np.array([end(r) for r in results]).reshape(len(SEEDS), -1) for arm, results in found.items()}
    print(f"\n{wrong_share:.0%} wrong gold answers, seeds {SEEDS[0]} to {SEEDS[-1]}")
    print(
        "| accuracy at the end of | "
        + " | ".join(f"{budget:,}" for budget in BUDGETS)
        + " | worst | optimiser steps | seconds | rows with variance | rollouts on wrong gold | times fewer rollouts "
        "to uniform's end (95 %) |\n" + "|---" * (len(BUDGETS) + 7) + "|"
    )
    for arm, results in found.items():
        budgets = judged[arm]
        whole = results[len(budgets) - 1 :: len(budgets)]
        saved = savings(ends["uniform"][:, -1], WHOLE, ends[arm], budgets)
        column = dict(zip(budgets, map(mean_and_error, ends[arm].T), strict=True))
        cells = [column.get(budget, "") for budget in BUDGETS] + [f"{ends[arm][:, -1].min():.3f}"]
        cells += [f"{np.mean([r['curve'][-1][i] for r in whole]):.0f}" for i in (1, 3)]
        cells += [f"{np.mean([r[key] for r in results]):.0%}" for key in ("live_share", "wrong_gold_share")]
        print(f"| {arm} | {' | '.join(cells)} | {in_words(saved)} |\n  seed by seed: {saved['ratios']}", flush=True)
    name_other_starts(found)
    # The allocation alone, under the advantage that needs least: with more than this both are at the top.
    place = EARLY.index(EIGHTH)
    early = {arm: ends[arm][:, : len(EARLY)] for arm in ("uniform + reward", "cero + reward")}
    saved = savings(early["uniform + reward"][:, place], EIGHTH, early["cero + reward"], EARLY)
    print(f"cero + reward to where uniform + reward ends with {EIGHTH:,}: {in_words(saved)}, {saved['ratios']}")
    return ends


def in_words(saved: dict) -> str:
    """A saving with its interval, and how many seeds never got there."""
    censored = f", {saved['censored']} never" if saved["censored"] else ""
    return f"{saved['ratio']:.2f} ({saved['low']:.2f} to {saved['high']:.2f}{censored})"


def draw(ends: dict[str, np.ndarray], output: Path) -> None:
    """Accuracy at the end against the budget: every seed, and the mean over seeds with its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    palette = ("#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#0072B2", "#009E73")
    colours: dict[str, str] = dict(zip(MAIN, palette, strict=True))
    names = {"uniform": "uniform (GRPO)"}
    figure, axis = plt.subplots(figsize=(8, 4.8))
    for place, (arm, values) in enumerate(ends.items()):
        x = np.array(ARMS[arm].judged) * 1.02 ** (place - 2.5)  # beside one another
        mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / len(values) ** 0.5
        axis.errorbar(x, mean, error, color=colours[arm], label=names.get(arm, arm), lw=2, marker="o", capsize=3)
        axis.plot(x, values.T, ".", color=colours[arm], alpha=0.4, ms=5)
    axis.axhline(ends["uniform"][:, -1].mean(), color=colours["uniform"], ls=":", lw=1)
    axis.set(xscale="log", xlabel="budget, rollouts", ylabel="held-out accuracy at the end")
    axis.set_xticks(BUDGETS, [f"{budget:,}" for budget in BUDGETS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    axis.set_title("Chain sums, 40 % wrong gold answers; a dot is a run, a line the mean over 5 seeds", fontsize=10)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    print(f"\npicture: {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", action="store_true")
    args = parser.parse_args()
    best = {arm: tuned(arm) for arm in MAIN}
    print(f"best settings: {best}", flush=True)
    if args.mixes:
        for mix in (0.0, 0.6, 0.2):
            judge(best, mix, {"uniform": (WHOLE,), "cero + reward": EARLY, "uniform + reward": EARLY})
    else:
        draw(judge(best, 0.4, {arm: ARMS[arm].judged for arm in MAIN}), HERE / "sample_efficiency.png")


if __name__ == "__main__":
    main()
