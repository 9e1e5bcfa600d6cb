"""Held-out accuracy of a policy: the mean reward over several completions a prompt. Not charged to the budget."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cero_jax.data import Prompts, Task
from cero_jax.model import Params
from cero_jax.sampler import EVAL_STEP, Rollouts, Sampler


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


class Evaluation(NamedTuple):
    """Accuracy, and where it comes from."""

    accuracy: float  # mean over prompts and samples
    accuracy_by_label: dict[str, float]
    example: dict  # one completion, for a person to read: question, completion, answer, reward


def decode(task: Task, rollouts: Rollouts) -> list[str]:
    """Text of each row; padding rows give the empty string. Reads the tokens from the device: a verifier needs text."""
    tokens, lengths = np.asarray(rollouts.tokens), np.asarray(rollouts.lengths)
    return [task.tokenizer.decode(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)]


def verify(
    task: Task, prompts: Prompts, prompt_ids: np.ndarray, rollouts: Rollouts, row_mask: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """Text and reward of each row: [R] float32, 0 for padding and for a completion that was cut before its end.

    Raises ValueError where the verifier gives a reward that is not finite.
    """
    completions = decode(task, rollouts)
    reward = np.zeros(len(completions), np.float32)
    for row in np.flatnonzero(row_mask & ~np.asarray(rollouts.truncated)):
        prompt = prompt_ids[row]
        reward[row] = task.verify(prompts.questions[prompt], completions[row], prompts.answers[prompt])
        if not np.isfinite(reward[row]):
            raise ValueError(f"the verifier gave {reward[row]} to prompt {prompt}: a reward must be finite")
    return completions, reward


def evaluate(sample: Sampler, params: Params, task: Task, config: EvaluationConfig, seed: int) -> Evaluation:
    """Draw `samples` completions of each held-out prompt, `rows` at a time, and verify them.

    The keys depend on the seed, the prompt and the sample alone: two evaluations differ by their policies only.
    """
    prompts, samples, num_rows = task.heldout, config.samples, config.rows
    num_prompts = len(prompts.questions)
    ids = np.repeat(np.arange(num_prompts, dtype=np.int32), samples)
    index = np.tile(np.arange(samples, dtype=np.int32), num_prompts)
    reward = np.zeros(len(ids), np.float32)
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
        texts, verified = verify(task, prompts, row_ids, rollouts, batch["row_mask"])
        reward[start : start + used] = verified[:used]
        if start == 0:
            asked = {"question": prompts.questions[0], "completion": texts[0], "answer": prompts.answers[0]}
            example = asked | {"reward": float(reward[0])}
    mean, labels = reward.reshape(num_prompts, samples).mean(axis=1), np.array(prompts.labels)
    by_label = {str(label): float(mean[labels == label].mean()) for label in sorted(set(prompts.labels))}
    return Evaluation(float(mean.mean()), by_label, example)
