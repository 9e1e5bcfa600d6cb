"""What shows that a run goes wrong, from step to step: what is said of it, and when the run saves and stops."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cero_jax.config import Config
from cero_jax.learner import Batch
from cero_jax.rewards import ERROR, NO_ANSWER, STATUSES, TIMED_OUT, TOO_LONG, UNJUDGED, WRONG
from cero_jax.rollout import ScoredStep, step_samples
from cero_jax.terminal import one_line

FIRST_ROLLOUTS = 200  # without a success, after which that is said; then at each doubling
FIRST_STEPS = 20  # optimiser steps before one may be called a spike
SPIKE = 8  # mean deviations
LEAST_DEVIATION = 1e-3  # of a loss or a norm of gradients: what lies nearer to the mean is no spike
MEMORY = 50  # optimiser steps that the usual figures are taken over

ADVICE = {  # by what most rollouts came to
    TOO_LONG: "raise sampler.max_completion_tokens, or ask for shorter answers",
    NO_ANSWER: "does the prompt ask for the form that the verifier reads?",
    WRONG: "is this the verifier for these gold answers, and are the prompts within the model's reach?",
    TIMED_OUT: "raise the verifier's time limit",
    ERROR: "mend the verifier",
}
BROKEN = "if it was better before, the policy may be broken: lower learner.learning_rate"


class Health(NamedTuple):
    """What a run remembers of its troubles; plain values, kept in its cursor."""

    since_right: int = 0  # rollouts since the last success
    ever_right: bool = False
    status: dict[str, int] = {}  # of those rollouts  # noqa: RUF012 (never changed in place)
    failed: int = 0  # rollouts of the run that the verifier failed on
    unjudged_steps: int = 0  # in a row, of which the verifier was asked and said nothing
    skipped_steps: int = 0  # optimiser steps in a row that were left out, their gradient being no number
    usual: dict[str, list[float]] = {}  # of a figure: its mean, its mean deviation, steps seen  # noqa: RUF012


def observe(
    health: Health, scored: ScoredStep, metrics: dict[str, Any], answers: Sequence[str]
) -> tuple[Health, dict, list[str]]:
    """Take in a step: its rollouts, and what its metrics say of the optimiser step, if there was one.

    answers: [N] gold answers, to show one. Returns what is remembered now, what the metrics are to say beside, and what
    a person is to be told.
    """
    after, told = _judged(health, scored, answers)
    if "skipped_steps" in metrics:
        after = after._replace(skipped_steps=health.skipped_steps + 1)
        told.append(
            f"the gradient is not a number: the step is left out, {after.skipped_steps} in a row; the policy and its "
            "optimiser stay as they were"
        )
        return after, {"skipped_steps": after.skipped_steps}, told
    if "loss" not in metrics:
        return after, {}, told
    spikes, usual = {}, dict(health.usual)
    for name in ("loss", "grad_norm"):
        seen = usual.get(name, [metrics[name], 0.0, 0])
        if (size := deviations(seen, metrics[name])) > SPIKE:
            spikes[name] = size
            told.append(f"{name} {metrics[name]:.4g} is a spike: usual are {seen[0]:.4g} ± {seen[1]:.2g}")
        usual[name] = followed(seen, metrics[name])
    return after._replace(skipped_steps=0, usual=usual), {"spike": spikes} if spikes else {}, told


def _judged(health: Health, scored: ScoredStep, answers: Sequence[str]) -> tuple[Health, list[str]]:
    """The health after a step's verdicts, and what is to be told of them."""
    drawn = scored.plan.row_mask
    status = Counter(each.status for each in scored.verdicts if each.status)
    failed, asked = sum(status[each] for each in UNJUDGED), int((drawn & ~scored.truncated).sum())
    told = []
    if status[ERROR] and not health.failed:
        row = next(row for row, each in enumerate(scored.verdicts) if each.status == ERROR)
        told.append(
            f"the verifier failed on {status[ERROR]} of {int(drawn.sum())} rollouts, first on prompt "
            f"{scored.plan.prompt_ids[row]}: {one_line(scored.verdicts[row].extracted)}. They are charged and no "
            "evidence, and counted under status in the metrics from here on"
        )
    right = bool(scored.num_correct.any())
    after = health._replace(
        since_right=0 if right else health.since_right + int(drawn.sum()),
        ever_right=health.ever_right or right,
        status={} if right else {name: health.status.get(name, 0) + status[name] for name in STATUSES},
        failed=health.failed + status[ERROR],
        unjudged_steps=health.unjudged_steps + (asked > 0) if failed == asked else 0,  # all were cut: nothing is said
    )
    if _doublings(after.since_right) > _doublings(health.since_right):
        told.append(
            nothing_right(after, [each | {"gold": answers[each["prompt_id"]]} for each in step_samples(scored)])
        )
    return after, told


