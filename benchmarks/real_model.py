"""Does it pay on a real model? Allocations and advantages on graded equations, each arm at its best rate.

    python benchmarks/real_model.py headroom models/smollm2-135m-instruct   # is there anything to allocate?
    python benchmarks/real_model.py train models/smollm2-135m-instruct      # tune every arm, judge it on other seeds

benchmarks/model_folder.py makes the folder; configs/equations.py is the task: 288 equations of twelve kinds, of which
the model as it comes gets some nearly always right, most sometimes and some never. An arm's rate climbs one grid from
one place on seeds that are not judged, until no neighbour is better. Then `uniform` with GRPO spends the whole budget,
and each other arm spends the whole and two thirds of it: one that ends as high with two thirds saves 1.5 times.

Accuracy is over 192 held-out equations, two samples each, at temperature 1. Each finished run is a line of
real_model.jsonl and is not run again; a stopped benchmark goes on. One run at a time, on the cores that the benchmark
is given. Intervals are over seeds.

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
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "real_model.jsonl"
CONFIG = HERE.parent / "configs/equations.py"
WHOLE, LESS = 1_536, 1_024  # rollouts
RATES = (1.25e-6, 2.5e-6, 5e-6, 1e-5, 2e-5, 4e-5, 8e-5)
START = 1e-5
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
CONTEXT = ("3 + 4 = 7", "9 + 8 = 17", "23 + 14 = 37")  # before what `reference` and `compare` are asked


class Arm(NamedTuple):
    """A method: flags of train.py."""

    allocator: str
    advantage: str
    group: int  # rollouts of the smallest, and of all under `uniform`


ARMS = {
    "uniform": Arm("uniform", "grpo", 4),
    "cero": Arm("cero", "grpo", 4),
    "uniform + reward": Arm("uniform", "reward", 1),
    "cero + reward": Arm("cero", "reward", 1),
    "cero + posterior": Arm("cero", "posterior", 1),
    "cero_dual": Arm("cero_dual", "grpo", 4),
}


def cell(folder: Path, arm: str, learning_rate: float, seed: int, budget: int) -> dict:
    """What identifies a run."""
    of_arm = ARMS[arm]._asdict()
    return {"model": folder.name, **of_arm, "learning_rate": learning_rate, "seed": seed, "budget": budget}


def command(folder: Path, cell: dict) -> list[str]:
    """The train.py call of one run."""
    flags = {
        "model-folder": folder.absolute(),
        "seed": cell["seed"],
        "allocator.name": cell["allocator"],
        "allocator.total-budget": cell["budget"],
        "allocator.min-group": cell["group"],
        "allocator.group-size": cell["group"],
        "learner.advantage": cell["advantage"],
        "learner.learning-rate": cell["learning_rate"],
        "evaluation.every-rollouts": cell["budget"],
    }
    return [sys.executable, str(HERE.parent / "train.py"), str(CONFIG), *(f"--{k}={v}" for k, v in flags.items())]


def run(folder: Path, cell: dict) -> dict:
    """Train once; the cell, its curve, what was right of each kind, and which kinds got the rollouts."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch:
        directory = Path(scratch) / "run"
        done = subprocess.run([*command(folder, cell), f"--work-dir={directory}"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command(folder, cell))} failed:\n{done.stderr[-3000:]}")
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
        "seconds": round(sum(value for row in timings for key, value in row.items() if key.endswith("_seconds"))),
    }


def finished() -> dict[str, dict]:
    """Runs done so far, by their cell."""
    if not RESULTS.exists():
        return {}
    keys = cell(Path("any"), "uniform", START, 0, WHOLE)
    return {json.dumps({key: line[key] for key in keys}): line for line in map(json.loads, RESULTS.open())}


def run_all(folder: Path, cells: list[dict]) -> list[dict]:
    """Every cell's result, running those that are not there yet."""
    for each in cells:
        if json.dumps(each) not in finished():
            line = json.dumps(run(folder, each))
            with RESULTS.open("a") as file:
                file.write(line + "\n")
            print("  " + " ".join(str(value) for value in each.values()), json.loads(line)["curve"], flush=True)
    there = finished()
    return [there[json.dumps(each)] for each in cells]


def end(result: dict) -> float:
    """Held-out accuracy when the budget is spent."""
    return result["curve"][-1][2]


