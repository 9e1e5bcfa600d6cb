"""Runs as one HTML file that needs no network: settings, curves, heat maps, and prompts with their history and samples.

A page shows at most MAX_PROMPTS prompts one by one, whatever a run has; its figures are of all.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from cero_jax.report.curves import pictures, seconds
from cero_jax.report.mechanism import BIN_NAMES, EDGES, defined, lift
from cero_jax.report.read_run import RunLog, allocation, by_number, mean, read_samples, read_timings, replay
from cero_jax.report.summary import CONFIDENCE, effective_groups, exposure_and_pace, summarise

MAX_PROMPTS = 2000  # of all runs of a page together
MAX_VISITS = 40  # of each prompt, the latest
MAX_SAMPLES = 4  # of each prompt, the latest
MAX_TEXT = 6_000_000  # characters of all texts, about
TEXT_CHARS = (200, 1500)  # of one text, at the most: where prompts are many, where they are few
MAX_SCORES = 20  # rows of the table of scores
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src {}; base-uri 'none'; form-action 'none'"


def write_page(runs: Sequence[RunLog], path: Path | str) -> None:
    """Write the page of one run, or of several side by side. Raises OSError where the file cannot be written."""
    Path(path).write_text(page(page_data(runs)), encoding="utf-8")


def page(data: dict[str, Any], more_script: str = "", more_policy: str = "") -> str:
    """The page of `page_data`. more_script: behind its own; more_policy: what that needs of the browser.

    The policy names the scripts by their hash: whatever a text smuggled in, a browser would not run it.
    """
    html = resources.files("cero_jax.report").joinpath("page.html").read_text(encoding="utf-8")
    html = html.replace("/*MORE*/", more_script)
    script = html.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = html.replace("<!--POLICY-->", POLICY.format(f"'sha256-{digest}'") + more_policy)
    # Without "<" in the data, a completion that holds "</script>" cannot end the block; the page shows texts as text.
    return html.replace("<!--DATA-->", as_json(data).replace("<", "\\u003c"))


def as_json(data: dict[str, Any]) -> str:
    """What every browser reads: a number that is none is null."""
    return json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page_data(runs: Sequence[RunLog]) -> dict[str, Any]:
    """All that the page shows of the runs, as JSON values. Raises what `replay` raises."""
    room = MAX_PROMPTS // len(runs)
    return {"runs": [_run_data(run, name, room) for run, name in zip(runs, _names(runs), strict=True)]}


def _names(runs: Sequence[RunLog]) -> list[str]:
    """The shortest names that tell the runs apart; of a single run, all that its name has."""
    rules = [f"{run.config['allocator']['name']}, seed {run.config['seed']}" for run in runs]
    whole = [f"{run.config['name']}, {rule}" for run, rule in zip(runs, rules, strict=True)]
    paths = [str(run.path) for run in runs]
    candidates = [whole if len(runs) == 1 else rules, whole, [run.path.name for run in runs], paths]
    return next((names for names in candidates if len(set(names)) == len(runs)), paths)


def _run_data(run: RunLog, name: str, room: int) -> dict[str, Any]:
    shown = _chosen(run, room)
    visits, posterior = replay(run, shown)
    where, timings, scores = allocation(run), read_timings(run), run.evals[-1].get("scores", {})
    kinds = sorted(scores, key=lambda name: (name != "all", by_number(name)))
    try:
        found = summarise(run)
    except ValueError as error:
        found, mechanism = None, {"lines": [f"no figures: {error}"]}
    else:
        mechanism = _mechanism(found)
    return {
        "name": name,
        "path": str(run.path),
        "settings": _settings(run.config),
        "spent": run.steps[-1]["spent"],
        "budget": run.config["allocator"].get("total_budget"),
        "scores": {name: scores[name] for name in kinds[:MAX_SCORES]},
        "more_scores": max(len(scores) - MAX_SCORES, 0),
        "pictures": pictures(run, timings, found),
        "seconds": seconds(timings),
        "map": {
            "labels": list(where.labels),
            "first_epoch": where.first_epoch.tolist(),
            "share": where.share.round(4).tolist(),
            "of_rollouts": where.of_rollouts.tolist(),
            "of_prompts": where.of_prompts.tolist(),
        },
        "mechanism": mechanism,
        "population": _population(run, posterior),
        "number": len(run.labels),
        "prompts": _prompts(run, shown, visits, posterior),
    }


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """Every setting as text, by its dotted name."""
    found = {}
    for key, value in config.items():
        nested = _settings(value) if isinstance(value, dict) else {"": value if isinstance(value, str) else str(value)}
        found |= {f"{key}.{name}" if name else key: _clip(text, TEXT_CHARS[0]) for name, text in nested.items()}
    return found


def _totals(run: RunLog) -> np.ndarray:
    """[2, N] int: rollouts and successes of each prompt."""
    totals = np.zeros((2, len(run.labels)), int)
    for row in run.steps:
        totals[:, row["prompt_ids"]] += [row["num_rollouts"], row["num_correct"]]
    return totals


def _chosen(run: RunLog, room: int) -> list[int]:
    """Ids of all prompts where there is room for them; else those of the most rollouts, and as many evenly spaced."""
    number = len(run.labels)
    if number <= room:
        return list(range(number))
    most = np.argsort(-_totals(run)[0], kind="stable")[: room // 2]
    others = np.setdiff1d(np.arange(number), most)
    return sorted({*most.tolist(), *others[:: -(-len(others) // (room - room // 2))].tolist()})


def _population(run: RunLog, posterior: np.ndarray) -> list[list[Any]]:
    """Of all prompts, by their posterior mean at the end: bin, prompts, never drawn, rollouts, successes."""
    place = np.digitize(posterior[0] / posterior.sum(axis=0), EDGES[1:-1])
    rollouts, correct = _totals(run)
    columns = (np.bincount(place, each, len(BIN_NAMES)) for each in (rollouts >= 0, rollouts == 0, rollouts, correct))
    return [[name, *map(int, row)] for name, *row in zip(BIN_NAMES, *columns, strict=True)]


def _prompts(run: RunLog, shown: list[int], visits: list[list], posterior: np.ndarray) -> list[dict[str, Any]]:
    samples = read_samples(run, set(shown), MAX_SAMPLES)
    least, most = TEXT_CHARS
    chars = int(np.clip(MAX_TEXT / (len(shown) * (2 + MAX_SAMPLES)), least, most))
    return [
        {
            "id": i,
            "label": _clip(run.labels[i], chars),
            "question": _clip(run.questions[i], chars) if run.questions else "",
            "answer": _clip(run.answers[i], chars) if run.answers else "",
            "visited": len(visits[i]),
            "rollouts": sum(v.rollouts for v in visits[i]),
            "correct": sum(v.correct for v in visits[i]),
            "mean": round(float(posterior[0, i] / posterior[:, i].sum()), 4),
            # epoch, spent, rollouts, right, not judged, success rate that the allocator expected, posterior mean after
            "visits": [[*v[:5], round(mean(v.expected), 4), round(mean(v.after), 4)] for v in visits[i][-MAX_VISITS:]],
            "samples": [
                {key: _clip(each[key], chars) for key in ("spent", "status", "length", "extracted", "completion")}
                for each in samples.get(i, ())
            ],
        }
        for i in shown
    ]


def _mechanism(found) -> dict[str, Any]:
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


def _clip(text: Any, chars: int) -> Any:
    """A longer text loses its middle."""
    if not isinstance(text, str) or len(text) <= chars:
        return text
    return f"{text[: chars // 2]} [...] {text[-chars // 2 :]}"
