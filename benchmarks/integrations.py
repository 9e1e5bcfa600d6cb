"""TRL's and Tunix's trainers with CERO and without, on a toy of which some prompts are hopeless and some always solved.

    make test-integrations                                                # makes the environments
    .venv-trl/bin/python benchmarks/integrations.py --arms TRL CERO --out benchmarks/integrations.jsonl
    .venv-tunix/bin/python benchmarks/integrations.py --arms Tunix "CERO in Tunix" --out benchmarks/integrations.jsonl
    .venv-trl/bin/python benchmarks/integrations.py --table benchmarks/integrations.jsonl

60 prompts: 24 whose answer cannot be said, 12 for which anything is right, 24 sums of two digits to be learned by heart
by a random Qwen2 of a few thousand parameters. 150 steps of 8 groups of 4: 4,800 rollouts, 80 a prompt.

Tunix draws every step with the same noise, and so learns little of the sums: here each call has a seed of its own.
"""

# pyright: reportMissingImports=false
# The environment of the checks has neither torch nor tunix.

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/integrations")]

KINDS = np.array(["hopeless"] * 24 + ["solved"] * 12 + ["learnable"] * 24)
TRL = {"TRL": None, "CERO": "group", "CERO, by the posterior": "posterior"}
TUNIX = {"Tunix": False, "CERO in Tunix": True}
ARMS = [*TRL, *TUNIX]
STEPS, SAMPLES, BATCH, GROUP = 150, 32, 8, 4


def rows():
    """Prompts of two digits, in an order that does not tell the kinds apart."""
    place = np.random.default_rng(0).permutation(len(KINDS))
    prompts = [f"{i % 10}+{i // 10}=" for i in range(len(KINDS))]
    answers = {"hopeless": lambda i: "x", "solved": lambda i: "", "learnable": lambda i: str((i % 10 + i // 10) % 10)}
    kinds = KINDS[place]
    return [
        {"prompt": p, "answer": answers[kind](i)} for i, (p, kind) in enumerate(zip(prompts, kinds, strict=True))
    ], kinds


class Judge:
    """The reward function, which counts where the rollouts go and which groups have two different rewards."""

    __name__ = "correct"

    def __init__(self, data, kinds):
        self.place = {row["prompt"]: kind for row, kind in zip(data, kinds, strict=True)}
        self.drawn = dict.fromkeys(("hopeless", "solved", "learnable"), 0)
        self.live: list[bool] = []

    def __call__(self, prompts, completions, answer, **_):
        rewards = [float(a in c) for a, c in zip(answer, completions, strict=True)]
        for prompt in prompts:
            self.drawn[self.place[prompt]] += 1
        self.live += (np.ptp(np.reshape(rewards, (-1, GROUP)), axis=1) > 0).tolist()
        return rewards

    def figures(self) -> dict:
        total = sum(self.drawn.values())
        shares = {f"share_{kind}": count / total for kind, count in self.drawn.items()}
        return {"effective": float(np.mean(self.live)), **shares, "rollouts": total}


def right(learnable, texts) -> float:
    """Of SAMPLES completions of each learnable prompt, behind each other."""
    return float(np.mean([learnable[i // SAMPLES]["answer"] in text for i, text in enumerate(texts)]))


def in_trl(advantage: str | None, seed: int, learning_rate: float, data, learnable, judge) -> tuple[float, int]:
    """Train; returns the accuracy at the end at temperature 1, and the steps."""
    import torch
    import trl_toy
    from datasets import Dataset
    from trl import GRPOTrainer

    from cero_jax.integrations.trl import CeroGRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_toy.build(
            folder, trainer=CeroGRPOTrainer if advantage else GRPOTrainer, seed=seed, reward_funcs=judge,
            train_dataset=Dataset.from_list(data), config={"max_steps": STEPS, "learning_rate": learning_rate},
            **({"advantage": advantage} if advantage else {}),
        )  # fmt: skip
        trainer.train()
    prompts = trainer.processing_class([row["prompt"] for row in learnable], return_tensors="pt")
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = trainer.model.eval().generate(
            input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], do_sample=True, top_k=0,
            max_new_tokens=3, num_return_sequences=SAMPLES,
        )  # fmt: skip
    behind = drawn[:, prompts["input_ids"].shape[1] :]
    return right(learnable, trainer.processing_class.batch_decode(behind, skip_special_tokens=True)), (
        trainer.state.global_step
    )


def in_tunix(with_cero: bool, seed: int, learning_rate: float, data, learnable, judge) -> tuple[float, int]:
    """The same."""
    import tunix_toy

    from cero_jax.integrations.tunix import CeroDataset

    rows = [{"prompts": row["prompt"], "answer": row["answer"]} for row in data]
    cero = CeroDataset(rows, batch_size=BATCH, num_generations=GROUP, total_budget=STEPS * BATCH * GROUP, seed=seed)
    settings = {"max_steps": STEPS, "seed": seed, "learning_rate": learning_rate}
    learner = tunix_toy.learner(cero, None, cero.watch(judge) if with_cero else judge, **settings)
    rollout, seeds = learner.rl_cluster.rollout, itertools.count(10_000 * seed)
    generate = rollout.generate
    rollout.generate = lambda prompts, config, **kw: generate(
        prompts, dataclasses.replace(config, seed=next(seeds)), **kw
    )
    if with_cero:
        cero.train(learner)
    else:
        rng = np.random.default_rng(seed)
        passes = -(-STEPS * BATCH // len(rows))
        order = np.concatenate([rng.permutation(len(rows)) for _ in range(passes)])[: STEPS * BATCH]
        learner.train([{name: np.array([rows[i][name] for i in ids]) for name in rows[0]}
                       for ids in order.reshape(STEPS, BATCH)])  # fmt: skip
    asked = [row["prompt"] for row in learnable for _ in range(SAMPLES)]
    return right(learnable, learner.rl_cluster.generate(asked).text), learner.rl_cluster.actor_trainer.train_steps


def run(arm: str, seed: int, learning_rate: float) -> dict:
    """One run: its accuracy at the end, where its rollouts went, and how many groups had two different rewards."""
    data, kinds = rows()
    judge = Judge(data, kinds)
    learnable = [row for row, kind in zip(data, kinds, strict=True) if kind == "learnable"]
    how = seed, learning_rate, data, learnable, judge
    accuracy, steps = in_trl(TRL[arm], *how) if arm in TRL else in_tunix(TUNIX[arm], *how)
    where = {"arm": arm, "seed": seed, "learning_rate": learning_rate, "accuracy": accuracy}
    return where | judge.figures() | {"steps": steps}


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
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
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
