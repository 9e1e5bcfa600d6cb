"""How many rollouts does an allocation save? `cero`, `uniform` and dynamic sampling on the embedded task.

    python benchmarks/sample_efficiency.py              # tune on seeds 100..104; judge on 0..4; table and picture
    python benchmarks/sample_efficiency.py --mixes      # 0, 20, 40, 60 % wrong gold answers: when it pays
    python benchmarks/sample_efficiency.py --effects    # less noise, or more weight?
    python benchmarks/sample_efficiency.py --allocators # all allocators, the same budget

Every side is tuned over the same grid of learning rate, rows a step and group size, by its mean held-out accuracy over
the run, on seeds that are not judged. Each finished run is a line of sample_efficiency.jsonl and is not run again: a
stopped benchmark goes on. Runs share the machine, one core each; rollouts and steps do not depend on that, seconds do.
"""

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.optimize import isotonic_regression

HERE = Path(__file__).parent
RESULTS = HERE / "sample_efficiency.jsonl"
ARMS = ("cero", "uniform", "dynamic")  # dynamic: uniform with DAPO's dynamic sampling
LEARNING_RATES, ROWS, GROUPS = (2.5e-4, 5e-4, 1e-3), (16, 32), (4, 8)
TUNING_SEEDS, SEEDS, MIX_SEEDS = (100, 101, 102, 103, 104), (0, 1, 2, 3, 4), (0, 1, 2)
MIXES = (0.0, 0.2, 0.4, 0.6)


def command(cell: dict) -> list[str]:
    """The train.py call of one run."""
    allocator = "uniform" if cell["arm"] == "dynamic" else cell["arm"]
    flags = {
        "seed": cell["seed"],
        "allocator.name": allocator,
        "allocator.min-group": cell["group"],  # cero's and cero_dual's groups start here
        "allocator.group-size": cell["group"],  # the others' are of this size
        "allocator.max-group": min(32, cell["rows"]),
        "learner.rows-per-step": cell["rows"],
        "learner.learning-rate": cell["learning_rate"],
        "task.wrong-share": cell["wrong_share"],
        "dynamic-sampling": cell["arm"] == "dynamic",
        "evaluation.every-rollouts": 400,
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
    name = f"{cell['arm']}-{abs(hash(json.dumps(cell)))}"
    done = subprocess.run(
        [*command(cell), f"--work-dir={scratch / name}"],
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command(cell))} failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (scratch / name / "metrics.jsonl").open()]
    timings = [json.loads(line) for line in (scratch / name / "timings.jsonl").open()]
    spent_seconds, curve = 0.0, []
    for row, timing in zip(rows, timings, strict=True):
        if row["kind"] == "step":
            spent_seconds += sum(value for key, value in timing.items() if key.endswith("_seconds"))
        else:
            curve.append([row["spent"], row["optimizer_steps"], round(row["accuracy"], 5), round(spent_seconds, 2)])
    labels = json.loads((scratch / name / "prompts.json").read_text())["labels"]
    steps = [row for row in rows if row["kind"] == "step"]
    wrong = sum(
        n for r in steps for p, n in zip(r["prompt_ids"], r["num_rollouts"], strict=True) if labels[p] == "wrong gold"
    )
    live = sum(row["live_share"] * sum(row["num_rollouts"]) for row in steps)
    total = sum(sum(row["num_rollouts"]) for row in steps)
    return cell | {"curve": curve, "live_share": round(live / total, 4), "wrong_gold_share": round(wrong / total, 4)}


def cell(arm: str, setting: tuple, seed: int, wrong_share: float = 0.4, **flags) -> dict:
    """What identifies a run."""
    learning_rate, rows, group = setting
    return {
        "arm": arm,
        "learning_rate": learning_rate,
        "rows": rows,
        "group": group,
        "seed": seed,
        "wrong_share": wrong_share,
        "flags": flags,
    }


def finished() -> dict[str, dict]:
    """Runs done so far, by their cell."""
    if not RESULTS.exists():
        return {}
    runs = [json.loads(line) for line in RESULTS.open()]
    return {json.dumps({key: r[key] for key in cell("", (0, 0, 0), 0)}): r for r in runs}


def run_all(cells: list[dict]) -> list[dict]:
    """Every cell's result, running those that are not there yet, one a core."""
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    scratch = Path(os.environ.get("SCRATCH", tempfile.gettempdir())) / "sample_efficiency"
    todo = [c for c in cells if json.dumps(c) not in finished()]
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
        print(
            f"{len(finished()):4d} done: {c['arm']} {c['learning_rate']:g} {c['rows']} {c['group']} seed {c['seed']}",
            flush=True,
        )

    with ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(one, first))
        list(pool.map(one, later))
    done = finished()
    return [done[json.dumps(c)] for c in cells]


