"""Rollouts read as text and judged by the task's verifier, in training while the rest are still being drawn."""

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from cero_jax import hosts
from cero_jax.data import Prompts, Task
from cero_jax.pace import Seconds
from cero_jax.rewards import CORRECT, ERROR, TIMED_OUT, TOO_LONG, UNJUDGED, Verdict, failed, guarded, verdict
from cero_jax.sampler import Rollouts, SamplingBatch

PADDING = Verdict(0.0, "")


class Verified(NamedTuple):
    """R rows, read and judged."""

    completions: list[str]  # [R] text, "" for padding
    verdicts: list[Verdict]  # [R]; reward 0 and status "" for padding
    reward: np.ndarray  # [R] float32, as the verifier gave it


def verify(task: Task, prompts: Prompts, prompt_ids: np.ndarray, rollouts: Rollouts, row_mask: np.ndarray) -> Verified:
    """Read and judge each row. One that was cut before its end is "too long", unread; padding is not judged.

    What a verifier does wrong is a verdict, "error".

    Args:
      task: whose tokenizer reads and whose verifier judges.
      prompts: those that the ids are of.
      prompt_ids: [R] int.
      rollouts: R of them.
      row_mask: [R] bool, False for padding.

    Raises:
      FloatingPointError where a row was drawn from a policy that is not a number.
      ValueError where the task has no verifier, or two.
    """
    _check_numbers(rollouts.log_probs[row_mask])
    completions = [
        task.tokenizer.decode(tokens[:length].tolist()) if real else ""
        for tokens, length, real in zip(rollouts.tokens, rollouts.lengths, row_mask, strict=True)
    ]
    cut = np.asarray(rollouts.truncated)
    verdicts = [Verdict(0.0, TOO_LONG) if real else PADDING for real in row_mask]
    rows = np.flatnonzero(row_mask & ~cut).tolist()
    asked = [(prompts.questions[i], completions[row], prompts.answers[i]) for row in rows for i in [prompt_ids[row]]]
    for row, found in zip(rows, judge(task, asked), strict=True):
        verdicts[row] = found
    return Verified(completions, verdicts, np.array([each.reward for each in verdicts], np.float32))


def own_rows(row_mask: np.ndarray) -> np.ndarray:
    """[R] bool: of these rows, those that are this process's to judge: every process judges its share."""
    if not hosts.several():
        return row_mask
    return row_mask & (np.arange(len(row_mask)) % jax.process_count() == jax.process_index())


def _check_numbers(log_probs: np.ndarray) -> None:
    """Raise FloatingPointError where a log-probability of a drawn row [n, T] is NaN or infinite."""
    bad = int((~np.isfinite(log_probs)).any(axis=1).sum())
    if bad:
        raise FloatingPointError(
            f"the policy is not a number: of {len(log_probs)} completions that were drawn, {bad} have a "
            "log-probability that is NaN or infinite. Its parameters are broken, or too large to compute with: give "
            "other weights or a lower learner.learning_rate; a run goes on from an older checkpoint once the newest in "
            "its checkpoints/ is moved away"
        )


def judge(task: Task, asked: Sequence[tuple[str, str, str]]) -> list[Verdict]:
    """The task's verdicts on (question, completion, answer) each: "error" where its verifier raises or gives no reward.

    Raises ValueError where the task has no verifier, or two.
    """
    one, many = task.verify, task.verify_many
    if one is not None and many is None:
        return [guarded(partial(one, *each)) for each in asked]
    if one is not None or many is None:
        raise ValueError("a task has either `verify` or `verify_many`: give one of them, and None for the other")
    try:
        found = list(many(asked))
        if len(found) != len(asked):
            raise ValueError(f"verify_many gave {len(found)} results for {len(asked)} completions")
    except Exception as error:
        return [failed(error)] * len(asked)
    return [guarded(partial(verdict, each)) for each in found]


