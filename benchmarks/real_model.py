r"""Does it pay on a real model? Allocations and advantages on graded equations, each arm at its best setting.

    python benchmarks/real_model.py headroom models/smollm2-135m-instruct   # is there anything to allocate? or left, of
                                                                            # a folder that a run has exported?
    python benchmarks/real_model.py train models/smollm2-135m-instruct      # tune every arm, judge it on other seeds

benchmarks/model_folder.py makes the folder; configs/equations.py is the task: 288 equations of twelve kinds, of which
the model as it comes gets some nearly always right, most sometimes and some never. Every arm climbs one grid of
learning rate and rows a step from one place, on seeds that are not judged, until no neighbour is better. `uniform` with
GRPO is then judged with the whole budget, each other arm with several: where does it reach what `uniform` ends at?

Accuracy is over 192 held-out equations, four samples each, at temperature 1. Each finished run is a line of
real_model.jsonl and is not run again; a stopped benchmark goes on. `--workers` runs go at once, which share the device;
rollouts and accuracy do not depend on that, seconds do. On a GPU set JAX_COMPILATION_CACHE_DIR and
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0, and let one worker run each arm once before there are more: twelve that
try out the same kernels on one H100 at once took over six minutes each, those after them half a minute. Intervals are
over seeds.

Two arms begin with pass rates, of the policy as it comes or of another model, written beforehand for each seed:

    for seed in 100 101 0 1 2 3 4; do
        python benchmarks/real_model.py headroom models/smollm2-135m-instruct --samples 16 --seed $seed \
            --out benchmarks/pass_rates/smollm2-135m-instruct-$seed.json
    done

The model that a run exports can be read back by transformers; the difference of its logits:

    reference/bin/python benchmarks/real_model.py reference FOLDER reference.npz
    python benchmarks/real_model.py compare FOLDER reference.npz
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sample_efficiency import in_words, mean_and_error, savings

HERE = Path(__file__).parent
RESULTS = HERE / "real_model.jsonl"
RATES_FOLDER = HERE / "pass_rates"  # what models got right of the training prompts, by seed
CONFIG = HERE.parent / "configs/equations.py"
WHOLE = 1_536  # rollouts
RATES = (1.25e-6, 2.5e-6, 5e-6, 1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4)
ROWS = (2, 4, 8, 16, 32, 64)  # of an optimiser step
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
CONTEXT = ("3 + 4 = 7", "9 + 8 = 17", "23 + 14 = 37")  # before what `reference` and `compare` are asked


class Arm(NamedTuple):
    """A method: flags of train.py, the budget with which it is tuned, and those with which it is judged."""

    allocator: str
    advantage: str
    group: int  # rollouts of the smallest, and of all under `uniform`
    budget: int
    judged: tuple[int, ...]
    matched: bool = False  # the counts of such a run, each prompt's given to another prompt
    rates: str | None = None  # the model whose pass rates are known at the start, and what one is worth in rollouts
    rate_rollouts: float = 0.0


HALF, TWO_THIRDS = WHOLE // 2, 2 * WHOLE // 3
LATE, EARLY = (HALF, TWO_THIRDS, WHOLE), (WHOLE // 4, HALF, WHOLE)
BUDGETS = sorted({*LATE, *EARLY})
OWN = "smollm2-135m-instruct"
ARMS = {
    "uniform": Arm("uniform", "grpo", 4, WHOLE, (WHOLE,)),
    "cero": Arm("cero", "grpo", 4, WHOLE, LATE),
    "uniform + reward": Arm("uniform", "reward", 1, HALF, (HALF, TWO_THIRDS)),
    "cero + reward": Arm("cero", "reward", 1, HALF, EARLY),
    "cero + reward + pass rates": Arm("cero", "reward", 1, HALF, EARLY, rates=OWN, rate_rollouts=8.0),
    "cero + reward + pass rates, Gemma's": Arm(
        "cero", "reward", 1, HALF, EARLY, rates="gemma-3-270m", rate_rollouts=2.0
    ),
    "cero + posterior + pass rates": Arm("cero", "posterior", 1, HALF, EARLY, rates=OWN, rate_rollouts=8.0),
    "cero + posterior": Arm("cero", "posterior", 1, WHOLE, LATE),
    "cero + reward, prompts permuted": Arm("cero", "reward", 1, HALF, EARLY, matched=True),
    "cero_dual": Arm("cero_dual", "grpo", 4, WHOLE, LATE),
}


class Setting(NamedTuple):
    """What is tuned."""

    learning_rate: float
    rows: int


START = Setting(2e-5, 8)


def cell(folder: Path, arm: str, setting: Setting, seed: int, budget: int) -> dict:
    """What identifies a run."""
    of_arm = {key: value for key, value in ARMS[arm]._asdict().items() if key not in ("budget", "judged")}
    return {"model": folder.name, **of_arm, **setting._asdict(), "seed": seed, "budget": budget}


def command(folder: Path, cell: dict) -> list[str]:
    """The arguments of train.py for one run."""
    flags = {
        "model-folder": folder.absolute(),
        "seed": cell["seed"],
        "allocator.name": cell["allocator"],
        "allocator.total-budget": cell["budget"],
        "allocator.min-group": cell["group"],
        "allocator.group-size": cell["group"],
        "allocator.max-group": max(cell["group"], min(16, cell["rows"])),
        "learner.advantage": cell["advantage"],
        "learner.learning-rate": cell["learning_rate"],
        "learner.rows-per-step": cell["rows"],
        "learner.rows-per-microbatch": min(16, cell["rows"]),
        "evaluation.every-rollouts": cell["budget"],
    }
    if cell["rates"] is None:
        return [str(CONFIG), *(f"--{k}={v}" for k, v in flags.items())]
    flags |= {
        "task.right": right_of(cell["rates"], cell["seed"]),
        "allocator.pass-rate-rollouts": cell["rate_rollouts"],
    }
    return [str(HERE / "equations_known.py"), *(f"--{k}={v}" for k, v in flags.items())]


def right_of(model: str, seed: int) -> Path:
    """What `headroom --out` wrote of a model for a seed. Raises FileNotFoundError where it did not."""
    path = RATES_FOLDER / f"{model}-{seed}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: `headroom --out` writes it, see the top of real_model.py")
    return path


def run(folder: Path, cell: dict) -> dict:
    """Train once; the cell, its curve, what was right of each kind, and which kinds got the rollouts."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch:
        directory, python, flags = Path(scratch) / "run", sys.executable, command(folder, cell)
        calls = [[python, str(HERE.parent / "train.py"), *flags, f"--work-dir={directory}"]]
        if cell["matched"]:
            source, directory = directory, Path(scratch) / "matched"
            calls += [[python, str(HERE / "matched.py"), str(source), *flags, f"--work-dir={directory}"]]
        for call in calls:
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(call)} failed:\n{done.stderr[-3000:]}")
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
        timings = [json.loads(line) for line in (directory / "timings.jsonl").open()]
        labels = json.loads((directory / "prompts.json").read_text())["labels"]
    steps, evals = ([row for row in rows if row["kind"] == kind] for kind in ("step", "eval"))
    rollouts = dict.fromkeys(sorted(set(labels)), 0)
    for row in steps:
        for prompt, number in zip(row["prompt_ids"], row["num_rollouts"], strict=True):
            rollouts[labels[prompt]] += number
    drawn = [sum(row["num_rollouts"]) for row in steps]
    return cell | {
        "curve": [[row["spent"], row["optimizer_steps"], round(row["accuracy"], 5)] for row in evals],
        "before": evals[0]["accuracy_by_label"],
        "after": evals[-1]["accuracy_by_label"],
        "rollouts": rollouts,
        "live_share": round(float(np.average([row["live_share"] for row in steps], weights=drawn)), 4),
        "seconds": round(
            sum(row.get(f"{part}_seconds", 0) for row in timings for part in ("sample", "learn", "eval")), 1
        ),
    }


