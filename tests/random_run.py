"""A run of random visits, written as a run is: what the tests of the page read."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import cero_jax
from cero_jax.report.read_run import RunLog, read_run

N, DISCOUNT = 6, 0.8
RATES, WORTH = [0.25, None, 1.0, 0.0, 0.5, 0.75], 5.0  # of another model, and what they are worth in rollouts
HOSTILE = "</script><script>document.title='BROKEN'</script><!-- <b>bold</b> \u2028 ${x} `\\"


def start(rates: bool) -> tuple[cero_jax.Allocator, cero_jax.AllocatorState]:
    """The allocator of the run and its state at the start, with pass rates or without."""
    allocator = cero_jax.cero(total_budget=1000, num_epochs=10, discount=DISCOUNT)
    state = allocator.init(N)
    return allocator, cero_jax.with_pass_rates(state, np.array(RATES, float), WORTH) if rates else state


def random_run(folder: Path, rates: bool = False) -> tuple[RunLog, Any]:
    """Random visits, each settled by a real allocator too: the run as it is read, and the allocator's last state."""
    rng = np.random.default_rng(0)
    (allocator, state), rows, samples, spent = start(rates), [], [], 0
    for step in range(12):
        ids = rng.choice(N - 1, 2, replace=False)  # the last prompt is never visited
        rollouts = rng.integers(4, 9, 2)
        evidence = rollouts - rng.integers(0, 3, 2)
        correct = rng.binomial(evidence, 0.4)
        state = allocator.update(state, rollouts, correct, prompt_ids=ids, num_evidence=evidence)
        spent += int(rollouts.sum())
        rows.append(
            {"kind": "step", "step": step, "epoch": step // 3, "spent": spent, "prompt_ids": ids.tolist(),
             "num_rollouts": rollouts.tolist(), "num_correct": correct.tolist(), "num_evidence": evidence.tolist(),
             "live_share": 0.5, "reward": 0.25, "entropy": 1.5,
             "grad_norm": float("nan") if step == 1 else 0.5, "loss": -0.001}
            | ({"rewards": {"correct": 0.2, "format": 0.5}} if step else {})
        )  # fmt: skip
        samples += [
            {"kind": "train", "spent": spent, "prompt_id": int(i), "completion": HOSTILE, "extracted": "7",
             "status": "wrong", "reward": 0.0, "length": 9} for i in ids
        ]  # fmt: skip
    score = {
        "prompts": 4,
        "accuracy": 0.5,
        "low": 0.2,
        "high": 0.8,
        "pass_at": {"1": 0.5},
        "status": {"right": 2, "wrong": 2},
    }
    rows.append(
        {"kind": "eval", "step": 12, "spent": spent, "accuracy": 0.5, "accuracy_by_label": {"a": 0.4, "b": 0.6},
         "scores": {"all": score}}
    )  # fmt: skip
    config = {
        "name": "x",
        "seed": 0,
        "allocator": {
            "name": "cero",
            "prior": [0.5, 0.5],
            "discount": DISCOUNT,
            "total_budget": 1000,
            "num_epochs": 10,
            "pass_rate_rollouts": WORTH,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    prompts = {"labels": ["all"] * N, "questions": [f"question {i} {HOSTILE}" for i in range(N)], "answers": ["7"] * N}
    if rates:
        prompts["pass_rates"] = RATES
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples) + '{"kind": "tr')
    # Batches of two steps: the phases of a batch stand in its last row.
    timings = [
        {"kind": "step", "step": row["step"], "spent": row["spent"], "sample_seconds": 1.0, "learn_seconds": 0.5}
        | ({"phase_seconds": {"draw": 2.0, "verify": 0.5, "learn": 1.0, "host": 0.25}} if row["step"] % 2 else {})
        for row in rows[:-1]
    ]
    timings.append({"kind": "eval", "step": 12, "spent": spent, "eval_seconds": 3.0})
    (folder / "timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timings))
    return read_run(folder), state
