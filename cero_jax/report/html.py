"""A run as one HTML file that needs no network: curves, a heat map, and every prompt with its history and samples."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from cero_jax.report.mechanism import BIN_NAMES, defined, lift
from cero_jax.report.read_run import RunLog, allocation, live_curve, mean, read_samples, replay
from cero_jax.report.summary import CONFIDENCE, effective_groups, exposure_and_pace, summarise

MAX_SAMPLES = 4  # of each prompt, the latest
MAX_CHARS = 1500  # of each text; a longer one loses its middle


def write_page(run: RunLog, path: Path | str) -> None:
    """Write the run's page. Raises OSError where the file cannot be written."""
    template = resources.files("cero_jax.report").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(page_data(run), separators=(",", ":"))
    # Without "<" in the data, a completion that holds "</script>" cannot end the script; the page shows texts as text.
    Path(path).write_text(template.replace("/*DATA*/null", data.replace("<", "\\u003c")), encoding="utf-8")


def page_data(run: RunLog) -> dict[str, Any]:
    """All that the page shows, as JSON values."""
    visits, posterior = replay(run)
    samples, where, live = read_samples(run), allocation(run), live_curve([run])
    names = sorted({name for row in run.evals for name in row.get("accuracy_by_label", {})})
    parts = list(dict.fromkeys(name for row in run.steps for name in row.get("rewards", {})))
    curves = {"all": [[row["spent"], row["accuracy"]] for row in run.evals]}
    if len(names) > 1:
        curves |= {n: [[r["spent"], r["accuracy_by_label"][n]] for r in run.evals] for n in names}
    prompts = [
        {
            "label": run.labels[i],
            "question": _clip(run.questions[i]) if run.questions else "",
            "answer": _clip(run.answers[i]) if run.answers else "",
            "rollouts": sum(v.rollouts for v in visits[i]),
            "correct": sum(v.correct for v in visits[i]),
            "mean": round(float(posterior[0, i] / posterior[:, i].sum()), 4),
            # epoch, spent, rollouts, right, not judged, success rate that the allocator expected, posterior mean after
            "visits": [[*v[:5], round(mean(v.expected), 4), round(mean(v.after), 4)] for v in visits[i]],
            "samples": [
                {key: _clip(each[key]) for key in ("spent", "status", "length", "extracted", "completion")}
                for each in samples.get(i, [])[-MAX_SAMPLES:]
            ],
        }
        for i in range(len(run.labels))
    ]
    config = run.config
    return {
        "title": f"{config['name']}, {config['allocator']['name']}, seed {config['seed']}",
        "spent": run.steps[-1]["spent"],
        "budget": config["allocator"].get("total_budget"),
        "scores": run.evals[-1].get("scores", {}),
        "accuracy": curves,
        "live": [[float(x), float(y)] for x, y in zip(live.spent, live.mean, strict=True)],
        "reward": [[row["spent"], row["reward"]] for row in run.steps if "reward" in row],
        "parts": {n: [[r["spent"], r["rewards"][n]] for r in run.steps if n in r.get("rewards", {})] for n in parts},
        "entropy": [[row["spent"], row["entropy"]] for row in run.steps if "entropy" in row],
        "map": {
            "labels": list(where.labels),
            "first_epoch": where.first_epoch.tolist(),
            "share": where.share.round(4).tolist(),
            "of_rollouts": where.of_rollouts.tolist(),
            "of_prompts": where.of_prompts.tolist(),
        },
        "mechanism": _mechanism(run),
        "prompts": prompts,
    }


def _mechanism(run: RunLog) -> dict[str, Any]:
    try:
        found = summarise(run)
    except ValueError as error:
        return {"lines": [f"no figures: {error}"]}
    who, bins = found.selection, found.calibration
    points = zip(bins.expected, bins.seen, CONFIDENCE * np.nan_to_num(bins.error), strict=True)
    return {
        "lines": [effective_groups(found), *exposure_and_pace(found)],
        "bins": BIN_NAMES,
        "prompts": (who.in_bin_at_random / who.groups).tolist(),
        "groups": (who.in_bin / who.groups).tolist(),
        "lift": [defined(x) for x in lift(who)],
        "calibration": [[round(float(x), 5) for x in point] for point in points],
        "ahead": [[epoch, float(x)] for epoch, x in enumerate(found.ahead, 1)],
    }


def _clip(text: Any) -> Any:
    if not isinstance(text, str) or len(text) <= MAX_CHARS:
        return text
    return f"{text[: MAX_CHARS // 2]} [...] {text[-MAX_CHARS // 2 :]}"
