"""TRL's GRPOTrainer with CERO and without, on a toy of which some prompts are hopeless and some always solved.

    make test-integrations                                                # makes the environment
    .venv-trl/bin/python benchmarks/integrations.py --seeds 0 1 2 --out benchmarks/integrations.jsonl
    .venv-trl/bin/python benchmarks/integrations.py --table benchmarks/integrations.jsonl

60 prompts: 24 whose answer cannot be said, 12 for which anything is right, 24 sums of two digits to be learned by heart
by a random Qwen2 of a few thousand parameters. 150 steps of 8 groups of 4: 4,800 rollouts, 80 a prompt.
"""

# pyright: reportMissingImports=false
# The environment of the checks has no torch.

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/integrations")]

KINDS = np.array(["hopeless"] * 24 + ["solved"] * 12 + ["learnable"] * 24)
ARMS = {"TRL": None, "CERO": "group", "CERO, by the posterior": "posterior"}
STEPS, SAMPLES = 150, 32


def rows():
    """Prompts of two digits, in an order that does not tell the kinds apart."""
    place = np.random.default_rng(0).permutation(len(KINDS))
    prompts = [f"{i % 10}+{i // 10}=" for i in range(len(KINDS))]
    answers = {"hopeless": lambda i: "x", "solved": lambda i: "", "learnable": lambda i: str((i % 10 + i // 10) % 10)}
    kinds = KINDS[place]
    return [
        {"prompt": p, "answer": answers[kind](i)} for i, (p, kind) in enumerate(zip(prompts, kinds, strict=True))
    ], kinds


def accuracy(model, tokenizer, learnable) -> float:
    """Of SAMPLES completions for each learnable prompt, at temperature 1."""
    import torch

    prompts = tokenizer([row["prompt"] for row in learnable], return_tensors="pt")
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = model.eval().generate(
            input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], do_sample=True, top_k=0,
            max_new_tokens=3, num_return_sequences=SAMPLES,
        )  # fmt: skip
    completions = tokenizer.batch_decode(drawn[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return float(np.mean([learnable[i // SAMPLES]["answer"] in text for i, text in enumerate(completions)]))


def run(arm: str, seed: int, learning_rate: float) -> dict:
    """One run: its accuracy at the end, where its rollouts went, and how many groups had two different rewards."""
    import trl_toy
    from datasets import Dataset
    from trl import GRPOTrainer

    from cero_jax.integrations.trl import CeroGRPOTrainer

    data, kinds = rows()
    place = {row["prompt"]: kind for row, kind in zip(data, kinds, strict=True)}
    drawn = dict.fromkeys(("hopeless", "solved", "learnable"), 0)

    def correct(prompts, completions, answer, **_):
        for prompt in prompts:
            drawn[place[prompt]] += 1
        return [float(a in c) for a, c in zip(answer, completions, strict=True)]

    advantage = ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_toy.build(
            folder, trainer=CeroGRPOTrainer if advantage else GRPOTrainer, seed=seed, reward_funcs=correct,
            train_dataset=Dataset.from_list(data), config={"max_steps": STEPS, "learning_rate": learning_rate},
            **({"advantage": advantage} if advantage else {}),
        )  # fmt: skip
        trainer.train()
    live = [1 - row["frac_reward_zero_std"] for row in trainer.state.log_history if "frac_reward_zero_std" in row]
    learnable = [row for row, kind in zip(data, kinds, strict=True) if kind == "learnable"]
    return {
        "arm": arm,
        "seed": seed,
        "learning_rate": learning_rate,
        "accuracy": accuracy(trainer.model, trainer.processing_class, learnable),
        "effective": float(np.mean(live)),
        **{f"share_{kind}": count / sum(drawn.values()) for kind, count in drawn.items()},
        "rollouts": sum(drawn.values()),
        "steps": trainer.state.global_step,
    }


def table(path: Path) -> str:
    """A row an arm: means over the seeds, and the least accuracy."""
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| | seeds | groups with two rewards | hopeless | solved | learnable | accuracy, worst seed |",
        "|---" * 7 + "|",
    ]
    for arm in ARMS:
        of = [each for each in runs if each["arm"] == arm]
        if not of:
            continue
        shares = [f"{100 * np.mean([each[key] for each in of]):.0f} %" for key in
                  ("effective", "share_hopeless", "share_solved", "share_learnable")]  # fmt: skip
        ends = [each["accuracy"] for each in of]
        lines.append(f"| {arm} | {len(of)} | {' | '.join(shares)} | {np.mean(ends):.3f}, {min(ends):.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path("integrations.jsonl"))
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    else:
        for seed in args.seeds:
            for arm in args.arms:
                row = run(arm, seed, args.learning_rate)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row)