def accuracy(result: dict) -> np.ndarray:
    """The curve's accuracy, fitted by the closest that never falls."""
    return isotonic_regression([point[2] for point in result["curve"]]).x


def crossing(result: dict, target: float, column: int = 0) -> float:
    """Rollouts (column 0), optimiser steps (1) or seconds (3) until the fitted curve reaches `target`; inf: never."""
    fitted, x = accuracy(result), [point[column] for point in result["curve"]]
    above = np.flatnonzero(fitted >= target)
    if not above.size:
        return np.inf
    i = above[0]
    if i == 0:
        return float(x[0])
    return float(np.interp(target, fitted[i - 1 : i + 1], x[i - 1 : i + 1]))


def savings(uniform: list[dict], other: list[dict]) -> dict:
    """How many times fewer rollouts `other` needs to reach what uniform ends at: geometric mean over seeds, interval.

    The target of a seed is where uniform's fitted curve ends with it. A seed that never gets there is censored: it
    counts as its whole budget, so the saving is an upper bound where `censored` is not 0.
    """
    needs, censored = [], 0
    for u, o in zip(uniform, other, strict=True):
        target = accuracy(u)[-1]
        need = crossing(o, target)
        censored += not np.isfinite(need)
        needs.append((crossing(u, target), min(need, o["curve"][-1][0])))
    ratio = np.log([u / max(o, 1) for u, o in needs])
    # Paired: a seed brings both sides.
    draws = np.random.default_rng(0).choice(ratio, (10_000, len(ratio))).mean(axis=1)
    low, high = np.exp(np.quantile(draws, [0.025, 0.975]))
    return {
        "ratio": float(np.exp(ratio.mean())),
        "low": float(low),
        "high": float(high),
        "ratios": np.exp(ratio).round(2).tolist(),
        "censored": censored,
        "uniform_rollouts": float(np.mean([u for u, _ in needs])),
        "rollouts": float(np.mean([o for _, o in needs])),
    }


def tuned(arm: str) -> tuple:
    """The setting with the highest accuracy, averaged over the run and the tuning seeds.

    Two seeds cut the grid to its best four, which more seeds then decide: a setting that is good on two seeds may fall
    apart on a third, as bold steps do.
    """
    grid = list(itertools.product(LEARNING_RATES, ROWS, GROUPS))
    for seeds in (TUNING_SEEDS[:2], TUNING_SEEDS):
        results = run_all([cell(arm, setting, seed) for setting in grid for seed in seeds])
        score = np.array([np.mean([p[2] for p in r["curve"]]) for r in results]).reshape(len(grid), -1).mean(axis=1)
        order = np.argsort(-score)[:4]
        for i in order:
            rate, rows, group = grid[i]
            print(
                f"  {arm:8s} seeds {seeds[0]} to {seeds[-1]}: rate {rate:g}, {rows} rows a step, groups of {group}: "
                f"mean accuracy {score[i]:.4f}"
            )
        grid = [grid[i] for i in order]
    return grid[0]


def row(name: str, results: list[dict], uniform: list[dict]) -> str:
    """A line of the table."""
    end = np.array([r["curve"][-1][2] for r in results])
    saved = savings(uniform, results)
    steps, seconds = (np.mean([r["curve"][-1][i] for r in results]) for i in (1, 3))
    live, wrong = (np.mean([r[key] for r in results]) for key in ("live_share", "wrong_gold_share"))
    reach = "".join(
        f" {int(np.mean(found)):,} |" if np.isfinite(found).all() else f" {np.isfinite(found).sum()} of {len(found)} |"
        for found in ([crossing(r, level) for r in results] for level in (0.8, 0.9, 0.95))
    )
    censored = f", {saved['censored']} censored" if saved["censored"] else ""
    return (
        f"| {name} |{reach} {end.mean():.3f} ± {end.std(ddof=1) / len(end) ** 0.5:.3f} | {steps:.0f} | {seconds:.0f} | "
        f"{live:.0%} | {wrong:.0%} | {saved['ratio']:.2f} ({saved['low']:.2f} to {saved['high']:.2f}{censored}) |"
    )


HEADER = (
    "| | rollouts to 0.80 | to 0.90 | to 0.95 | accuracy at the end | optimiser steps | seconds | rows with variance | "
    "rollouts on wrong gold | times fewer rollouts to uniform's end (95 %) |\n|---|---|---|---|---|---|---|---|---|---|"
)


