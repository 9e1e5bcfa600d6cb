"""One picture of one run or several: accuracy against rollouts spent, and where the rollouts went."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cero_jax.report.read_run import (
    Allocation,
    Curve,
    RunLog,
    accuracy_curve,
    allocation,
    group_runs,
    live_curve,
    read_run,
)
from cero_jax.terminal import one_line

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of Okabe and Ito
MAX_MAPS = 4  # heat maps of the first settings; the others have curves only


def draw_report(run_dirs: Sequence[Path | str], output_png: Path | str) -> None:
    """Draw the runs into a PNG. Runs of one setting with several seeds share a curve. Raises what `read_run` raises."""
    import matplotlib

    runs = [read_run(path) for path in run_dirs]
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
        _draw(runs).savefig(output_png)


def _draw(runs: list[RunLog]):
    from matplotlib.figure import Figure

    groups = [(_shown(name), group) for name, group in group_runs(runs).items()]
    shown = groups[:MAX_MAPS]
    allocations = [allocation(group[0]) for _, group in shown]
    map_rows = (len(shown) + 1) // 2
    map_height = 0.9 + 0.42 * max(len(a.labels) for a in allocations)
    figure = Figure(figsize=(13, 4.6 + map_rows * (map_height + 0.5)), layout="constrained", dpi=130)
    top, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[4.6, map_rows * (map_height + 0.5)])[:, 0]

    curves, live = top.subplots(1, 2, width_ratios=[5, 3])
    colors = [COLORS[i % len(COLORS)] for i in range(len(groups))]
    measured = [accuracy_curve(group) for _, group in groups]
    figure_of = _percent if all(np.all((c.low >= 0) & (c.high <= 1)) for c in measured) else _plain
    for (name, group), accuracy, color in zip(groups, measured, colors, strict=True):
        legend = f"{name}{f', {len(group)} seeds' if len(group) > 1 else ''}: {figure_of(accuracy.mean[-1])} at the end"
        _draw_curve(curves, accuracy, color, legend, marker="o" if len(accuracy.spent) <= 60 else None)
        _draw_curve(live, live_curve(group), color, name)
    band = " (shaded: lowest to highest seed)" if len(runs) > len(groups) else ""
    _finish(curves, "Held-out accuracy" + band, "mean reward of held-out prompts", figure_of)
    _finish(live, "Rollouts that teach", "share of rows in groups with variance", _percent)
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
    figure.suptitle(f"{one_line(names, 120)}: {spent:,} rollouts", fontsize=14, fontweight="bold")
    return figure


def _shown(name: str) -> str:
    """A name as a legend takes it: on a line, and not beginning with the underscore that hides it."""
    return f"{' ' * name.startswith('_')}{one_line(name, 100)}"


def _draw_curve(axes, curve: Curve, color: str, label: str, marker: str | None = None) -> None:
    axes.plot(curve.spent, curve.mean, color=color, label=label, linewidth=2, marker=marker, markersize=3.5)
    if np.any(curve.high > curve.low):
        axes.fill_between(curve.spent, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)


def _finish(axes, title: str, what: str, figure_of: Callable[[float, int | None], str]) -> None:
    axes.set(xlabel="rollouts spent", ylabel=what)
    axes.set_xlim(left=0)
    if figure_of is _percent:
        axes.set_ylim(0, min(1.02, max(0.05, axes.get_ylim()[1])))
    axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(figure_of)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_allocation(axes, where: Allocation, scale: float):
    rows = np.arange(len(where.labels) + 1)
    image = axes.pcolormesh(where.first_epoch, rows, where.share, cmap="YlGnBu", vmin=0, vmax=scale)
    axes.invert_yaxis()
    axes.hlines(rows[1:-1], 0, where.first_epoch[-1], color="white", linewidth=2)
    ticks = [
        f"{one_line(label, 60)}\n{_percent(prompts)} of prompts, {_percent(rollouts)} of rollouts"
        for label, prompts, rollouts in zip(where.labels, where.of_prompts, where.of_rollouts, strict=True)
    ]
    axes.set_yticks(rows[:-1] + 0.5, ticks, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("epoch (one call of allocate)")
    axes.locator_params(axis="x", integer=True)
    axes.spines[:].set_visible(False)
    return image


def _percent(share: float, position: int | None = None) -> str:
    del position  # matplotlib gives a tick's place as well
    return f"{100 * share:.0f} %"


def _plain(reward: float, position: int | None = None) -> str:
    """A reward on a scale other than 0 to 1."""
    del position
    return f"{reward:.3g}"
