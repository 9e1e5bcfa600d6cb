"""One picture of one run or several: accuracy against rollouts spent, and where the rollouts went.

python -m cero_jax.report RUN [RUN ...] [--output report.png]
python -m cero_jax.report RUN --html run.html   # every prompt with its history and samples, in a browser
python -m cero_jax.report RUN --prompt 7        # one of them, here
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MAX_COLUMNS = 60  # of a heat map
MAX_STRETCHES = 30  # of steps, each a point of a curve: one step alone is noise
MAX_MAPS = 4

_KEYS = {
    "step": ("step", "epoch", "spent", "prompt_ids", "num_rollouts", "num_correct", "live_share"),
    "eval": ("step", "spent", "accuracy"),
}


class Run(NamedTuple):
    """What a run directory says. N prompts."""

    path: Path
    config: dict[str, Any]  # resolved, nested
    labels: tuple[str, ...]  # [N]
    steps: tuple[dict[str, Any], ...]  # the "step" rows of metrics.jsonl, at least one
    evals: tuple[dict[str, Any], ...]  # its "eval" rows, at least one
    questions: tuple[str, ...] = ()  # [N], or none
    answers: tuple[str, ...] = ()  # [N] gold, or none


class Curve(NamedTuple):
    """A figure against rollouts spent, over runs that differ by their seed alone."""

    spent: np.ndarray  # [X] rollouts
    mean: np.ndarray  # [X]
    low: np.ndarray  # [X] of the lowest run
    high: np.ndarray  # [X]


class Allocation(NamedTuple):
    """Where a run's rollouts went. G labels, C columns of one or more epochs."""

    labels: tuple[str, ...]  # [G] in the order of the numbers in them
    first_epoch: np.ndarray  # [C + 1] int; the last entry ends the last column
    share: np.ndarray  # [G, C] of the column's rollouts
    of_rollouts: np.ndarray  # [G] share of all rollouts
    of_prompts: np.ndarray  # [G] share of all prompts