def finished() -> dict[str, dict]:
    """Runs done so far, by their cell."""
    if not RESULTS.exists():
        return {}
    keys = cell(Path("any"), "uniform", START, 0, WHOLE)
    return {json.dumps({key: line[key] for key in keys}): line for line in map(json.loads, RESULTS.open())}


def run_all(folder: Path, cells: list[dict], workers: Executor) -> list[dict]:
    """Every cell's result, running those that are not there yet."""

    def one(each: dict) -> None:
        line = json.dumps(run(folder, each))
        with RESULTS.open("a") as file:
            file.write(line + "\n")
        print("  " + " ".join(str(value) for value in each.values()), json.loads(line)["curve"], flush=True)

    there = finished()
    list(workers.map(one, [each for each in cells if json.dumps(each) not in there]))
    there = finished()
    return [there[json.dumps(each)] for each in cells]


def end(result: dict) -> float:
    """Held-out accuracy when the budget is spent."""
    return result["curve"][-1][2]


def neighbours(setting: Setting) -> list[Setting]:
    """The settings one step away along each axis. Raises ValueError at an edge of the grid that could be moved."""
    rate, rows = RATES.index(setting.learning_rate), ROWS.index(setting.rows)
    if rate in (0, len(RATES) - 1) or rows == len(ROWS) - 1:
        raise ValueError(f"{setting} lies at an edge of the grid: widen it")
    places = [(rate - 1, rows), (rate + 1, rows), (rate, rows + 1)] + [(rate, rows - 1)] * (rows > 0)
    return [Setting(RATES[i], ROWS[j]) for i, j in places]


