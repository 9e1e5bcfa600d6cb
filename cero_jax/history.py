"""Why a prompt got its rollouts: each visit as the allocator saw it, replayed from a run's metrics.

Letters: N prompts.
"""

import json
from typing import Any, NamedTuple

import numpy as np

from cero_jax.allocator.posterior import ROLLOUTS_PER_PASS
from cero_jax.report import Run


class Visit(NamedTuple):
    """Rollouts of a prompt in one step, and the posterior Beta(alpha, beta) of its success before and after them."""

    epoch: int
    spent: int  # rollouts of the run, these included
    rollouts: int
    correct: int
    timed_out: int  # rollouts that were charged and are no evidence
    before: tuple[float, float]
    after: tuple[float, float]


def replay(run: Run) -> tuple[list[list[Visit]], np.ndarray]:
    """The visits of each prompt, and alpha, beta at the end: [2, N], by the arithmetic of the allocator."""
    settings, number = run.config["allocator"], len(run.labels)
    prior = np.array(settings["prior"], float)[:, None]
    posterior = np.repeat(prior, number, axis=1)
    visits: list[list[Visit]] = [[] for _ in range(number)]
    for row in run.steps:
        ids, rollouts, correct = (np.array(row[key], int) for key in ("prompt_ids", "num_rollouts", "num_correct"))
        evidence = np.array(row.get("num_evidence", rollouts), int)
        keep = settings["discount"] ** (rollouts.sum() / (ROLLOUTS_PER_PASS * number))
        before = posterior
        posterior = prior + keep * (posterior - prior)
        posterior[0, ids] += correct  # a prompt has one visit a step
        posterior[1, ids] += evidence - correct
        for i, drawn, right, counted in zip(ids.tolist(), rollouts, correct, evidence, strict=True):
            pairs = ((float(x[0, i]), float(x[1, i])) for x in (before, posterior))
            visits[i].append(Visit(row["epoch"], row["spent"], int(drawn), int(right), int(drawn - counted), *pairs))
    return visits, posterior


def read_samples(run: Run) -> dict[int, list[dict[str, Any]]]:
    """The completions kept of each training prompt, in order; none where the run wrote none."""
    samples: dict[int, list[dict[str, Any]]] = {}
    path = run.path / "samples.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            sample = json.loads(line)
        except ValueError:  # the last line of a live run
            continue
        if sample["kind"] == "train":
            samples.setdefault(sample["prompt_id"], []).append(sample)
    return samples


def describe(run: Run, prompt: int, max_samples: int = 4) -> str:
    """A prompt's history for a terminal. Raises ValueError where there is no such prompt."""
    if not 0 <= prompt < len(run.labels):
        raise ValueError(f"{run.path}: no prompt {prompt}: its ids are 0 to {len(run.labels) - 1}")
    visits, samples = replay(run)[0][prompt], read_samples(run).get(prompt, [])
    total, right = sum(v.rollouts for v in visits), sum(v.correct for v in visits)
    lines = [
        f"prompt {prompt} ({run.labels[prompt]}): {total} rollouts in {len(visits)} visits, {right} right",
        f"question: {run.questions[prompt]}" if run.questions else "",
        f"gold answer: {run.answers[prompt]}" if run.answers else "",
        f"{'epoch':>6} {'spent':>10} {'rollouts':>9} {'right':>6} {'expected':>9} {'posterior after':>16}",
    ]
    for v in visits:
        late = f"  {v.timed_out} timed out" if v.timed_out else ""
        lines.append(
            f"{v.epoch:>6} {v.spent:>10,} {v.rollouts:>9} {v.correct:>6} {mean(v.before):>9.2f} "
            f"{mean(v.after):>8.2f} ± {deviation(v.after):.2f}{late}"
        )
    for sample in samples[-max_samples:]:
        lines.append(f"--- after {sample['spent']:,} rollouts, {sample['status']}, {sample['length']} tokens")
        lines.append(sample["completion"])
    return "\n".join(line for line in lines if line)


def mean(posterior: tuple[float, float]) -> float:
    """Of Beta(alpha, beta)."""
    return posterior[0] / (posterior[0] + posterior[1])


def deviation(posterior: tuple[float, float]) -> float:
    """Standard deviation of Beta(alpha, beta)."""
    total = posterior[0] + posterior[1]
    return (posterior[0] * posterior[1] / (total**2 * (total + 1))) ** 0.5