def tuned(folder: Path, arm: str) -> float:
    """The rate where a climb from START ends, by the mean accuracy with the whole budget on the tuning seeds.

    Raises ValueError at an end of RATES.
    """
    scores: dict[float, float] = {}

    def score(rate: float) -> None:
        if rate not in scores:
            results = run_all(folder, [cell(folder, arm, rate, seed, WHOLE) for seed in TUNING_SEEDS])
            scores[rate] = float(np.mean([end(r) for r in results]))

    score(START)
    while True:
        best = max(scores, key=lambda rate: scores[rate])
        place = RATES.index(best)
        if place in (0, len(RATES) - 1):
            raise ValueError(f"{arm}: the best rate {best:g} is at the end of RATES: widen it")
        around = (RATES[place - 1], RATES[place + 1])
        if all(rate in scores for rate in around):
            print(f"{arm}: " + ", ".join(f"{rate:g} {scores[rate]:.3f}" for rate in sorted(scores)), flush=True)
            return best
        for rate in around:
            score(rate)


def interval(values: np.ndarray) -> str:
    """A mean in points with its 95 % bootstrap interval over seeds."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{100 * values.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def judge(folder: Path, best: dict[str, float]) -> None:
    """Run each arm on the judged seeds and print the tables."""
    results = {
        (arm, budget): run_all(folder, [cell(folder, arm, best[arm], seed, budget) for seed in SEEDS])
        for arm in best
        for budget in ((WHOLE,) if arm == "uniform" else (WHOLE, LESS))
    }
    uniform = np.array([end(r) for r in results["uniform", WHOLE]])
    print(f"\n{folder.name}, seeds {SEEDS[0]} to {SEEDS[-1]}; before {results['uniform', WHOLE][0]['curve'][0][2]:.3f}")
    print(
        f"| arm | rate | rollouts | accuracy at the end | worst | over uniform's {WHOLE:,}, points (95 %) | steps "
        "| rows with variance | seconds |\n|---|---|---|---|---|---|---|---|---|"
    )
    for (arm, budget), some in results.items():
        ends = np.array([end(r) for r in some])
        means = [np.mean([r[key] for r in some]) for key in ("live_share", "seconds")]
        steps = np.mean([r["curve"][-1][1] for r in some])
        print(
            f"| {arm} | {best[arm]:g} | {budget:,} | {ends.mean():.3f} | {ends.min():.3f} | {interval(ends - uniform)} "
            f"| {steps:.0f} | {means[0]:.0%} | {means[1]:.0f} |"
        )
    whole = {arm: some for (arm, budget), some in results.items() if budget == WHOLE}
    print("\n| digits | before | " + " | ".join(f"{arm}, rollouts" for arm in whole) + " |\n|---" + "|---" * 7 + "|")
    for kind in whole["uniform"][0]["after"]:
        cells = [
            f"{np.mean([r['after'][kind] for r in some]):.0%}, {np.mean([r['rollouts'][kind] for r in some]):.0f}"
            for some in whole.values()
        ]
        before = np.mean([r["before"][kind] for r in whole["uniform"]])
        print(f"| `{kind}` | {before:.0%} | {' | '.join(cells)} |")


def show_headroom(folder: Path, samples: int) -> None:
    """Draw every training prompt `samples` times from the model as it comes, and print the pool's headroom."""
    from cero_jax import sharding
    from cero_jax.config import from_command_line
    from cero_jax.evaluation import EvaluationConfig, evaluate
    from cero_jax.headroom import explain, headroom
    from cero_jax.huggingface import weights
    from cero_jax.run import build_task, sampler_of

    config, task = build_task(from_command_line([str(CONFIG), f"--model-folder={folder}", "--seed=100"]))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    shape, params = weights.load(folder, mesh)
    sample = sampler_of(dataclasses.replace(config, model=shape), task._replace(heldout=task.train), mesh)
    pool = task._replace(heldout=task.train)
    drawn = evaluate(sample, params, pool, EvaluationConfig(samples=samples, rows=config.evaluation.rows), 100).samples
    right = np.zeros(len(task.train.answers), int)
    for each in drawn:
        right[each["prompt_id"]] += each["reward"] == 1
    share = right / samples
    print(f"{len(right)} prompts x {samples}: {share.mean():.3f} right; never {np.mean(right == 0):.0%}")
    print(f"groups of 4 with variance: {np.mean(1 - share**4 - (1 - share) ** 4):.0%}, as the shares have it")
    print(explain(headroom(right[:, None], np.full((len(right), 1), samples))))


def main(folder: Path, arms: list[str]) -> None:
    """Tune and judge."""
    best = {arm: tuned(folder, arm) for arm in arms}
    judge(folder, best)


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
    commands.choices["train"].add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    for name in ("reference", "compare"):
        commands.choices[name].add_argument("npz")
    args = parser.parse_args()
    match args.command:
        case "headroom":
            show_headroom(args.folder, args.samples)
        case "train":
            main(args.folder, args.arms)
        case "reference":
            reference(args.folder, args.npz)
        case "compare":
            compare(args.folder, args.npz)
