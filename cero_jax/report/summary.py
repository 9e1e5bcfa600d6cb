"""A run's allocation in a few figures and a table of them to read: what it did, beside what the posterior said before.

The posterior is the run's under the prior fitted to the population, whatever the allocator: what `cero` goes by, and
nearest to the truth for an allocator that goes by another (benchmarks/LOG.md).

Letters: N prompts, E epochs that ended, F epochs with a group, B bins.
"""

from typing import NamedTuple

import numpy as np

from cero_jax.report import mechanism
from cero_jax.report.mechanism import BIN_NAMES, Calibration, Groups, Selection
from cero_jax.report.read_run import EpochLog, RunLog, epochs

CALIBRATION_BINS = 10
CONFIDENCE = 1.96  # standard errors on either side of a mean: 95 % where it is normal


class Summary(NamedTuple):
    """A run's allocation."""

    selection: Selection
    groups: Groups
    calibration: Calibration
    exposure: np.ndarray  # [3] rollouts of a prompt over the mean: 10, 50 and 90 % of the prompts
    never_visited: float  # share of the prompts
    ahead: np.ndarray  # [E] rollouts spent less the even share, at the end of each epoch that has ended
    course: np.ndarray  # [F, 4] rollouts spent by its end; share of its groups effective: seen, expected, at random


def summarise(run: RunLog) -> Summary:
    """The figures of a run, finished or not.

    Raises ValueError where its config lacks what they follow from, or where no rollout was judged.
    """
    rollouts = np.zeros(len(run.labels), int)
    for row in run.steps:
        rollouts[row["prompt_ids"]] += row["num_rollouts"]
    observed = [(int(epoch.spent[-1]), mechanism.observe_one(_as_groups(epoch))) for epoch in epochs(run)]
    selection, groups = mechanism.together([each for _, each in observed])
    if not selection.groups:
        raise ValueError(f"{run.path / 'metrics.jsonl'}: no rollout that was judged")
    return Summary(
        selection,
        groups,
        mechanism.calibration(groups, CALIBRATION_BINS),
        mechanism.exposure(rollouts),
        float(np.mean(rollouts == 0)),
        ahead(run),
        np.array([_effective(spent, *each) for spent, each in observed if each[0].groups]),
    )


def _effective(spent: int, who: Selection, groups: Groups) -> tuple[float, ...]:
    return spent, float(groups.effective.mean()), who.effective / who.groups, who.effective_at_random / who.groups


def _as_groups(epoch: EpochLog) -> mechanism.Epoch:
    """The visits of a prompt in the epoch are one group; it counts where any rollout of it is evidence."""
    ids, first, place = np.unique(epoch.prompt_ids, return_index=True, return_inverse=True)
    evidence, correct = (np.bincount(place, x).astype(int) for x in (epoch.evidence, epoch.correct))
    group = evidence > 0
    columns = ids, *epoch.fitted[:, first], evidence, correct
    return mechanism.Epoch(*(each[group] for each in columns), *epoch.population)


def ahead(run: RunLog) -> np.ndarray:
    """[E] rollouts spent less the even share of the budget, at the end of each epoch; below 0: behind.

    The even share is total_budget / num_epochs an epoch. The epoch that the log ends in counts where it is the last of
    the run; another may be under way. Raises ValueError where the config has no total_budget or num_epochs.
    """
    settings, last = run.config["allocator"], run.steps[-1]
    if missing := [name for name in ("total_budget", "num_epochs") if name not in settings]:
        raise ValueError(
            f"{run.path / 'config.json'}: no allocator.{' or '.join(missing)}: written by another version?"
        )
    total, num_epochs = settings["total_budget"], settings["num_epochs"]
    ended = last["spent"] >= total or last["epoch"] == num_epochs - 1
    spent = np.zeros(last["epoch"] + 1, int)
    for row in run.steps:
        spent[row["epoch"]] = row["spent"]
    spent = np.maximum.accumulate(spent)[: len(spent) if ended else -1]  # an epoch may draw nothing
    return spent - total / num_epochs * np.arange(1, len(spent) + 1)


def describe(run: RunLog) -> str:
    """The figures of a run to read, a few lines; where `summarise` has none, a line that says why."""
    title = f"{run.config['name']}, {run.config['allocator']['name']}, seed {run.config['seed']}"
    try:
        found = summarise(run)
    except ValueError as error:
        return f"{title}: no figures of the allocation: {error}"
    who, bins = found.selection, found.calibration
    table = {
        "predicted success": BIN_NAMES,
        "share of prompts": (percent(x / who.groups) for x in who.in_bin_at_random),
        "share of groups": (percent(x / who.groups) for x in who.in_bin),
        "lift": (_number(x, 2) for x in mechanism.lift(who)),
        "variance expected": (_number(x, 3) for x in bins.expected),
        "variance seen": (_number(x, 3) for x in bins.seen),
        "± (95 %)": (_number(CONFIDENCE * x, 3) for x in bins.error),
    }
    rows = (f"{name:<17}" + "".join(f"{cell:>11}" for cell in cells) for name, cells in table.items())
    return "\n".join([f"{title}: {effective_groups(found)}", *rows, *exposure_and_pace(found)])


def effective_groups(found: Summary) -> str:
    """One line: how many groups held both a success and a failure, and what was expected."""
    seen, who = percent(found.groups.effective.mean()), found.selection
    expected, at_random = (percent(x / who.groups) for x in (who.effective, who.effective_at_random))
    return (
        f"{seen} of {who.groups:,} groups hold both a success and a failure; the posterior expected {expected} of "
        f"them, and {at_random} of groups of the same sizes given to prompts at random"
    )


def exposure_and_pace(found: Summary) -> list[str]:
    """Two lines, or one before the first epoch has ended."""
    low, middle, high = found.exposure
    lines = [
        f"rollouts of a prompt over the mean: {low:.2f}, {middle:.2f}, {high:.2f} at 10, 50, 90 % of the prompts; "
        f"{percent(found.never_visited)} of the prompts never visited"
    ]
    if len(found.ahead):
        ahead = (f"{x:+,.0f}" for x in (found.ahead.min(), found.ahead.max(), found.ahead[-1]))
        lines.append(
            "rollouts spent ahead of the even pace: {} to {} at the ends of epochs, {} at the last".format(*ahead)
        )
    return lines


def _number(x: float, digits: int) -> str:
    return f"{x:.{digits}f}" if np.isfinite(x) else "-"


def percent(share: float) -> str:
    """With one decimal."""
    return f"{100 * share:.1f} %"