def tuned(folder: Path, arm: str, workers: Executor) -> Setting:
    """Where a climb from START ends, by the mean accuracy at the end of the arm's budget on the tuning seeds."""
    scores: dict[Setting, float] = {}

    def score(settings: list[Setting]) -> None:
        new = [s for s in settings if s not in scores and s.rows >= ARMS[arm].group]
        cells = [cell(folder, arm, s, seed, ARMS[arm].budget) for s in new for seed in TUNING_SEEDS]
        ends = np.array([end(r) for r in run_all(folder, cells, workers)]).reshape(len(new), len(TUNING_SEEDS))
        scores.update(zip(new, ends.mean(axis=1).tolist(), strict=True))

    score([START, *neighbours(START)])
    while True:
        best, seen = max(scores, key=lambda s: scores[s]), len(scores)
        score(neighbours(best))
        if len(scores) == seen:
            print(f"{arm}: " + ", ".join(f"{s.learning_rate:g} x {s.rows} {scores[s]:.3f}" for s in sorted(scores)))
            return best


def interval(values: np.ndarray) -> str:
    """A mean in points with its 95 % bootstrap interval over seeds."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{100 * values.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def judge(folder: Path, best: dict[str, Setting], results: dict[str, list[list[dict]]]) -> None:
    """Print the tables. results: of each arm, for each seed, one for each budget that it is judged with."""
    ends = {arm: np.array([[end(r) for r in of_seed] for of_seed in some]) for arm, some in results.items()}
    uniform = ends["uniform"][:, -1]
    before = np.mean([of_seed[0]["curve"][0][2] for of_seed in results["uniform"]])
    print(f"\n{folder.name}, seeds {SEEDS[0]} to {SEEDS[-1]}; before {before:.3f}")
    print(
        "| arm | rate, rows a step | accuracy at the end of "
        + " | ".join(f"{budget:,}" for budget in BUDGETS)
        + " | worst | over uniform's end, points (95 %) | steps | rows with variance | times fewer rollouts to "
        "uniform's end (95 %) |\n" + "|---" * (len(BUDGETS) + 7) + "|"
    )
    for arm, some in results.items():
        column = dict(zip(ARMS[arm].judged, map(mean_and_error, ends[arm].T), strict=True))
        saved = savings(uniform, WHOLE, ends[arm], ARMS[arm].judged)
        whole = [of_seed[-1] for of_seed in some]
        cells = [f"{best[arm].learning_rate:g}, {best[arm].rows}", *(column.get(budget, "") for budget in BUDGETS)]
        cells += [f"{ends[arm][:, -1].min():.3f}", interval(ends[arm][:, -1] - uniform)]
        cells += [f"{np.mean([r['curve'][-1][1] for r in whole]):.0f}"]
        cells += [f"{np.mean([r['live_share'] for r in whole]):.0%}", in_words(saved)]
        print(f"| {arm} | {' | '.join(cells)} |\n  seed by seed: {saved['ratios']}", flush=True)
    print("\n| kind | before | " + " | ".join(f"{arm}, rollouts" for arm in results) + " |")
    print("|---" * (len(results) + 2) + "|")
    for kind in results["uniform"][0][0]["after"]:
        whole = [[of_seed[-1] for of_seed in some] for some in results.values()]
        cells = [
            f"{np.mean([r['after'][kind] for r in some]):.0%}, {np.mean([r['rollouts'][kind] for r in some]):.0f}"
            for some in whole
        ]
        start = np.mean([r[0]["before"][kind] for r in results["uniform"]])
        print(f"| `{kind}` | {start:.0%} | {' | '.join(cells)} |")


def show_headroom(folder: Path, samples: int, seed: int, out: Path | None) -> None:
    """Draw every training prompt of a seed `samples` times from a model; print the headroom, write who was right.

    What is written is read by benchmarks/equations_known.py.
    """
    from cero_jax import sharding
    from cero_jax.command_line import from_command_line
    from cero_jax.evaluation import EvaluationConfig, evaluate
    from cero_jax.headroom import explain, headroom
    from cero_jax.huggingface import weights
    from cero_jax.pieces import build_task, sampler_of

    config, task = build_task(from_command_line([str(CONFIG), f"--model-folder={folder}", f"--seed={seed}"]))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    shape, params = weights.load(folder, mesh)
    sample = sampler_of(dataclasses.replace(config, model=shape), task._replace(heldout=task.train), mesh)
    pool = task._replace(heldout=task.train)
    drawn = evaluate(sample, params, pool, EvaluationConfig(samples=samples, rows=config.evaluation.rows), seed).samples
    right = np.zeros(len(task.train.answers), int)
    for each in drawn:
        right[each["prompt_id"]] += each["reward"] == 1
    share = right / samples
    print(f"{len(right)} prompts x {samples}: {share.mean():.3f} right; never {np.mean(right == 0):.0%}")
    print(f"groups of 4 with variance: {np.mean(1 - share**4 - (1 - share) ** 4):.0%}, as the shares have it")
    print(explain(headroom(right[:, None], np.full((len(right), 1), samples))))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"labels": task.train.labels, "right": right.tolist(), "samples": samples}))


def main(folder: Path, arms: list[str], workers: int) -> None:
    """Tune and judge: arms side by side, each judged as soon as it is tuned."""
    of = {arm: arm.partition(",")[0] for arm in arms}  # a control stands at the setting of its arm
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(2 * len(arms)) as side_by_side:
        climbs = {arm: side_by_side.submit(tuned, folder, arm, pool) for arm in dict.fromkeys(of.values())}

        def judged(arm: str) -> list[list[dict]]:
            setting, budgets = climbs[of[arm]].result(), ARMS[arm].judged
            cells = [cell(folder, arm, setting, seed, budget) for seed in SEEDS for budget in budgets]
            runs = run_all(folder, cells, pool)
            return [runs[i : i + len(budgets)] for i in range(0, len(runs), len(budgets))]

        results = dict(zip(arms, side_by_side.map(judged, arms), strict=True))
        best = {arm: climbs[of[arm]].result() for arm in arms}
    judge(folder, best, results)


def reference(folder: Path, out: str) -> None:
    """Logits of a few held-out prompts by transformers; run in the environment that has torch."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    questions = [f"{7 + i} + {3 * i + 1} =" for i in range(4)]
    ids = [tokenizer("\n".join((*CONTEXT, question))).input_ids for question in questions]
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0].numpy() for row in ids]
    np.savez(out, *ids, **{f"logits_{i}": each for i, each in enumerate(logits)})


