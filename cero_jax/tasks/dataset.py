"""Question and answer from files: the rows of GSM8K, MATH, DAPO and AIME, and JSONL, CSV or Parquet of your own."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cero_jax import read_files
from cero_jax.data import Prompts, Task, encode_prompts
from cero_jax.huggingface import hub
from cero_jax.rewards import CORRECT, ERROR, RIGHT, TIMED_OUT, Verifier, VerifyMany, verdict
from cero_jax.rewards.choice import choice
from cero_jax.rewards.exact import exact
from cero_jax.rewards.final_number import final_number
from cero_jax.rewards.find import find
from cero_jax.rewards.formatted import formatted
from cero_jax.rewards.pool import Pool
from cero_jax.rewards.weighted import one_by_one, read_weights, weighted
from cero_jax.settings import check
from cero_jax.tokenizer import ByteTokenizer, Tokenizer

INLINE = {"final_number": final_number, "exact": exact, "choice": choice}  # cheap and linear: no process of their own
REWARDS = {"format": formatted}  # beside correctness
POOLED = {"math": "cero_jax.rewards.mathematics:mathematics"}

_STREAM = 3  # keeps this draw apart from other uses of the same seed


Render = Callable[[Sequence[list[dict[str, str]]]], list[str]]  # conversations, messages of role and content -> prompts


class Row(NamedTuple):
    source: str  # "file:row"
    messages: list[dict[str, str]]  # role and content; the question is the last
    answer: str
    label: str
    pass_rate: float = math.nan


@dataclass(frozen=True)
class Dataset:
    """Prompts and gold answers from files of rows."""

    path: str
    """The training file or a glob of files: JSONL, a JSON array, CSV or Parquet; or a name on the hub,
    hf:OWNER/NAME:CONFIGURATION/SPLIT. Empty: no training prompts, as for an evaluation, which reads the held-out files
    alone."""
    question_field: str = "question"
    """Field of the question, text or messages; "reward_model.ground_truth" looks inside, "problem|question" at both."""
    answer_field: str = "answer"
    """Field of the gold answer, in the same way."""
    pass_rate_field: str | None = None
    """Field of how often another model was right on the question, a share from 0 to 1, null where that is not known:
    `cero` begins with it (allocator.pass_rate_rollouts)."""
    template: str = "{question}"
    """The prompt; {question} stands for the question, any other text for itself."""
    system: str | None = None
    """Text that goes before every prompt: the system message under `chat`, else a paragraph of its own."""
    chat: bool = False
    """Render the prompt by the chat template of the model folder's tokenizer."""
    verifier: str = "final_number"
    """final_number ("#### 72" is read), exact, choice (a letter), math (math-verify), or a function of your own as
    module:function, (question, completion, answer) -> float."""
    rewards: str = "correct=1"
    """What a completion's reward adds up, by weight: correct is what `verifier` says, and alone moves the posterior and
    is the accuracy; format is 1 where the answer is marked and its tags are closed; module:function is your own.
    "correct=1, format=0.1, module:function=0.2"."""
    verifier_seconds: float = 3.0
    """Wall-clock limit of one answer (math and your own)."""
    verifier_memory_mb: int = 2048
    """Address space of a verifying process (math and your own)."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens; longer ones are dropped and counted."""
    heldout_paths: tuple[str, ...] = ()
    """Held-out files, globs or names on the hub, with the same fields, each a data set under its name; none holds rows
    of `path` out."""
    num_heldout: int = 256
    """Rows of `path` held out, drawn by the seed, where there is no held-out file."""

    def __post_init__(self):
        check(self, max_prompt_tokens=(1, 2**24), verifier_memory_mb=(256, 2**30), verifier_seconds=(0.001, 86_400))

    def build(self, seed: int, tokenizer: Tokenizer | None = None) -> Task:
        """Read the task: a function of the files, these settings, `seed` and the tokenizer (None: bytes).

        Raises FileNotFoundError at a missing file, ValueError at whatever else is wrong, naming file, row and field.
        """
        tokenizer = tokenizer or ByteTokenizer()
        if "{question}" not in self.template:
            raise ValueError(f"template={self.template!r} must hold {{question}}, where the question goes")
        render = tokenizer.chat if self.chat else _paragraphs
        if render is None:
            raise ValueError("chat=True needs a tokenizer with a chat template: give an instruction-tuned model_folder")
        inline, pooled = self._verifier()
        one, many = self._rewards(inline, pooled)
        rows = self._read(self.path, "all", self.pass_rate_field) if self.path or not self.heldout_paths else []
        if self.heldout_paths:
            names = _names(self.heldout_paths) if len(self.heldout_paths) > 1 else ["all"]
            heldout = [
                row for path, name in zip(self.heldout_paths, names, strict=True) for row in self._read(path, name)
            ]
        elif not 1 <= self.num_heldout < len(rows):
            raise ValueError(
                f"num_heldout={self.num_heldout} must be at least 1 and leave a row of the {len(rows)} in {self.path} "
                "to train on: change it, or name heldout_paths"
            )
        else:
            order = np.random.default_rng((seed, _STREAM)).permutation(len(rows))
            heldout = [rows[i] for i in order[-self.num_heldout :]]
            rows = [rows[i] for i in sorted(order[: -self.num_heldout])]
        self._check_gold(rows + heldout, inline, pooled)
        train = self._encode(rows, tokenizer, render, "train")
        held = self._encode(heldout, tokenizer, render, "held-out")
        _report_duplicates(train, held)
        return Task(train, held, tokenizer, one, verify_many=many)

    def _verifier(self) -> tuple[Verifier | None, VerifyMany | None]:
        """One of the two: a function to be called in this process, or a pool of others."""
        if self.verifier in INLINE:
            return INLINE[self.verifier], None
        function = POOLED.get(self.verifier, self.verifier)
        if ":" not in function:
            names = ", ".join((*INLINE, *POOLED))
            raise ValueError(f"verifier={self.verifier!r} is not one of {names}, nor module:function")
        return None, self._pool(function)

    def _pool(self, function: str) -> VerifyMany:
        pool = Pool(function, seconds=self.verifier_seconds, memory_mb=self.verifier_memory_mb)
        pool.check()
        return pool.many

    def _rewards(self, inline: Verifier | None, pooled: VerifyMany | None) -> tuple[Verifier | None, VerifyMany | None]:
        """What judges by all of `rewards`: the verifier itself, one of the two, where it is alone."""
        weights = read_weights(self.rewards)
        if weights == {CORRECT: 1.0}:
            return inline, pooled
        judges = {}
        for name in weights:
            if name not in (CORRECT, *REWARDS) and ":" not in name:
                names = ", ".join((CORRECT, *REWARDS))
                raise ValueError(f"rewards={self.rewards!r}: {name} is not one of {names}, nor module:function")
            one, many = (inline, pooled) if name == CORRECT else (REWARDS.get(name), None)
            judges[name] = one_by_one(one) if one else many or self._pool(name)
        return None, weighted(weights, judges)

    def _read(self, pattern: str, label: str, rates: str | None = None) -> list[Row]:
        rows, answered = [], 0
        for file in read_files.find_files(pattern):
            for source, row in read_files.read_rows(file):
                question, left_out = read_files.messages(
                    source, self.question_field, read_files.pick(source, row, self.question_field)
                )
                answer = read_files.text(source, self.answer_field, read_files.pick(source, row, self.answer_field))
                rate = read_files.share(source, rates, read_files.pick(source, row, rates)) if rates else math.nan
                rows.append(Row(source, question, answer, label, rate))
                answered += left_out > 0
        if not rows:
            raise ValueError(f"{pattern}: no row in it: expected one JSON object a line")
        if answered:
            _log.warning("%s: in %d of %d rows the messages end with the assistant's own, which are left out of the "
                         "prompt", pattern, answered, len(rows))  # fmt: skip
        return rows

    def _check_gold(self, rows: list[Row], inline: Verifier | None, pooled: VerifyMany | None) -> None:
        """Each gold answer is read by its verifier, and right; a user's function may want more than the answer."""
        if self.verifier not in INLINE and self.verifier not in POOLED:
            return
        answers = list(dict.fromkeys(row.answer for row in rows))
        asked = [("", self._as_completion(answer), answer) for answer in answers]
        found = pooled(asked) if pooled else [inline(*each) for each in asked] if inline else []
        why = {
            answer: {ERROR: each.extracted, TIMED_OUT: f"{TIMED_OUT} {each.extracted}: raise verifier_seconds"}.get(
                each.status, each.status
            )
            for answer, each in zip(answers, map(verdict, found), strict=True)
            if each.status != RIGHT
        }
        failed = [row for row in rows if row.answer in why]
        if failed:
            row, others = failed[0], f", and {len(failed) - 1} others" if failed[1:] else ""
            raise ValueError(
                f"{row.source}{others}: the gold answer in {self.answer_field!r} fails verifier={self.verifier!r} "
                f"itself ({why[row.answer]}): {row.answer[-60:]!r}: name another verifier, or mend or drop the row"
            )

    def _as_completion(self, answer: str) -> str:
        """A completion with this gold answer, which may stand at the end of a solution."""
        return answer if self.verifier == "exact" or find(answer) else rf"\boxed{{{answer}}}"

    def _encode(self, rows: list[Row], tokenizer: Tokenizer, render: Render, name: str) -> Prompts:
        prompts = encode_prompts(
            render([self._messages(row) for row in rows]),
            [row.answer for row in rows],
            [row.label for row in rows],
            tokenizer,
            self.max_prompt_tokens,
            [row.source for row in rows],
            drop_long=True,
            pass_rates=[row.pass_rate for row in rows] if self.pass_rate_field and name == "train" else None,
        )
        dropped = len(rows) - len(prompts.questions)
        if rows and not prompts.questions:
            raise ValueError(
                f"all {dropped} {name} prompts are longer than max_prompt_tokens={self.max_prompt_tokens}: raise it"
            )
        if dropped:
            _log.warning(
                "%d of %d %s prompts dropped: longer than %d tokens", dropped, len(rows), name, self.max_prompt_tokens
            )
        return prompts

    def _messages(self, row: Row) -> list[dict[str, str]]:
        """The row's messages with the template around the question, behind the system message."""
        *before, last = row.messages
        last = last | {"content": self.template.replace("{question}", last["content"])}
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *before, last]


def _paragraphs(conversations: Sequence[list[dict[str, str]]]) -> list[str]:
    """The messages' texts, a paragraph each: the prompts where there is no chat template."""
    return ["\n\n".join(each["content"] for each in messages if each["content"].strip()) for messages in conversations]


def _report_duplicates(train: Prompts, heldout: Prompts) -> None:
    """Say what a user would want to know of before a run: they are kept."""
    times = Counter(train.questions)
    if again := len(train.questions) - len(times):
        pairs = len(set(zip(train.questions, train.answers, strict=True)))
        _log.warning("%d training prompts are duplicates of others; %d of them with another gold answer", again,
                     pairs - len(times))  # fmt: skip
    if leaked := sum(question in times for question in heldout.questions):
        _log.warning("%d of %d held-out prompts are training prompts too", leaked, len(heldout.questions))


def _names(paths: Sequence[str]) -> list[str]:
    """Of several data sets: as much of the end of each path as tells it from the others, without its suffix."""
    parts = [Path(hub.without_revision(path)).with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len({*names, "all"}) == len(names) + 1:
            return names
    raise ValueError(f"heldout_paths={tuple(paths)}: one stands twice, or is named all as their mean is: rename it")


_log = logging.getLogger("cero_jax")
