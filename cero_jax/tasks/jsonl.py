"""Question and answer from any JSONL file, as bytes: GSM8K's rows and files of your own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cero_jax.data import Prompts, Task, encode_prompts
from cero_jax.rewards.exact import exact
from cero_jax.rewards.final_number import final_number
from cero_jax.tokenizer import ByteTokenizer, Tokenizer

VERIFIERS = {"final_number": final_number, "exact": exact}

_STREAM = 3  # keeps this draw apart from other uses of the same seed


@dataclass(frozen=True)
class Jsonl:
    """Prompts and gold answers from a file with one JSON object a line."""

    path: str
    """The training file."""
    question_field: str = "question"
    """Field that holds the question."""
    answer_field: str = "answer"
    """Field that holds the gold answer."""
    template: str = "{question}"
    """The prompt; {question} stands for the question, any other text for itself."""
    verifier: Literal["final_number", "exact"] = "final_number"
    """How a completion is judged: by its final number ("#### 72" is read), or to the letter."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens, which are bytes; a longer one is refused."""
    heldout_path: str | None = None
    """The held-out file, with the same fields; None holds rows of `path` out."""
    num_heldout: int = 256
    """Rows of `path` held out, drawn by the seed, where there is no held-out file."""

    def build(self, seed: int, tokenizer: Tokenizer | None = None) -> Task:
        """Read the task: a function of the files, these settings and `seed`.

        Raises FileNotFoundError at a missing file, ValueError at whatever else is wrong, naming file, line and field.
        """
        if "{question}" not in self.template:
            raise ValueError(f"template={self.template!r} must hold {{question}}, where the question goes")
        if self.verifier not in VERIFIERS:
            raise ValueError(f"verifier={self.verifier!r} is not one of {', '.join(VERIFIERS)}")
        rows = self._read(self.path)
        if self.heldout_path is not None:
            heldout = self._read(self.heldout_path)
        elif not 1 <= self.num_heldout < len(rows):
            raise ValueError(
                f"num_heldout={self.num_heldout} must be at least 1 and leave a row of the {len(rows)} in {self.path} "
                "to train on: change it, or name a heldout_path"
            )
        else:
            order = np.random.default_rng((seed, _STREAM)).permutation(len(rows))
            heldout = [rows[i] for i in order[-self.num_heldout :]]
            rows = [rows[i] for i in sorted(order[: -self.num_heldout])]
        tokenizer = tokenizer or ByteTokenizer()
        train, heldout = self._encode(rows, tokenizer), self._encode(heldout, tokenizer)
        return Task(train, heldout, tokenizer, VERIFIERS[self.verifier], None)

    def _encode(self, rows: list[tuple[str, str, str]], tokenizer: Tokenizer) -> Prompts:
        sources, questions, answers = zip(*rows, strict=True)
        questions = [self.template.replace("{question}", question) for question in questions]
        return encode_prompts(questions, answers, ["all"] * len(rows), tokenizer, self.max_prompt_tokens, sources)

    def _read(self, path: str) -> list[tuple[str, str, str]]:
        """("file:line", question, answer) of each row; each gold answer passes its own verifier."""
        rows = []
        for source, row in _read_objects(path):
            question, answer = (_text(source, row, field) for field in (self.question_field, self.answer_field))
            if VERIFIERS[self.verifier](question, answer, answer) != 1.0:
                raise ValueError(
                    f"{source}: the gold answer in {self.answer_field!r} fails verifier={self.verifier!r} itself: "
                    f"{answer[-60:]!r}: name another verifier, or mend or drop the row"
                )
            rows.append((source, question, answer))
        if not rows:
            raise ValueError(f"{path}: no row in it: expected one JSON object a line")
        return rows


def _read_objects(path: str) -> Iterator[tuple[str, dict]]:
    """("file:line", object) of each line that is not blank; a BOM and CRLF are fine, numbers stay as written."""
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"{path}: no such file: give the path of a JSONL file")
    if not file.is_file():
        raise ValueError(f"{path}: not a regular file: give the path of a JSONL file")
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
    for number, line in enumerate(lines, 1):
        source = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
            if not text.strip():
                continue
            row = json.loads(text, parse_float=str, parse_int=str)
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: not UTF-8 at byte {error.start + 1} of the line: save it as UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: broken JSON at column {error.colno} ({error.msg}): mend the line") from error
        except RecursionError as error:
            raise ValueError(f"{source}: JSON nested too deep: mend or drop the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{source}: not a JSON object: expected {{...}} with the fields by name")
        yield source, row


def _text(source: str, row: dict, field: str) -> str:
    """The row's field as text. Raises ValueError where it is missing, empty, or neither text nor a finite number."""
    if field not in row:
        raise ValueError(f"{source}: no field {field!r} (there are {', '.join(map(repr, row))}): name the right one")
    value = row[field]
    if not isinstance(value, str):  # numbers were kept as written; NaN and infinity are the only floats
        raise ValueError(f"{source}: field {field!r} is {json.dumps(value)[:40]}, neither text nor a number: mend it")
    if not value.strip():
        raise ValueError(f"{source}: field {field!r} is empty: fill it or drop the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{source}: field {field!r} holds half a surrogate pair, which is no text: mend it") from error
    return value
