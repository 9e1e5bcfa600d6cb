"""Rows from a JSONL file: GSM8K's shape, other fields, and one clear error for each thing wrong."""

import json

import numpy as np
import pytest

from cero_jax.data import prompts_hash
from cero_jax.tasks.dataset import Dataset

GSM8K = [
    {
        "question": f"Ann has {n} apples and eats 2. How many are left?",
        "answer": f"{n}-2=<<{n}-2={n - 2}>>\n#### {n - 2}",
    }
    for n in range(10, 20)
]


@pytest.fixture
def write(tmp_path):
    """Writes rows (objects, or a line as it is) and returns the path."""

    def write(*rows, name="rows.jsonl", newline=b"\n", start=b""):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(start + newline.join(lines))
        return str(path)

    return write


def row(question="q", answer="1"):
    return {"question": question, "answer": answer}


def test_gsm8k_rows(write):
    path = write(*GSM8K)
    task = Dataset(path, num_heldout=3, template="Q: {question}\nA:").build(seed=0)
    assert len(task.train.questions) == 7
    assert len(task.heldout.questions) == 3
    questions = {f"Q: {r['question']}\nA:": r["answer"] for r in GSM8K}
    assert questions == dict(
        zip(task.train.questions + task.heldout.questions, task.train.answers + task.heldout.answers, strict=True)
    )
    assert task.train.labels == ("all",) * 7
    assert task.tokenizer.decode(task.train.tokens[0]) == task.train.questions[0]
    assert task.verify("", "so #### 12", "#### 12").reward == 1.0
    assert task.demonstrations is None


def test_the_seed_draws_the_heldout_rows(write):
    path = write(*GSM8K)
    tasks = [Dataset(path, num_heldout=3).build(seed) for seed in (0, 0, 1, 2, 3)]
    assert prompts_hash(tasks[0].heldout) == prompts_hash(tasks[1].heldout)
    assert len({task.heldout.questions for task in tasks}) > 2
    order = [GSM8K.index({"question": q, "answer": a}) for q, a in zip(*tasks[0].train[:2], strict=True)]
    assert order == sorted(order)  # what is left keeps the order of the file


def test_a_heldout_file(write):
    train, heldout = write(*GSM8K[:4]), write(*GSM8K[4:6], name="heldout.jsonl")
    task = Dataset(train, heldout_paths=(heldout,)).build(seed=0)
    assert task.train.questions == tuple(r["question"] for r in GSM8K[:4])
    assert task.heldout.questions == tuple(r["question"] for r in GSM8K[4:6])


def test_other_fields_numbers_and_the_exact_verifier(write):
    rows = [{"problem": 7, "gold": 72.50}, {"problem": "b{answer}", "gold": 12345678901234567890}]
    task = Dataset(
        write(*rows),
        "problem",
        "gold",
        template="{x} {question} %s",
        verifier="exact",
        num_heldout=1,
        max_prompt_tokens=30,
    ).build(seed=0)
    found = dict(
        zip(task.train.questions + task.heldout.questions, task.train.answers + task.heldout.answers, strict=True)
    )
    assert found == {"{x} 7 %s": "72.5", "{x} b{answer} %s": "12345678901234567890"}  # nothing formatted or rounded
    assert task.verify("", "72.5", "72.5").reward == 1.0
    assert task.verify("", "72.50", "72.5").reward == 0.0


def test_bom_crlf_and_blank_lines(write):
    path = write(row("a"), b"", row("b"), b"  ", row("ü\u2028"), b"", start=b"\xef\xbb\xbf", newline=b"\r\n")
    task = Dataset(path, num_heldout=1, max_prompt_tokens=10).build(seed=0)
    assert set(task.train.questions + task.heldout.questions) == {"a", "b", "ü\u2028"}
    assert np.all(task.train.tokens[:, 0] == task.tokenizer.pad_id)


