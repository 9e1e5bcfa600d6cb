"""What a run wrote, read back: its curves, where its rollouts went, and why each prompt got its own.

Letters: N prompts, M of them that stand for all, U visits.
"""

import json
import re
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cero_jax.allocator.posterior import FIT_SAMPLE, ROLLOUTS_PER_PASS, fitted_prior
from cero_jax.report.mechanism import spaced
from cero_jax.terminal import printable

MAX_COLUMNS = 60  # of a heat map
MAX_LABELS = 12  # of its rows
MAX_STRETCHES = 30  # of steps, each a point of a curve: one step alone is noise

_COUNTS = "num_rollouts", "num_correct", "num_evidence"  # of each visit; an older log has no num_evidence
_KEYS = {
    "step": ("step", "epoch", "spent", "prompt_ids", "num_rollouts", "num_correct", "live_share"),
    "eval": ("step", "spent", "accuracy"),
    "epoch": ("epoch", "spent"),
}


class RunLog(NamedTuple):
    """What a run directory says."""

    path: Path
    config: dict[str, Any]  # resolved, nested
    labels: tuple[str, ...]  # [N]
    steps: tuple[dict[str, Any], ...]  # the "step" rows of metrics.jsonl, at least one
    evals: tuple[dict[str, Any], ...]  # its "eval" rows, at least one
    known: np.ndarray  # [2, N] float64, successes and failures that pass rates stood for before the first rollout
    questions: tuple[str, ...] = ()  # [N], or none
    answers: tuple[str, ...] = ()  # [N] gold, or none


class Curve(NamedTuple):
    """A figure against rollouts spent, over runs that differ by their seed alone."""

    spent: np.ndarray  # [points] rollouts
    mean: np.ndarray  # [points]
    low: np.ndarray  # [points] of the lowest run
    high: np.ndarray  # [points]


class Allocation(NamedTuple):
    """Where a run's rollouts went: by label, over columns of one or more epochs."""

    labels: tuple[str, ...]  # [labels] in the order of the numbers in them
    first_epoch: np.ndarray  # [columns + 1] int; the last entry ends the last column
    share: np.ndarray  # [labels, columns] of the column's rollouts
    of_rollouts: np.ndarray  # [labels] share of all rollouts
    of_prompts: np.ndarray  # [labels] share of all prompts