def judge(
    best: dict[str, tuple], seeds: tuple[int, ...], wrong_share: float, flags: dict[str, dict] | None = None
) -> dict[str, list[dict]]:
    """Run each arm at its setting and with its own flags, print the table, return the runs."""
    own = flags or {}
    runs = {
        arm: run_all([cell(arm, best[arm], seed, wrong_share, **own.get(arm, {})) for seed in seeds]) for arm in best
    }
    print(f"\n{wrong_share:.0%} wrong gold answers, seeds {seeds[0]} to {seeds[-1]}\n{HEADER}")
    for arm, results in runs.items():
        print(row(arm, results, runs["uniform"]))
        print(f"  {arm} seed by seed: {savings(runs['uniform'], results)['ratios']}")
    return runs


def draw(runs: dict[float, dict[str, list[dict]]], output: Path) -> None:
    """Mean accuracy over seeds with its standard error, against rollouts, optimiser steps and seconds, a row a mix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"cero": "#0072B2", "uniform": "#D55E00", "dynamic": "#009E73"}
    names = {"cero": "CERO", "uniform": "uniform (GRPO)", "dynamic": "uniform, dynamic sampling (DAPO)"}
    axes_names = ((0, "rollouts spent"), (1, "optimiser steps"), (3, "seconds (one core, evaluation left out)"))
    figure, axes = plt.subplots(len(runs), 3, figsize=(15, 4.2 * len(runs)), squeeze=False, sharey=True)
    for line, (mix, arms) in zip(axes, runs.items(), strict=True):
        for axis, (column, label) in zip(line, axes_names, strict=True):
            for arm, results in arms.items():
                limit = min(r["curve"][-1][column] for r in results)
                x = np.linspace(0, limit, 60)
                y = np.array(
                    [np.interp(x, [p[column] for p in r["curve"]], [p[2] for p in r["curve"]]) for r in results]
                )
                error = y.std(axis=0, ddof=1) / len(y) ** 0.5
                axis.plot(x, y.mean(axis=0), color=colours[arm], label=names[arm], lw=2)
                axis.fill_between(
                    x, y.mean(axis=0) - error, y.mean(axis=0) + error, color=colours[arm], alpha=0.2, lw=0
                )
            axis.set(xlabel=label, ylim=(0.3, 1.0))
            axis.grid(alpha=0.3)
        line[0].set_ylabel(f"held-out accuracy\n({mix:.0%} wrong gold answers)")
    axes[0][0].legend(loc="lower right")
    figure.suptitle("The same budget of rollouts, each side at its best setting; 5 seeds, mean and standard error")
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    print(f"\npicture: {output}")


def effects(setting: tuple) -> None:
    """Less noise against more weight: by row, leave-one-out, rows over their prompt's rate keep uniform's objective."""
    plain = {"learner.advantage": "rloo", "learner.aggregation": "sequence"}
    undone = plain | {"learner.undo-visit-rate": True}
    arms = {
        "uniform, rloo by row": ("uniform", plain),
        "cero, rloo by row, visit rates undone (less noise alone)": ("cero", undone),
        "cero, rloo by row (less noise and more weight)": ("cero", plain),
    }
    runs = {name: run_all([cell(arm, setting, seed, **flags) for seed in SEEDS]) for name, (arm, flags) in arms.items()}
    print(f"\nthe two effects of an allocation, all at {setting}, seeds 0 to 4\n{HEADER}")
    for name, results in runs.items():
        print(row(name, results, runs["uniform, rloo by row"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("mixes", "effects", "allocators"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    print("tuning:")
    best = {arm: tuned(arm) for arm in ARMS}
    print(f"best settings (learning rate, rows a step, group): {best}", flush=True)
    if args.mixes:
        for mix in MIXES:
            judge({arm: best[arm] for arm in ("cero", "uniform")}, MIX_SEEDS, mix)
    elif args.effects:
        effects(best["uniform"])
    elif args.allocators:
        names = ("cero", "uniform", "cero_dual", "variance", "knapsack")
        settings = {name: best["cero" if name in ("cero", "cero_dual") else "uniform"] for name in names}
        # an average group twice the smallest: at the smallest these two could only do as uniform does
        room = {name: {"allocator.group-size": 2 * best["uniform"][2]} for name in ("variance", "knapsack")}
        judge(settings, MIX_SEEDS, 0.4, room)
    else:
        draw({mix: judge(best, SEEDS, mix) for mix in (0.4, 0.6)}, HERE / "sample_efficiency.png")


if __name__ == "__main__":
    main()
