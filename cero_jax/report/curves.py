"""A run's curves over the rollouts spent, short enough for a page; and where its time went."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cero_jax.report.read_run import RunLog, by_number, live_curve
from cero_jax.report.summary import Summary

STRETCHES = 60  # of steps, each a point: one step alone is noise
MAX_LINES = 7  # of one picture, as many as there are colours
OF_STEPS = {  # titles, and the figures of a step's row
    "Loss": "loss",
    "Norm of the gradient": "grad_norm",
    "Length of a completion, tokens": "completion_tokens",
    "Share of completions cut at the limit": "truncated_share",
    "KL to the reference, nats a token": "kl",
    "Entropy of the policy, nats a token": "entropy",
    "Learning rate": "learning_rate",
}

Line = list[list[float]]  # points [rollouts spent, figure]


class Batch(NamedTuple):
    """A sampling batch as timings.jsonl has it."""

    spent: int  # rollouts by its end
    steps: int
    seconds: dict[str, float]  # by phase


def pictures(run: RunLog, timings: Sequence[dict], found: Summary | None) -> list[dict[str, Any]]:
    """In the order of a page: title, and lines by name. A figure that the run did not write has no picture.

    timings: rows of timings.jsonl. found: the run's summary, None where there is none.
    """
    live, batches = live_curve([run]), _batches(timings)
    lines = _accuracy(run)
    lines["Rollouts that teach: share in groups with variance"] = {
        "": stretches(zip(live.spent, live.mean, strict=True))
    }
    if found is not None:
        names, course = ("seen", "expected", "at random"), found.course
        effective = {name: stretches(course[:, [0, i]]) for i, name in enumerate(names, 1)}
        lines["Groups with a success and a failure, share of an epoch's"] = effective
    parts = dict.fromkeys(name for row in run.steps for name in row.get("rewards", {}))
    rewards = {name: stretches((r["spent"], r["rewards"][name]) for r in run.steps if "rewards" in r) for name in parts}
    lines["Mean reward of a step, and its parts" if parts else "Mean reward of a step"] = (
        _of_steps(run, "reward") | rewards
    )
    lines |= {title: _of_steps(run, key) for title, key in OF_STEPS.items()}
    phases = dict.fromkeys(name for batch in batches for name in batch.seconds)
    lines["Seconds a step, by phase (medians)"] = {  # a step that compiles would flatten all others
        name: stretches(((b.spent, b.seconds.get(name, 0) / b.steps) for b in batches), of=np.median) for name in phases
    }
    drawn = ({"title": title, "lines": {n: x for n, x in each.items() if x}} for title, each in lines.items())
    return [each for each in drawn if each["lines"]]


def _accuracy(run: RunLog) -> dict[str, dict[str, Line]]:
    """The first picture: of all held-out prompts, and by label where there are several."""
    labels = sorted({name for row in run.evals for name in row.get("accuracy_by_label", {})}, key=by_number)
    shown = labels[: MAX_LINES - 1] if len(labels) > 1 else []
    found = {"all": stretches(((row["spent"], row["accuracy"]) for row in run.evals), 300)}
    for label in shown:
        rows = [row for row in run.evals if label in row.get("accuracy_by_label", {})]
        found[label] = stretches(((row["spent"], row["accuracy_by_label"][label]) for row in rows), 300)
    more = f" (of {len(labels)} kinds the first {len(shown)})" if shown != labels and shown else ""
    return {f"Held-out accuracy{more}": found}


def _of_steps(run: RunLog, key: str) -> dict[str, Line]:
    return {"": stretches((row["spent"], row[key]) for row in run.steps if row.get(key) is not None)}


def _batches(timings: Sequence[dict]) -> list[Batch]:
    """The sampling batches, in order; of a run of an earlier commit, whose phases are fewer, its steps."""
    rows, found, steps = [row for row in timings if row["kind"] == "step"], [], 0
    if not any("phase_seconds" in row for row in rows):
        return [
            Batch(row["spent"], 1, {"draw and verify": row["sample_seconds"], "learn": row["learn_seconds"]})
            for row in rows
        ]
    for row in rows:
        steps += 1
        if "phase_seconds" in row:  # its last step
            found.append(Batch(row["spent"], steps, row["phase_seconds"]))
            steps = 0
    return found


def seconds(timings: Sequence[dict]) -> dict[str, float]:
    """Of the whole run by phase, evaluations among them."""
    total = Counter()
    for batch in _batches(timings):
        total.update(batch.seconds)
    total["evaluate"] = sum(row.get("eval_seconds", 0) for row in timings)
    return {name: round(value, 3) for name, value in total.items()}


def stretches(points: Iterable[Sequence[float]], most: int = STRETCHES, of: Callable = np.mean) -> Line:
    """The mean, or what `of` gives, of at most `most` stretches of points [x, y], without those that are not finite."""
    array = np.array(list(points), float).reshape(-1, 2)
    array = array[np.isfinite(array).all(axis=1)]
    parts = np.array_split(array, most) if len(array) > most else array[:, None]
    return [[float(f"{x:.6g}") for x in of(part, axis=0)] for part in parts]