GOOD = b'{"question": "q", "answer": "1"}'
BROKEN = [
    (b'{"question": "q", "answer": ', r":2: broken JSON at column 29"),
    (b'{"question": "q"}', r":2: no field 'answer' \(there are 'question'\)"),
    (b'{"answer": "1"}', r":2: no field 'question'"),
    (b"{}", r":2: no field 'question'"),
    (b"[1, 2]", r":2: not a JSON object"),
    (b"null", r":2: not a JSON object"),
    (b"72", r":2: not a JSON object"),
    (b'{"question": "", "answer": "1"}', r":2: field 'question' is empty"),
    (b'{"question": "q", "answer": " "}', r":2: field 'answer' is empty"),
    (b'{"question": "q", "answer": null}', r":2: field 'answer' is null, neither text nor a number"),
    (b'{"question": "q", "answer": true}', r":2: field 'answer' is true, neither"),
    (b'{"question": ["q"], "answer": "1"}', r":2: field 'question' is \[\"q\"\], neither"),
    (b'{"question": {"q": 1}, "answer": "1"}', r":2: field 'question' is .*, neither"),
    (b'{"question": "q", "answer": NaN}', r":2: field 'answer' is NaN, neither"),
    (b'{"question": "q", "answer": -Infinity}', r":2: field 'answer' is -Infinity, neither"),
    (b'{"question": "\xff", "answer": "1"}', r":2: not UTF-8 at byte 15"),
    (b'{"question": "\\ud800", "answer": "1"}', r":2: field 'question' holds half a surrogate pair"),
    (b"[" * 10**5, r":2: JSON nested too deep|:2: broken JSON"),
    (b'{"question": "q", "answer": "none"}', r":2: the gold answer in 'answer' fails verifier='final_number' itself"),
    (b'{"question": "q", "question": "r", "answer": "1"}', r":2: field 'question' is there twice in one object"),
    (b'{"question": [], "answer": "1"}', r":2: field 'question' is \[\], neither text .* nor a list of messages"),
    (b'{"question": [{"role": "user"}], "answer": "1"}', r":2: field 'question' is .* nor a list of messages"),
    (b'{"question": [{"role": "user", "content": 1e999}], "answer": []}', r":2: field 'answer' is \[\], neither"),
    (b'{"question": [{"role": "user", "content": ""}], "answer": "1"}', r":2: field 'question.0.content' is empty"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN, ids=lambda case: repr(case[:30]))
def test_a_broken_row_is_named(write, line, message):
    path = write(GOOD, line, GOOD)
    with pytest.raises(ValueError, match=message) as caught:
        Dataset(path, heldout_paths=(write(GOOD, name="heldout.jsonl"),), max_prompt_tokens=8).build(seed=0)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_used_is_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file"):
        Dataset(str(tmp_path / "none.jsonl")).build(seed=0)
    with pytest.raises(ValueError, match="not a regular file"):
        Dataset(str(tmp_path)).build(seed=0)
    for lines in ([], [b"", b"  "]):
        with pytest.raises(ValueError, match=r"rows.jsonl: no row in it"):
            Dataset(write(*lines)).build(seed=0)


def test_an_unreadable_file_is_named(write, monkeypatch):
    path = write(GOOD)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cero_jax.tables.open", refuse, raising=False)  # a superuser may read whatever its mode
    with pytest.raises(ValueError, match=r"rows.jsonl: cannot be read \(Permission denied\)"):
        Dataset(path).build(seed=0)


def test_settings_out_of_range_are_named(write):
    path = write(GOOD, GOOD)
    for num_heldout in (0, 2):
        with pytest.raises(ValueError, match=f"num_heldout={num_heldout} must be at least 1 and leave a row of the 2"):
            Dataset(path, num_heldout=num_heldout).build(seed=0)
    with pytest.raises(ValueError, match=r"template='Q:' must hold {question}"):
        Dataset(path, template="Q:").build(seed=0)
    with pytest.raises(
        ValueError, match=r"verifier='maths' is not one of final_number, exact, choice, math, nor module:function"
    ):
        Dataset(path, verifier="maths").build(seed=0)  # type: ignore[arg-type]