def compare(folder: Path, reference: str) -> None:
    """Print the largest difference from transformers' logits."""
    import jax
    import jax.numpy as jnp

    from cero_jax import model, sharding
    from cero_jax.attention import Causal
    from cero_jax.huggingface import weights

    config, params = weights.load(folder, sharding.make_mesh(sharding.MeshConfig()))
    want, worst, same = np.load(reference), 0.0, 0
    rows = sum(name.startswith("logits") for name in want.files)
    forward = jax.jit(lambda p, t, at, sees: model.logits(p, config, model.forward(p, config, t, at, sees)[0]))
    for i in range(rows):
        tokens = jnp.asarray(want[f"arr_{i}"], jnp.int32)[None]
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        got = np.asarray(forward(params, tokens, positions, Causal(jnp.full(1, tokens.shape[1], jnp.int32)))[0])
        worst = max(worst, float(np.abs(got - want[f"logits_{i}"]).max()))
        same += (got.argmax(-1) == want[f"logits_{i}"].argmax(-1)).all()
    print(f"{rows} prompts: largest difference of a logit {worst:.1e}; the likeliest tokens are the same in {same}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("headroom", "train", "reference", "compare"):
        commands.add_parser(name).add_argument("folder", type=Path)
    commands.choices["headroom"].add_argument("--samples", type=int, default=8)
    commands.choices["headroom"].add_argument("--seed", type=int, default=100)
    commands.choices["headroom"].add_argument("--out", type=Path)
    commands.choices["train"].add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    commands.choices["train"].add_argument("--workers", type=int, default=1)
    for name in ("reference", "compare"):
        commands.choices[name].add_argument("npz")
    args = parser.parse_args()
    match args.command:
        case "headroom":
            show_headroom(args.folder, args.samples, args.seed, args.out)
        case "train":
            main(args.folder, args.arms, args.workers)
        case "reference":
            reference(args.folder, args.npz)
        case "compare":
            compare(args.folder, args.npz)
