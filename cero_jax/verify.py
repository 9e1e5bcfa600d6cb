"""Rollouts read as text and judged by the task's verifier, in training while the rest are still being drawn."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from cero_jax.data import Prompts, Task
from cero_jax.rewards import TOO_LONG, Verdict, VerifyMany, one_by_one, verdict
from cero_jax.sampler import Rollouts, SamplingBatch

PADDING = Verdict(0.0, "")


class Verified(NamedTuple):
    """R rows, read and judged."""

    completions: list[str]  # [R] text, "" for padding
    verdicts: list[Verdict]  # [R]; reward 0 and status "" for padding
    reward: np.ndarray  # [R] float32


def verify(task: Task, prompts: Prompts, prompt_ids: np.ndarray, rollouts: Rollouts, row_mask: np.ndarray) -> Verified:
    """Read and judge each row. One that was cut before its end is "too long", unread; padding is not judged.

    Args:
      task: whose tokenizer reads and whose verifier judges.
      prompts: those that the ids are of.
      prompt_ids: [R] int.
      rollouts: R of them.
      row_mask: [R] bool, False for padding.

    Raises:
      ValueError where the verifier gives anything but a finite reward or a Verdict, or the task has none or two.
    """
    completions = [
        task.tokenizer.decode(tokens[:length].tolist()) if real else ""
        for tokens, length, real in zip(rollouts.tokens, rollouts.lengths, row_mask, strict=True)
    ]
    cut = np.asarray(rollouts.truncated)
    verdicts = [Verdict(0.0, TOO_LONG) if real else PADDING for real in row_mask]
    rows = np.flatnonzero(row_mask & ~cut).tolist()
    asked = [(prompts.questions[i], completions[row], prompts.answers[i]) for row in rows for i in [prompt_ids[row]]]
    for row, found in zip(rows, _verify_many(task)(asked), strict=True):
        try:
            verdicts[row] = verdict(found)
        except ValueError as error:
            raise ValueError(f"the verifier on prompt {prompt_ids[row]}: {error}") from None
        if not np.isfinite(verdicts[row].reward):
            raise ValueError(
                f"the verifier gave {verdicts[row].reward} to prompt {prompt_ids[row]}: a reward must be finite"
            )
    return Verified(completions, verdicts, np.array([each.reward for each in verdicts], np.float32))


def _verify_many(task: Task) -> VerifyMany:
    """The task's verifier, of many completions. Raises ValueError where the task has none, or two."""
    if task.verify is not None and task.verify_many is None:
        return one_by_one(task.verify)
    if task.verify is None and task.verify_many is not None:
        return task.verify_many
    raise ValueError("a task has either `verify` or `verify_many`: give one of them, and None for the other")


class Verification:
    """The verification of a batch of training rollouts, in a thread of its own: it begins as the first of them end."""

    def __init__(self, task: Task, batch: SamplingBatch):
        self._task, self._batch = task, batch
        self._thread = ThreadPoolExecutor(1)
        self._parts: list[tuple[np.ndarray, Future[Verified]]] = []
        self._began = time.perf_counter()

    def on_end(self, rows: np.ndarray, rollouts: Rollouts) -> None:
        """Judge `rows` [n], which have ended; does not wait. What the sampler calls."""
        mask = np.isin(np.arange(len(self._batch.row_mask)), rows)
        part = self._thread.submit(verify, self._task, self._task.train, self._batch.prompt_ids, rollouts, mask)
        self._parts.append((rows, part))

    def result(self) -> tuple[Verified, float]:
        """All rows, once the last is judged, and the seconds since the drawing began. Raises as `verify` does."""
        num_rows = len(self._batch.row_mask)
        whole = Verified([""] * num_rows, [PADDING] * num_rows, np.zeros(num_rows, np.float32))
        with self._thread:
            for rows, part in self._parts:
                found = part.result()
                for row in rows.tolist():
                    whole.completions[row], whole.verdicts[row] = found.completions[row], found.verdicts[row]
                    whole.reward[row] = found.reward[row]
        return whole, time.perf_counter() - self._began
