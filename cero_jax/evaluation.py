"""Held-out accuracy of a policy: avg@k and pass@k over several completions a prompt. Not charged to the budget."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cero_jax import hosts
from cero_jax.data import Prompts, Task
from cero_jax.model import Params
from cero_jax.rewards import RIGHT, STATUSES, WRONG, Verdict
from cero_jax.sampler import EVAL_STEP, Rollouts, Sampler, SamplingBatch
from cero_jax.settings import check
from cero_jax.statistics import bootstrap_interval, pass_at_k
from cero_jax.terminal import printable
from cero_jax.verify import correctness, mean_parts, on_scale, own_rows, verify


@dataclass(frozen=True)
class EvaluationConfig:
    """When and how held-out accuracy is measured."""

    every_rollouts: int = 800
    """Rollouts spent between two evaluations; there is one at the start and one at the end."""
    samples: int = 4
    """Completions a held-out prompt; accuracy is their mean reward, of which the part `correct` alone counts."""
    keep_best: bool = False
    """Keep the checkpoint with the best accuracy beside the newest, and write its policy out at the end, too. Its
    accuracy is the largest of several and so too good: measure it on other prompts."""
    patience: int | None = None
    """Evaluations in a row without a better accuracy, after which the run ends with what is left of its budget; None:
    it spends all."""
    rows: int = 256
    """Completions drawn at once: of whole prompts, where they hold one's `samples`."""

    def __post_init__(self):
        check(self, every_rollouts=(1, 2**62), patience=(1, 2**62), samples=(1, 2**24), rows=(1, 2**24))


class Score(NamedTuple):
    """What a policy does on one data set, k = samples a prompt."""

    prompts: int
    accuracy: float  # avg@k: the mean reward over prompts and samples; its correctness, where rewards have parts
    low: float  # of its 95 % interval, a bootstrap over prompts
    high: float
    pass_at: dict[str, float]  # k in powers of two: probability that one of k samples is a success
    status: dict[str, int]  # completions of each status
    scale: tuple[float, float] = (0.0, 1.0)  # of the rewards: reaches to those that lie beyond

    def metrics(self) -> dict[str, Any]:
        """What the metrics file takes: the scale is said where it is not 0 to 1."""
        return {name: value for name, value in self._asdict().items() if name != "scale" or value != (0.0, 1.0)}


class Evaluation(NamedTuple):
    """Accuracy, and where it comes from."""

    accuracy: float  # mean over prompts and samples
    accuracy_by_label: dict[str, float]
    scores: dict[str, Score]  # "all", and each label (data set) where there are several
    example: dict  # one completion, for a person to read: question, completion, answer, reward
    samples: list[dict[str, Any]]  # every completion, with what was made of it
    rewards: dict[str, float]  # the mean of each part of the rewards; {} where they have none

    def metrics(self) -> dict[str, Any]:
        """What the metrics file takes: all but the samples, in plain values."""
        scores = {name: score.metrics() for name, score in self.scores.items()}
        left_out = {"samples"} if self.rewards else {"samples", "rewards"}
        return {key: value for key, value in self._asdict().items() if key not in left_out} | {"scores": scores}


def evaluate(
    sample: Sampler,
    params: Params,
    task: Task,
    config: EvaluationConfig,
    seed: int,
    success_threshold: float = 0.5,
    lowest_reward: float = 0.0,
) -> Evaluation:
    """Draw `samples` completions of each held-out prompt, `rows` at a time, and verify them while the next are drawn.

    The keys depend on the seed, the prompt and the sample alone: two evaluations differ by their policies only.

    Args:
      sample: the sampler.
      params: of the policy.
      task: whose held-out prompts are asked, and whose verifier judges.
      config: how many completions, how many at once.
      seed: of the draws.
      success_threshold: a reward of at least this counts as right in pass@k.
      lowest_reward: of the verifier's scale: of a completion that was cut or could not be judged, as in training.

    Raises:
      ValueError as `verify` does.
    """
    num_prompts = len(task.heldout.questions)
    with ThreadPoolExecutor(1) as judge:
        judged = []
        for batch in sampling_batches(task.heldout, config):
            rollouts = sample(params, np.uint32(seed), np.uint32(EVAL_STEP), batch)
            judged.append(judge.submit(_judged, task, batch, rollouts))
        found = hosts.each_has(lambda: [each for batch in judged for each in batch.result()])
    samples = _on_scale([_sample(task.heldout, *each) for part in found for each in part], lowest_reward)
    samples.sort(key=lambda each: (each["prompt_id"], each["sample"]))
    reward = np.array([each["reward"] for each in samples], np.float32).reshape(num_prompts, config.samples)
    scale = min(lowest_reward, float(reward.min())), max(1.0, success_threshold, float(reward.max()))
    labels, scores = np.array(task.heldout.labels), {"all": np.full(num_prompts, True)}
    if len(names := sorted(set(task.heldout.labels))) > 1:
        scores |= {str(name): labels == name for name in names}
    mean = reward.mean(axis=1)
    return Evaluation(
        accuracy=float(mean.mean()),
        accuracy_by_label={str(name): float(mean[labels == name].mean()) for name in names},
        scores={name: _score(samples, reward, chosen, success_threshold, scale) for name, chosen in scores.items()},
        example={key: samples[0][key] for key in ("question", "completion", "answer", "reward")},
        samples=samples,
        rewards=mean_parts(each.get("rewards", {}) for each in samples),
    )