def read_run(path: Path | str) -> RunLog:
    """Read a run directory.

    Raises FileNotFoundError where it or a file of it is missing, ValueError where one is broken, empty or half-written.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run directory")
    config, prompts = _read_json(path / "config.json"), _read_json(path / "prompts.json")
    labels = tuple(prompts.get("labels", ()))
    if len(labels) == 1:  # of all prompts
        labels *= max(len(prompts.get("questions", ())), 1)
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
    for kind in ("step", "eval"):
        if not rows[kind]:
            raise ValueError(f"{path / 'metrics.jsonl'}: no {kind} in it yet: let the run go on")
    texts = (tuple(prompts.get(key, ())) for key in ("questions", "answers"))
    known = _from_pass_rates(prompts.get("pass_rates"), config["allocator"].get("pass_rate_rollouts", 0), len(labels))
    return RunLog(path, config, labels, tuple(rows["step"]), tuple(rows["eval"]), known, *texts)


def _from_pass_rates(rates: list[float | None] | None, rollouts: float, num_prompts: int) -> np.ndarray:
    """[2, N] float64, the evidence that a run began with: successes and failures."""
    shares = np.array([None] * num_prompts if rates is None else rates, float)
    return np.nan_to_num(rollouts * np.stack([shares, 1 - shares]))


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


def group_runs(runs: Sequence[RunLog]) -> dict[str, list[RunLog]]:
    """Runs under the name a legend gives them: those whose settings differ by seed and directory alone share one."""
    groups: dict[str, list[RunLog]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in ("seed", "work_dir", "version")}
        for name in ("task", "allocator"):  # where their classes are found may differ
            settings[name] = {key: value for key, value in settings.get(name, {}).items() if key != "class"}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    names = {}
    one_name = len({run.config["name"] for run in runs}) == 1
    for group in groups.values():
        config = group[0].config
        name = config["allocator"]["name"] if one_name else f"{config['name']}, {config['allocator']['name']}"
        alike = (name, f"{name} ({group[0].path.name})", f"{name} ({group[0].path})")
        names[next(each for each in alike if each not in names)] = group
    return names


def accuracy_curve(runs: Sequence[RunLog]) -> Curve:
    """Held-out accuracy against rollouts spent."""
    return _curve([([row["spent"] for row in run.evals], [row["accuracy"] for row in run.evals]) for run in runs])


def live_curve(runs: Sequence[RunLog]) -> Curve:
    """Share of rows in live groups: the means of up to 30 stretches of steps, each at its middle."""
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


def allocation(run: RunLog) -> Allocation:
    """Rollouts by label over the epochs, in up to 60 columns; an epoch without rollouts has shares 0.

    Where a task knows no labels, prompts are told apart by their success at the first visit; where it knows more than
    MAX_LABELS, those of the fewest prompts share a row, the last.
    """
    prompt_labels = run.labels if len(set(run.labels)) > 1 else success_labels(run)
    counts = Counter(prompt_labels)
    labels = sorted(counts, key=by_number)
    if len(labels) > MAX_LABELS:
        most = {label for label, _ in counts.most_common(MAX_LABELS - 1)}
        labels = [*(label for label in labels if label in most), f"{len(labels) - len(most):,} other kinds"]
    row_of_label = {label: i for i, label in enumerate(labels)}
    row_of_prompt = np.array([row_of_label.get(label, len(labels) - 1) for label in prompt_labels])
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


def success_labels(run: RunLog) -> list[str]:
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


def by_number(label: str) -> tuple:
    """Sorts "length 8-12" before "length 13-18", and labels without a number last."""
    numbers = [int(number) for number in re.findall(r"[0-9]+", label)]
    return (not numbers, numbers, label)


class EpochLog(NamedTuple):
    """An epoch's U visits, and two posteriors of a prompt's success before it: alpha and beta."""

    number: int
    held: np.ndarray  # [2, U] float64, under the configured prior, which is what the state keeps
    fitted: np.ndarray  # [2, U] float64, under the prior fitted to the population
    population: np.ndarray  # [2, M] float64, the same of all prompts, or of some: those that `mechanism.spaced` takes
    prompt_ids: np.ndarray  # [U] int, of the visits in order
    rollouts: np.ndarray  # [U] int
    correct: np.ndarray  # [U] int
    evidence: np.ndarray  # [U] int, rollouts but those whose verification timed out or failed
    spent: np.ndarray  # [U] int, rollouts of the run at the end of the visit's step
    after: np.ndarray  # [2, U] float64, the prompt's posterior then, under the configured prior


@jax.jit
def _fitted_prior(alpha: jax.Array, beta: jax.Array, prior: tuple[float, float]) -> tuple[jax.Array, jax.Array]:
    return fitted_prior(alpha - prior[0], beta - prior[1], prior)


def epochs(run: RunLog) -> Iterator[EpochLog]:
    """The epochs that drew anything, in order. Each costs its visits, and a few thousand prompts that stand for all.

    Raises ValueError where the config does not say what the posterior follows from.
    """
    settings, number = run.config["allocator"], len(run.labels)
    if missing := [name for name in ("prior", "discount") if settings.get(name) is None]:
        raise ValueError(
            f"{run.path / 'config.json'}: no allocator.{' or '.join(missing)}: written by another version?"
        )
    prior = np.array(settings["prior"], float)[:, None]
    # evidence at a prompt's last visit, and when that was
    seen, seen_at, spent = run.known.copy(), np.zeros(number, int), 0

    def held(which) -> np.ndarray:
        return prior + seen[:, which] * kept(run, spent - seen_at[which])

    def fitted(posterior: np.ndarray, fit: np.ndarray) -> np.ndarray:  # in float32, as the allocator does it
        return (np.maximum(posterior.astype(np.float32) - prior.astype(np.float32), 0) + fit).astype(float)

    for epoch, rows in groupby(run.steps, key=itemgetter("epoch")):
        rows = [
            (np.array(row["prompt_ids"], int), *(np.array(row.get(key, row["num_rollouts"]), int) for key in _COUNTS),
             row["spent"])
            for row in rows
        ]  # fmt: skip
        before = held(np.concatenate([ids for ids, *_ in rows]))
        sample = held(slice(None, None, -(-number // FIT_SAMPLE))).astype(np.float32)
        fit = np.array(_fitted_prior(*sample, tuple(settings["prior"])), np.float32)[:, None]
        population = fitted(held(spaced(number)), fit)
        columns = []
        for ids, rollouts, correct, evidence, spent in rows:
            seen[:, ids] = seen[:, ids] * kept(run, spent - seen_at[ids]) + [correct, evidence - correct]
            seen_at[ids] = spent  # a prompt has one visit a step
            columns.append((ids, rollouts, correct, evidence, np.full(len(ids), spent), prior + seen[:, ids]))
        visits = (np.concatenate(each, axis=-1) for each in zip(*columns, strict=True))
        yield EpochLog(epoch, before, fitted(before, fit), population, *visits)


def kept(run: RunLog, rollouts: np.ndarray) -> np.ndarray:
    """Share of the evidence that is left after so many more rollouts of the run: see `retention` in posterior.py."""
    return run.config["allocator"]["discount"] ** (rollouts / (ROLLOUTS_PER_PASS * len(run.labels)))


class Visit(NamedTuple):
    """Rollouts of a prompt in one step, and two posteriors Beta(alpha, beta) of its success.

    expected: what the epoch was allocated by, for `cero` under the prior fitted to the population. after: these
    rollouts counted, under the configured prior, which is what the state keeps.
    """

    epoch: int
    spent: int  # rollouts of the run, these included
    rollouts: int
    correct: int
    unjudged: int  # rollouts that were charged and are no evidence
    expected: tuple[float, float]
    after: tuple[float, float]


def replay(run: RunLog, prompts: Collection[int] | None = None) -> tuple[list[list[Visit]], np.ndarray]:
    """The visits of each prompt, and alpha, beta at the end: [2, N] float64. Raises what `epochs` raises.

    prompts: those whose visits are wanted, the others have none; None: all.
    """
    visits: list[list[Visit]] = [[] for _ in run.labels]
    wanted = np.full(len(visits), prompts is None)
    wanted[list(prompts or ())] = True
    prior = np.array(run.config["allocator"]["prior"], float)[:, None]
    after, spent = prior + run.known, np.zeros(len(visits), int)  # a prompt's last visit
    for epoch in epochs(run):
        expected = epoch.fitted if run.config["allocator"]["name"] == "cero" else epoch.held
        unjudged = epoch.rollouts - epoch.evidence
        some = wanted[epoch.prompt_ids]
        counts = np.stack([epoch.spent, epoch.rollouts, epoch.correct, unjudged], axis=1)[some].tolist()
        pairs = expected.T[some].tolist(), epoch.after.T[some].tolist()
        for prompt, numbers, *pair in zip(epoch.prompt_ids[some].tolist(), counts, *pairs, strict=True):
            visits[prompt].append(Visit(epoch.number, *numbers, *map(tuple, pair)))
        after[:, epoch.prompt_ids], spent[epoch.prompt_ids] = epoch.after, epoch.spent
    return visits, prior + (after - prior) * kept(run, run.steps[-1]["spent"] - spent)


def read_samples(
    run: RunLog, prompts: Collection[int] | None = None, most: int | None = None
) -> dict[int, deque[dict[str, Any]]]:
    """The completions kept of each training prompt, in order; none where the run wrote none.

    prompts: those whose completions are wanted; None: all. most: the latest so many of each.
    """
    samples: dict[int, deque[dict[str, Any]]] = {}
    for sample in _whole_rows(run.path / "samples.jsonl"):
        if sample["kind"] == "train" and (prompts is None or sample["prompt_id"] in prompts):
            samples.setdefault(sample["prompt_id"], deque(maxlen=most)).append(sample)
    return samples


def read_timings(run: RunLog) -> list[dict[str, Any]]:
    """The rows of timings.jsonl, in order, seconds by name; none where the run wrote none."""
    return list(_whole_rows(run.path / "timings.jsonl"))


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file that a run may do without, and may be writing to."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a running run
                continue
            if isinstance(row, dict) and "kind" in row:
                yield row


def prompt_history(run: RunLog, prompt: int, max_samples: int = 4) -> str:
    """A prompt's history for a terminal. Raises ValueError where there is no such prompt."""
    if not 0 <= prompt < len(run.labels):
        raise ValueError(f"{run.path}: no prompt {prompt}: its ids are 0 to {len(run.labels) - 1}")
    visits, samples = replay(run, [prompt])[0][prompt], read_samples(run, [prompt], max_samples).get(prompt, ())
    total, right = sum(v.rollouts for v in visits), sum(v.correct for v in visits)
    lines = [
        f"prompt {prompt} ({run.labels[prompt]}): {total} rollouts in {len(visits)} visits, {right} right",
        f"question: {run.questions[prompt]}" if run.questions else "",
        f"gold answer: {run.answers[prompt]}" if run.answers else "",
        f"{'epoch':>6} {'spent':>10} {'rollouts':>9} {'right':>6} {'expected':>9} {'posterior after':>16}",
    ]
    for v in visits:
        late = f"  {v.unjudged} not judged" if v.unjudged else ""
        lines.append(
            f"{v.epoch:>6} {v.spent:>10,} {v.rollouts:>9} {v.correct:>6} {mean(v.expected):>9.2f} "
            f"{mean(v.after):>8.2f} ± {deviation(v.after):.2f}{late}"
        )
    for sample in samples:
        lines.append(f"--- after {sample['spent']:,} rollouts, {sample['status']}, {sample['length']} tokens")
        lines.append(sample["completion"])
    return printable("\n".join(line for line in lines if line))


def mean(posterior: tuple[float, float]) -> float:
    """Of Beta(alpha, beta)."""
    return posterior[0] / (posterior[0] + posterior[1])


def deviation(posterior: tuple[float, float]) -> float:
    """Standard deviation of Beta(alpha, beta)."""
    total = posterior[0] + posterior[1]
    return (posterior[0] * posterior[1] / (total**2 * (total + 1))) ** 0.5
