"""Held-out accuracy of a policy: avg@k and pass@k over several completions a prompt. Not charged to the budget.

python -m cero_jax.evaluate RUN [--data FILE ...] [--samples 16] measures the latest checkpoint of a run.
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cero_jax.data import Prompts, Task
from cero_jax.model import Params
from cero_jax.rewards import STATUSES, TOO_LONG, Verdict, verdict
from cero_jax.rewards.pool import Pool
from cero_jax.sampler import EVAL_STEP, Rollouts, Sampler
from cero_jax.statistics import bootstrap_interval, pass_at_k


@dataclass(frozen=True)
class EvaluationConfig:
    """When and how held-out accuracy is measured."""

    every_rollouts: int = 800
    """Rollouts spent between two evaluations; there is one at the start and one at the end."""
    samples: int = 4
    """Completions a held-out prompt; accuracy is their mean reward."""
    rows: int = 256
    """Completions drawn at once."""

    def __post_init__(self):
        if min(self.every_rollouts, self.samples, self.rows) < 1:
            raise ValueError(
                f"evaluation: every_rollouts={self.every_rollouts}, samples={self.samples} and rows={self.rows} must "
                "be at least 1"
            )


class Score(NamedTuple):
    """What a policy does on one data set, k = samples a prompt."""

    prompts: int
    accuracy: float  # avg@k: the mean reward over prompts and samples
    low: float  # of its 95 % interval, a bootstrap over prompts
    high: float
    pass_at: dict[str, float]  # k in powers of two: probability that one of k samples is a success
    status: dict[str, int]  # completions of each status


class Evaluation(NamedTuple):
    """Accuracy, and where it comes from."""

    accuracy: float  # mean over prompts and samples
    accuracy_by_label: dict[str, float]
    scores: dict[str, Score]  # "all", and each label (data set) where there are several
    example: dict  # one completion, for a person to read: question, completion, answer, reward
    samples: list[dict[str, Any]]  # every completion, with what was made of it

    def figures(self) -> dict[str, Any]:
        """What a metrics file takes: all but the samples, in plain values."""
        scores = {name: score._asdict() for name, score in self.scores.items()}
        return {key: value for key, value in self._asdict().items() if key != "samples"} | {"scores": scores}


class Verified(NamedTuple):
    """R rows, read and judged."""

    completions: list[str]  # [R] text, "" for padding
    verdicts: list[Verdict]  # [R]; reward 0 and status "" for padding
    reward: np.ndarray  # [R] float32


PADDING = Verdict(0.0, "")


def verify(task: Task, prompts: Prompts, prompt_ids: np.ndarray, rollouts: Rollouts, row_mask: np.ndarray) -> Verified:
    """Read and judge each row. One that was cut before its end is "too long", unread; padding is not judged.

    Raises ValueError where a verifier in this process gives a reward that is not finite (in a `Pool`: an error).
    """
    completions = [
        task.tokenizer.decode(tokens[:length].tolist()) if real else ""
        for tokens, length, real in zip(rollouts.tokens, rollouts.lengths, row_mask, strict=True)
    ]
    cut = np.asarray(rollouts.truncated)
    verdicts = [Verdict(0.0, TOO_LONG) if real else PADDING for real in row_mask]
    rows = np.flatnonzero(row_mask & ~cut).tolist()
    asked = [(prompts.questions[i], completions[row], prompts.answers[i]) for row in rows for i in [prompt_ids[row]]]
    found = (
        task.verify.many(asked) if isinstance(task.verify, Pool) else [verdict(task.verify(*each)) for each in asked]
    )
    for row, each in zip(rows, found, strict=True):
        if not np.isfinite(each.reward):
            raise ValueError(f"the verifier gave {each.reward} to prompt {prompt_ids[row]}: a reward must be finite")
        verdicts[row] = each
    return Verified(completions, verdicts, np.array([each.reward for each in verdicts], np.float32))


def draw_verified(
    sample: Sampler, params: Params, seed: int, steps: np.ndarray, batch: dict[str, np.ndarray], task: Task
) -> tuple[Rollouts, Verified]:
    """Rollouts of training prompts, each verified as it ends, in a thread, while the others are still drawn.

    seed, steps [R], batch: as the sampler takes them. Raises as `verify` does.
    """
    parts = []
    with ThreadPoolExecutor(1) as judge:

        def begin(rows: np.ndarray, rollouts: Rollouts) -> None:
            mask = np.isin(np.arange(len(batch["row_mask"])), rows)
            parts.append((rows, judge.submit(verify, task, task.train, batch["prompt_ids"], rollouts, mask)))

        rollouts = sample(params, np.uint32(seed), steps, batch, begin)
        num_rows = len(batch["row_mask"])
        whole = Verified([""] * num_rows, [PADDING] * num_rows, np.zeros(num_rows, np.float32))
        for rows, part in parts:
            found = part.result()
            for row in rows.tolist():
                whole.completions[row], whole.verdicts[row] = found.completions[row], found.verdicts[row]
                whole.reward[row] = found.reward[row]
    return rollouts, whole


def evaluate(
    sample: Sampler, params: Params, task: Task, config: EvaluationConfig, seed: int, success_threshold: float = 0.5
) -> Evaluation:
    """Draw `samples` completions of each held-out prompt, `rows` at a time, and verify them while the next are drawn.

    The keys depend on the seed, the prompt and the sample alone: two evaluations differ by their policies only.
    """
    prompts, num_rows = task.heldout, config.rows
    num_prompts = len(prompts.questions)
    ids = np.repeat(np.arange(num_prompts, dtype=np.int32), config.samples)
    index = np.tile(np.arange(config.samples, dtype=np.int32), num_prompts)
    judged = []
    with ThreadPoolExecutor(1) as judge:
        for start in range(0, len(ids), num_rows):
            used = min(num_rows, len(ids) - start)
            row_ids = np.pad(ids[start : start + used], (0, num_rows - used))
            # Each row brings its own prompt: samples a prompt need not divide the rows.
            batch = {
                "prompt_tokens": prompts.tokens[row_ids],
                "prompt_lengths": prompts.lengths[row_ids],
                "prompt_of_row": np.arange(num_rows, dtype=np.int32),
                "row_mask": np.arange(num_rows) < used,
                "prompt_ids": row_ids,
                "rollout_index": np.pad(index[start : start + used], (0, num_rows - used)),
            }
            rollouts = sample(params, np.uint32(seed), np.uint32(EVAL_STEP), batch)
            judged.append(judge.submit(_judged, task, batch, rollouts))
        samples = [each for batch in judged for each in batch.result()]
    reward = np.array([each["reward"] for each in samples], np.float32).reshape(num_prompts, config.samples)
    labels, scores = np.array(prompts.labels), {"all": np.full(num_prompts, True)}
    if len(names := sorted(set(prompts.labels))) > 1:
        scores |= {str(name): labels == name for name in names}
    mean = reward.mean(axis=1)
    return Evaluation(
        accuracy=float(mean.mean()),
        accuracy_by_label={str(name): float(mean[labels == name].mean()) for name in names},
        scores={name: _score(samples, reward, chosen, success_threshold) for name, chosen in scores.items()},
        example={key: samples[0][key] for key in ("question", "completion", "answer", "reward")},
        samples=samples,
    )


def _judged(task: Task, batch: dict[str, np.ndarray], rollouts: Rollouts) -> list[dict[str, Any]]:
    """The real rows of a batch, each as a sample to read."""
    prompts, ids = task.heldout, batch["prompt_ids"]
    judged, lengths = verify(task, prompts, ids, rollouts, batch["row_mask"]), np.asarray(rollouts.lengths)
    return [
        {
            "prompt_id": int(ids[row]),
            "sample": int(batch["rollout_index"][row]),
            "label": prompts.labels[ids[row]],
            "question": prompts.questions[ids[row]],
            "answer": prompts.answers[ids[row]],
            "completion": judged.completions[row],
            "extracted": judged.verdicts[row].extracted,
            "status": judged.verdicts[row].status,
            "reward": float(judged.reward[row]),
            "length": int(lengths[row]),
        }
        for row in np.flatnonzero(batch["row_mask"])
    ]


def _score(samples: list[dict[str, Any]], reward: np.ndarray, chosen: np.ndarray, success_threshold: float) -> Score:
    """reward: [N, k]; chosen: [N] bool, the prompts of this data set."""
    reward, mean = reward[chosen], reward[chosen].mean(axis=1)
    number, correct = reward.shape[1], (reward >= success_threshold).sum(axis=1)
    status = Counter(each["status"] for each in samples if chosen[each["prompt_id"]])
    powers = [2**i for i in range(number.bit_length())]  # 1, 2, 4 .. number
    return Score(
        len(reward),
        float(mean.mean()),
        *bootstrap_interval(mean),
        pass_at={str(k): float(pass_at_k(correct, number, k).mean()) for k in powers},
        status={name: status[name] for name in STATUSES},
    )


def table(scores: dict[str, Score]) -> str:
    """A line a data set: avg@k with its interval, pass@k, and the share of each status that is not right or wrong."""
    lines = []
    for name, score in scores.items():
        passes = "  ".join(f"pass@{k} {100 * share:5.1f}" for k, share in score.pass_at.items() if k != "1")
        total = sum(score.status.values())
        rest = ", ".join(f"{100 * n / total:.1f} % {s}" for s, n in score.status.items() if n and s not in STATUSES[:2])
        lines.append(
            f"{name:<20} {score.prompts:>6} prompts  avg@{total // score.prompts} {100 * score.accuracy:5.1f} "
            f"({100 * score.low:.1f} to {100 * score.high:.1f})  {passes}  {rest}".rstrip()
        )
    return "\n".join(lines)


def write_samples(path: Path | str, samples: list[dict[str, Any]]) -> None:
    """A JSON object a line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in samples)


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with one line where something is wrong."""
    from cero_jax.run import restore_policy  # which needs EvaluationConfig

    parser = argparse.ArgumentParser(prog="python -m cero_jax.evaluate", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's directory, e.g. runs/gsm8k-cero-0")
    add("--data", nargs="+", metavar="FILE", help="held-out files or globs instead of the run's own, each a data set")
    for name in ("question-field", "answer-field", "template", "verifier"):
        add(f"--{name}", help=f"task.{name.replace('-', '_')} for these files (default: the run's)")
    add("--samples", type=int, default=4, help="completions a prompt, k (default: %(default)s)")
    add("--rows", type=int, help="completions drawn at once (default: the run's)")
    add("--temperature", type=float, help="default: the run's; 0 is greedy")
    add("--max-completion-tokens", type=int, help="default: the run's")
    add("--seed", type=int, default=0)
    add("--output", help="the samples, a JSON object a line (default: RUN/samples-SPENT.jsonl)")
    given = vars(parser.parse_args(args))
    task_changes = {key: given[key] for key in ("question_field", "answer_field", "template", "verifier") if given[key]}
    if given["data"]:
        task_changes |= {
            "path": given["data"][0],
            "heldout_paths": tuple(given["data"]),
        }  # what it trained on is not read
    sampler_changes = {key: given[key] for key in ("temperature", "max_completion_tokens") if given[key] is not None}
    try:
        policy = restore_policy(Path(given["run"]), task_changes, sampler_changes)
        settings = dataclasses.replace(
            policy.config.evaluation, samples=given["samples"], rows=given["rows"] or policy.config.evaluation.rows
        )
        result = evaluate(
            policy.sample, policy.params, policy.task, settings, given["seed"], policy.config.success_threshold
        )
        output = given["output"] or Path(given["run"]) / f"samples-{policy.spent}.jsonl"
        write_samples(output, result.samples)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table(result.scores))
    print(f"{policy.spent:,} rollouts spent; {len(result.samples):,} samples to read in {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