def sampling_batches(prompts: Prompts, config: EvaluationConfig) -> Iterator[SamplingBatch]:
    """Every sample of every prompt, `rows` rows at a time: the longest prompts first, and all of a prompt's together.

    So a prompt is read once for its samples, unless there are fewer rows than samples, and those that are drawn at once
    are of about a length. All batches have one shape.
    """
    num_visits = config.rows // config.samples
    at_once = num_visits * config.samples or config.rows
    order = np.argsort(-prompts.lengths, kind="stable")
    ids = np.repeat(order, config.samples).astype(np.int32)
    index = np.tile(np.arange(config.samples, dtype=np.int32), len(order))
    for start in range(0, len(ids), at_once):
        row_ids, padding = ids[start : start + at_once], config.rows - len(ids[start : start + at_once])
        here, prompt_of_row = np.unique(row_ids, return_inverse=True)
        visits = np.pad(here, (0, (num_visits or 2) - len(here)), mode="edge")
        tokens, lengths = prompts.rows(visits, prompts.longest)
        yield SamplingBatch(
            prompt_tokens=tokens,
            prompt_lengths=lengths,
            prompt_of_row=np.pad(prompt_of_row, (0, padding)).astype(np.int32),
            row_mask=np.arange(config.rows) < len(row_ids),
            prompt_ids=np.pad(row_ids, (0, padding)),
            rollout_index=np.pad(index[start : start + at_once], (0, padding)),
        )


def _judged(task: Task, batch: SamplingBatch, rollouts: Rollouts) -> list[tuple[int, int, str, Verdict, int]]:
    """The rows of a batch that this process judges: prompt id, sample, completion, verdict, length."""
    ids, mine = batch.prompt_ids, own_rows(batch.row_mask)
    completions, verdicts, reward = verify(task, task.heldout, ids, rollouts, mine)
    right = correctness(reward, verdicts)
    return [
        (
            int(ids[row]),
            int(batch.rollout_index[row]),
            completions[row],
            verdicts[row]._replace(reward=float(right[row])),
            int(rollouts.lengths[row]),
        )
        for row in np.flatnonzero(mine)
    ]


def _sample(prompts: Prompts, prompt_id: int, sample: int, completion: str, judged: Verdict, length: int) -> dict:
    """A completion with what was made of it, to read."""
    return {
        "prompt_id": prompt_id,
        "sample": sample,
        "label": prompts.labels[prompt_id],
        "question": prompts.questions[prompt_id],
        "answer": prompts.answers[prompt_id],
        "completion": completion,
        "extracted": judged.extracted,
        "status": judged.status,
        "reward": judged.reward,
        "length": length,
    } | ({"rewards": judged.parts} if judged.parts else {})


def _on_scale(samples: list[dict[str, Any]], lowest_reward: float) -> list[dict[str, Any]]:
    """The samples with the rewards that training would give them."""
    reward = np.array([each["reward"] for each in samples], np.float32)
    reward = on_scale(reward, [Verdict(each["reward"], each["status"]) for each in samples], lowest_reward)
    return [each | {"reward": float(value)} for each, value in zip(samples, reward, strict=True)]


def _score(
    samples: list[dict[str, Any]],
    reward: np.ndarray,
    chosen: np.ndarray,
    success_threshold: float,
    scale: tuple[float, float],
) -> Score:
    """reward: [N, k]; chosen: [N] bool, the prompts of this data set."""
    reward, mean = reward[chosen], reward[chosen].mean(axis=1)
    number, correct = reward.shape[1], (reward >= success_threshold).sum(axis=1)
    status = Counter(each["status"] for each in samples if chosen[each["prompt_id"]])
    powers = [2**i for i in range(number.bit_length())]  # 1, 2, 4 .. number
    return Score(
        len(reward),
        float(mean.mean()),
        *bootstrap_interval(mean, scale=scale),
        pass_at={str(k): float(pass_at_k(correct, number, k).mean()) for k in powers},
        status={name: status[name] for name in STATUSES},
        scale=scale,
    )


def scores_table(scores: dict[str, Score]) -> str:
    """A line a data set: avg@k with its interval, pass@k, and the share of each status that is not right or wrong.

    All in per cent, but avg@k is a reward where rewards lie outside 0 to 1.
    """
    percent = all(score.scale == (0, 1) for score in scores.values())
    mean = (lambda x: f"{100 * x:.1f}") if percent else (lambda x: f"{x:.4g}")
    lines = []
    for name, score in scores.items():
        passes = "  ".join(f"pass@{k} {100 * share:5.1f}" for k, share in score.pass_at.items() if k != "1")
        total = sum(score.status.values())
        rest = ", ".join(
            f"{100 * n / total:.1f} % {s}" for s, n in score.status.items() if n and s not in (RIGHT, WRONG)
        )
        name = printable(name)
        lines.append(
            f"{name:<20} {score.prompts:>6} prompts  avg@{total // score.prompts} {mean(score.accuracy):>5} "
            f"({mean(score.low)} to {mean(score.high)})  {passes}  {rest}".rstrip()
        )
    return "\n".join(lines)