def read_run(path: Path | str) -> Run:
    """Read a run directory.

    Raises FileNotFoundError where it or a file of it is missing, ValueError where one is broken, empty or half-written.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run directory")
    config, prompts = _read_json(path / "config.json"), _read_json(path / "prompts.json")
    labels = tuple(prompts.get("labels", ()))
    if not labels:
        raise ValueError(f"{path / 'prompts.json'}: no labels in it: not the prompts of a run")
    if not {"name", "allocator", "seed"} <= config.keys():
        raise ValueError(f"{path / 'config.json'}: no name, allocator or seed in it: not the config of a run")
    rows: dict[str, list[dict]] = {kind: [] for kind in _KEYS}
    for number, line in enumerate(_read(path / "metrics.jsonl").splitlines(), 1):
        where = f"{path / 'metrics.jsonl'}:{number}"
        try:
            row = json.loads(line)
            rows[row["kind"]].append(row)
            missing = [key for key in _KEYS[row["kind"]] if key not in row]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: half-written or broken: resume the run, or wait for its next line") from error
        if missing:
            raise ValueError(f"{where}: no {', '.join(missing)} in this {row['kind']} row: written by another version?")
        if row["kind"] == "step" and not all(0 <= i < len(labels) for i in row["prompt_ids"]):
            raise ValueError(f"{where}: a prompt id outside the {len(labels)} prompts of {path / 'prompts.json'}")
    for kind, found in rows.items():
        if not found:
            raise ValueError(f"{path / 'metrics.jsonl'}: no {kind} in it yet: let the run go on")
    texts = (tuple(prompts.get(key, ())) for key in ("questions", "answers"))
    return Run(path, config, labels, tuple(rows["step"]), tuple(rows["eval"]), *texts)


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: not the directory of a run, or one that never started")
    return path.read_text(encoding="utf-8", errors="replace")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: half-written or broken ({error.msg} at line {error.lineno})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs under the name a legend gives them: those whose settings differ by seed and directory alone share one."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in ("seed", "work_dir")}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    names = {}
    one_name = len({run.config["name"] for run in runs}) == 1
    for group in groups.values():
        config = group[0].config
        name = config["allocator"]["name"] if one_name else f"{config['name']}, {config['allocator']['name']}"
        names[name if name not in names else f"{name} ({group[0].path.name})"] = group
    return names


def accuracy_curve(runs: Sequence[Run]) -> Curve:
    """Held-out accuracy against rollouts spent."""
    return _curve([([row["spent"] for row in run.evals], [row["accuracy"] for row in run.evals]) for run in runs])


def live_curve(runs: Sequence[Run]) -> Curve:
    """Share of rows in groups with variance: the means of up to 30 stretches of steps, each at its middle."""
    series = []
    for run in runs:
        parts = np.array_split(np.array([(row["spent"], row["live_share"]) for row in run.steps]), MAX_STRETCHES)
        series.append(np.array([part.mean(axis=0) for part in parts if len(part)]).T)
    return _curve(series)


def _curve(series: Sequence[tuple]) -> Curve:
    """Mean and range of several series at every x that any of them has, where all of them reach."""
    start, end = max(x[0] for x, _ in series), min(x[-1] for x, _ in series)
    spent = np.unique(np.concatenate([x for x, _ in series]))
    spent = spent[(spent >= start) & (spent <= end)]
    values = np.array([np.interp(spent, x, y) for x, y in series])
    return Curve(spent, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def allocation(run: Run) -> Allocation:
    """Rollouts by label over the epochs, in up to 60 columns; an epoch without rollouts has shares 0.

    Where a task knows no labels, prompts are told apart by their success at the first visit.
    """
    prompt_labels = np.array(run.labels if len(set(run.labels)) > 1 else success_labels(run))
    labels = sorted(set(prompt_labels), key=_by_number)
    row_of_label = {label: i for i, label in enumerate(labels)}
    row_of_prompt = np.array([row_of_label[label] for label in prompt_labels])
    num_epochs = 1 + max(row["epoch"] for row in run.steps)
    first_epoch = np.unique(np.linspace(0, num_epochs, min(num_epochs, MAX_COLUMNS) + 1).astype(int))
    rollouts = np.zeros((len(labels), len(first_epoch) - 1))
    for row in run.steps:
        column = np.searchsorted(first_epoch, row["epoch"], side="right") - 1
        np.add.at(rollouts[:, column], row_of_prompt[np.array(row["prompt_ids"], int)], row["num_rollouts"])
    total = rollouts.sum(axis=0)
    return Allocation(
        labels=tuple(labels),
        first_epoch=first_epoch,
        share=rollouts / np.maximum(total, 1),
        of_rollouts=rollouts.sum(axis=1) / max(total.sum(), 1),
        of_prompts=np.bincount(row_of_prompt, minlength=len(labels)) / len(row_of_prompt),
    )


def success_labels(run: Run) -> list[str]:
    """A label for each prompt, by the share of right rollouts at its first visit: [N]."""
    share: dict[int, float] = {}
    for row in run.steps:
        for prompt, drawn, correct in zip(row["prompt_ids"], row["num_rollouts"], row["num_correct"], strict=True):
            if drawn:
                share.setdefault(prompt, correct / drawn)

    def label(prompt: int) -> str:
        if prompt not in share:
            return "never visited"
        if share[prompt] in (0, 1):
            return f"{100 * share[prompt]:.0f} % right at first"
        return ("1-33", "34-66", "67-99")[int(3 * share[prompt])] + " % right at first"

    return [label(prompt) for prompt in range(len(run.labels))]


def _by_number(label: str) -> tuple:
    """Sorts "length 8-12" before "length 13-18", and labels without a number last."""
    numbers = [int(number) for number in re.findall(r"[0-9]+", label)]
    return (not numbers, numbers, label)


def draw_report(run_dirs: Sequence[Path | str], output_png: Path | str) -> None:
    """Draw the runs into a PNG. Raises what `read_run` raises."""
    from matplotlib.figure import Figure

    runs = [read_run(path) for path in run_dirs]
    groups = group_runs(runs)
    shown = list(groups.items())[:MAX_MAPS]
    allocations = [allocation(group[0]) for _, group in shown]
    map_rows = (len(shown) + 1) // 2
    map_height = 0.9 + 0.42 * max(len(a.labels) for a in allocations)
    figure = Figure(figsize=(13, 4.6 + map_rows * (map_height + 0.5)), layout="constrained", dpi=130)
    top, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[4.6, map_rows * (map_height + 0.5)])[:, 0]

    curves, live = top.subplots(1, 2, width_ratios=[5, 3])
    colors = [COLORS[i % len(COLORS)] for i in range(len(groups))]
    for (name, group), color in zip(groups.items(), colors, strict=True):
        accuracy = accuracy_curve(group)
        legend = f"{name}{f', {len(group)} seeds' if len(group) > 1 else ''}: {_percent(accuracy.mean[-1])} at the end"
        _draw_curve(curves, accuracy, color, legend, marker="o" if len(accuracy.spent) <= 60 else None)
        _draw_curve(live, live_curve(group), color, name)
    band = " (shaded: lowest to highest seed)" if len(runs) > len(groups) else ""
    _finish(curves, "Held-out accuracy" + band, "mean reward of held-out prompts")
    _finish(live, "Rollouts that teach", "share of rows in groups with variance")
    curves.legend(frameon=False, loc="lower right")

    panels = np.ravel(below.subplots(map_rows, min(len(shown), 2), squeeze=False))
    scale = max(a.share.max() for a in allocations)
    for panel, (name, group), where in zip(panels, shown, allocations, strict=False):
        image = _draw_allocation(panel, where, scale)
        panel.set_title(f"Where the rollouts go: {name}, seed {group[0].config['seed']}", loc="left", fontsize=11)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    below.colorbar(image, ax=list(panels), format=_percent, label="share of the rollouts", aspect=30, pad=0.01)
    names = ", ".join(dict.fromkeys(run.config["name"] for run in runs))
    spent = max(run.steps[-1]["spent"] for run in runs)
    figure.suptitle(f"{names}: {spent:,} rollouts", fontsize=14, fontweight="bold")
    figure.savefig(output_png)


def _draw_curve(axes, curve: Curve, color: str, label: str, marker: str | None = None) -> None:
    axes.plot(curve.spent, curve.mean, color=color, label=label, linewidth=2, marker=marker, markersize=3.5)
    if np.any(curve.high > curve.low):
        axes.fill_between(curve.spent, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)


def _finish(axes, title: str, what: str) -> None:
    axes.set(xlabel="rollouts spent", ylabel=what)
    axes.set_xlim(left=0)
    axes.set_ylim(0, min(1.02, max(0.05, axes.get_ylim()[1])))
    axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(_percent)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_allocation(axes, where: Allocation, scale: float):
    rows = np.arange(len(where.labels) + 1)
    image = axes.pcolormesh(where.first_epoch, rows, where.share, cmap="YlGnBu", vmin=0, vmax=scale)
    axes.invert_yaxis()
    axes.hlines(rows[1:-1], 0, where.first_epoch[-1], color="white", linewidth=2)
    ticks = [
        f"{label}\n{_percent(prompts)} of prompts, {_percent(rollouts)} of rollouts"
        for label, prompts, rollouts in zip(where.labels, where.of_prompts, where.of_rollouts, strict=True)
    ]
    axes.set_yticks(rows[:-1] + 0.5, ticks, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("epoch (round of allocation)")
    axes.locator_params(axis="x", integer=True)
    axes.spines[:].set_visible(False)
    return image


def _percent(share: float, position: int | None = None) -> str:
    del position  # matplotlib's
    return f"{100 * share:.0f} %"


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with one line where a run cannot be read."""
    from cero_jax.history import describe  # which need this module
    from cero_jax.page import write_page

    parser = argparse.ArgumentParser(prog="python -m cero_jax.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory, e.g. runs/chain_sum-cero-0")
    parser.add_argument("--output", default="report.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--html", metavar="FILE", help="write the first run as a page for a browser instead")
    parser.add_argument(
        "--prompt", metavar="ID", type=int, help="print the history of a prompt of the first run instead"
    )
    parsed = parser.parse_args(args)
    try:
        if parsed.prompt is not None:
            print(describe(read_run(parsed.runs[0]), parsed.prompt))
        elif parsed.html:
            write_page(read_run(parsed.runs[0]), parsed.html)
            print(parsed.html)
        else:
            draw_report(parsed.runs, parsed.output)
            print(parsed.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