def probe(task: Task) -> None:
    """Ask the task's verifier once, of the first prompt with its gold answer as the completion.

    Raises ValueError where that fails, before anything is drawn. A verifier that times out is only warned of: the first
    call may be slow.
    """
    which, prompts = ("training", task.train) if task.train.questions else ("held-out", task.heldout)
    question, answer = prompts.questions[0], prompts.answers[0]
    (found,) = judge(task, [(question, answer, answer)])
    if found.status == ERROR:
        raise ValueError(
            f"the verifier fails on {which} prompt 0, asked of its gold answer {answer[-60:]!r}: {found.extracted}: "
            "mend it, or the data"
        )
    if found.status == TIMED_OUT:
        _log.warning("the verifier timed out (%s) on its first call: raise its time limit if it goes on so",
                     found.extracted)  # fmt: skip


def is_judged(verdicts: Sequence[Verdict]) -> np.ndarray:
    """[R] bool: rows of which the verdict says something; not those that timed out or failed, nor padding."""
    return np.array([each.status not in ("", *UNJUDGED) for each in verdicts])


def correctness(reward: np.ndarray, verdicts: Sequence[Verdict]) -> np.ndarray:
    """[R] float32: of each row the part of its reward that says whether it is right; all of it where it has no parts.

    reward: [R] float32, as the verifier gave it.
    """
    return np.array([each.parts.get(CORRECT, r) for each, r in zip(verdicts, reward, strict=True)], np.float32)


def mean_parts(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each part over the rewards that have it; {} where none has parts."""
    values = defaultdict(list)
    for name, value in itertools.chain.from_iterable(each.items() for each in parts):
        values[name].append(value)
    return {name: float(np.mean(found)) for name, found in values.items()}


def on_scale(reward: np.ndarray, verdicts: Sequence[Verdict], lowest: float) -> np.ndarray:
    """[R] float32 rewards in which what was too long or not judged has the lowest of the scale.

    That is `lowest`, or the lowest reward of the other rows here where that is lower: a wrong answer is never worse
    than none. reward: [R] float32; padding keeps its 0.
    """
    failed = np.array([each.status in (TOO_LONG, *UNJUDGED) for each in verdicts])
    real = np.array([each.status != "" for each in verdicts])
    return np.where(failed, min([lowest, *reward[real & ~failed].tolist()]), reward).astype(np.float32)


_log = logging.getLogger("cero_jax")


class Verification:
    """The verification of a batch of training rollouts, in a thread of its own: it begins as the first of them end."""

    def __init__(self, task: Task, batch: SamplingBatch):
        self._task, self._batch = task, batch
        self._thread = ThreadPoolExecutor(1)
        self._parts: list[tuple[np.ndarray, Future[Verified]]] = []
        self._began = time.perf_counter()

    def on_end(self, rows: np.ndarray, rollouts: Rollouts) -> None:
        """Judge those of `rows` [n], which have ended, that are this process's; does not wait. The sampler calls it."""
        mask = own_rows(np.isin(np.arange(len(self._batch.row_mask)), rows))
        part = self._thread.submit(verify, self._task, self._task.train, self._batch.prompt_ids, rollouts, mask)
        self._parts.append((np.flatnonzero(mask), part))

    def result(self) -> tuple[Verified, Seconds]:
        """All rows, once the last is judged, and how long that took: called as the last of them is drawn.

        Raises as `verify` does.
        """
        drawn, num_rows = time.perf_counter(), len(self._batch.row_mask)
        whole = Verified([""] * num_rows, [PADDING] * num_rows, np.zeros(num_rows, np.float32))
        with self._thread:
            for row, completion, judged in itertools.chain(*hosts.each_has(self._judged)):
                whole.completions[row], whole.verdicts[row], whole.reward[row] = completion, judged, judged.reward
        return whole, Seconds(drawn - self._began, time.perf_counter() - drawn)

    def _judged(self) -> list[tuple[int, str, Verdict]]:
        """The rows that this process judges, once it has, each with its completion."""
        parts = [(rows.tolist(), part.result()) for rows, part in self._parts]
        return [(row, found.completions[row], found.verdicts[row]) for rows, found in parts for row in rows]