def _doublings(rollouts: int) -> int:
    return (rollouts // FIRST_ROLLOUTS).bit_length()


def nothing_right(health: Health, samples: list[dict[str, Any]]) -> str:
    """That nothing was right of late: what came instead, what to do, and a sample of it, of these, to read."""
    found = {name: number for name, number in health.status.items() if number}
    most = max(found, key=lambda name: found[name])
    counts = ", ".join(f"{number} {name}" for name, number in found.items())
    since = "since then" if health.ever_right else "the first of the run"
    advice = ADVICE.get(most, "does success_threshold fit the verifier's scale?")
    lines = [
        f"nothing was right in {health.since_right:,} rollouts, {since} ({counts}): {advice}"
        + (f"; {BROKEN}" if health.ever_right else "")
    ]
    for each in [each for each in samples if each["status"] == most][:1]:
        names = "completion", "extracted", "gold"
        texts = ", ".join(f"{name} {one_line(repr(each[name]), 160)}" for name in names)
        lines.append(f"  for example prompt {each['prompt_id']}, {most}: {texts}")
    return "\n".join(lines)


def at_the_end(health: Health, held: Batch | None) -> list[str]:
    """What is to be told of a run whose budget is spent. held: the live groups that dynamic sampling holds."""
    told = []
    if health.since_right >= FIRST_ROLLOUTS or (not health.ever_right and health.since_right):
        told.append(nothing_right(health, []))
    if held is not None and (rows := int(held.row_mask.sum())):
        told.append(f"{rows} rollouts of live groups are left over: they filled no optimiser step")
    return told


def deviations(seen: list[float], value: float) -> float:
    """How far a value lies from its usual mean, in mean deviations; 0 while too few steps were seen to say."""
    mean, deviation, steps = seen
    return abs(value - mean) / max(deviation, LEAST_DEVIATION) if steps >= FIRST_STEPS else 0.0


def followed(seen: list[float], value: float) -> list[float]:
    """The usual mean and mean deviation, after one more step: running means, over about MEMORY steps.

    A spike counts as the largest value that is none, so that one does not hide the next.
    """
    mean, deviation, steps = seen
    share = 1 / min(steps + 1, MEMORY)
    far = value - mean
    if steps >= FIRST_STEPS:
        most = SPIKE * max(deviation, LEAST_DEVIATION)
        far = float(np.clip(far, -most, most))
    return [mean + share * far, deviation + share * (abs(far) - deviation), steps + 1]


def trouble(health: Health, config: Config) -> str:
    """Why the run has to save and stop; "" where it need not."""
    if health.skipped_steps >= config.learner.max_skipped_steps:
        return (
            f"the gradient was not a number {health.skipped_steps} times in a row (learner.max_skipped_steps): lower "
            "learner.learning_rate or learner.max_grad_norm in a run of its own (--work-dir), or go on from an older "
            "checkpoint by moving the newest in checkpoints/ away; the same command tries again"
        )
    if health.unjudged_steps >= config.max_unjudged_steps:
        return (
            f"the verifier judged no rollout of {health.unjudged_steps} steps in a row (max_unjudged_steps): mend it, "
            "and the same command goes on"
        )
    return ""


def tried_again(health: Health, config: Config) -> Health:
    """Of a run that is started again: what made it stop is counted anew."""
    return health._replace(skipped_steps=0, unjudged_steps=0) if trouble(health, config) else health
