"""Rows from a JSONL file: GSM8K's shape, other fields, and one clear error for each thing wrong."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from cero_jax import read_files
from cero_jax.data import prompts_hash
from cero_jax.tasks import dataset
from cero_jax.tasks.dataset import Dataset
from cero_jax.tokenizer import ByteTokenizer

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
    assert task.tokenizer.decode(task.train.tokens[: task.train.offsets[1]]) == task.train.questions[0]
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
    assert task.train.longest <= 5  # bytes, whatever the limit


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

    monkeypatch.setattr("cero_jax.read_files.open", refuse, raising=False)  # a superuser may read whatever its mode
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


def questions(task):
    return task.train.questions + task.heldout.questions


DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"Solve: what is {n} + {n}?"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(2 * n), "style": "rule"},
        "extra_info": {"index": f"{n}"},
    }
    for n in range(6)
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_dapo_rows(write, tmp_path, kind):
    path = write(*DAPO)
    if kind == "parquet":
        path = str(tmp_path / "rows.parquet")
        parquet.write_table(pa.Table.from_pylist(DAPO), path)
    dataset = Dataset(
        path,
        question_field="prompt",
        answer_field="reward_model.ground_truth",
        verifier="math",
        system="Reason.",
        num_heldout=2,
    )
    task = dataset.build(seed=0)
    found = dict(zip(questions(task), task.train.answers + task.heldout.answers, strict=True))
    assert found == {f"Reason.\n\nSolve: what is {n} + {n}?": str(2 * n) for n in range(6)}
    verdicts = task.verify_many([("", r"\boxed{4}", "4"), ("", r"\boxed{\frac{8}{2}}", "4"), ("", "it is 4", "4")])
    assert [each.status for each in verdicts] == ["right", "right", "no answer"]
    task.verify_many.__self__.close()


def test_parquet_columns_of_other_types(tmp_path):

    def build(**columns):
        parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
        return Dataset(str(tmp_path / "rows.parquet"), num_heldout=1, verifier="exact").build(seed=0)

    task = build(question=["a", "b"], answer=[27.5, 3.0])
    assert dict(zip(questions(task), task.train.answers + task.heldout.answers, strict=True)) == {
        "a": "27.5",
        "b": "3.0",
    }
    for value, message in ((None, "null"), (float("nan"), "NaN")):
        with pytest.raises(ValueError, match=f"rows.parquet:2: field 'answer' is {message}, neither text nor a number"):
            build(question=["a", "b"], answer=[1.5, value])
    with pytest.raises(ValueError, match=r"rows.parquet:1: no field 'answer'"):
        build(question=["a", "b"])
    for broken in (b"", b"PAR1", b"no parquet at all", (tmp_path / "rows.parquet").read_bytes()[:-20]):
        (tmp_path / "rows.parquet").write_bytes(broken)
        with pytest.raises(ValueError, match=r"rows.parquet: broken Parquet after row 0 \(.*\): write") as caught:
            Dataset(str(tmp_path / "rows.parquet")).build(seed=0)
        assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"rows.parquet: Parquet needs pyarrow: pip install '.*\[train\]'"):
        Dataset(str(tmp_path / "rows.parquet")).build(seed=0)


def test_globs_are_sorted_and_heldout_files_are_data_sets(write, tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        write(row(f"{name} 1"), row(f"{name} 2"), name=name)
    write({"problem": "p", "answer": "3"}, name="aime.jsonl")
    held = (str(tmp_path / "a.jsonl"), str(tmp_path / "aime.jsonl"))
    task = Dataset(str(tmp_path / "**" / "[bc].jsonl"), question_field="question|problem", heldout_paths=held).build(0)
    assert task.train.questions == ("b.jsonl 1", "b.jsonl 2", "deep/c.jsonl 1", "deep/c.jsonl 2")
    assert task.heldout.labels == ("a", "a", "aime")
    assert task.heldout.questions[2] == "p"
    with pytest.raises(FileNotFoundError, match=r"z\*.jsonl: no such file"):
        Dataset(str(tmp_path / "z*.jsonl")).build(seed=0)


def test_long_prompts_are_dropped_and_duplicates_reported(write, caplog):
    rows = [row("short"), row("x" * 100), row("short"), row("short", "2"), row("y" * 101), row("other")]
    task = Dataset(write(*rows), heldout_paths=(write(row("other"), name="h.jsonl"),), max_prompt_tokens=50).build(0)
    assert task.train.questions == ("short", "short", "short", "other")
    assert task.train.answers == ("1", "1", "2", "1")
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 6 train prompts dropped: longer than 50 tokens",
        "2 training prompts are duplicates of others; 1 of them with another gold answer",
        "1 of 1 held-out prompts are training prompts too",
    ]
    with pytest.raises(ValueError, match="all 6 train prompts are longer than max_prompt_tokens=2: raise it"):
        Dataset(write(*rows), heldout_paths=(write(row("a"), name="h.jsonl"),), max_prompt_tokens=2).build(0)


class ChatTokenizer(ByteTokenizer):
    def chat(self, conversations):
        return [
            "".join(f"<{each['role']}>{each['content']}" for each in some) + "<assistant>" for some in conversations
        ]


def test_chat_renders_by_the_tokenizers_template(write):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "q"},
    ]
    rows = write({"question": messages, "answer": "1"}, row("plain"))
    dataset = Dataset(rows, template="{question} Box it.", system="Be brief.", chat=True, num_heldout=1)
    assert set(questions(dataset.build(0, ChatTokenizer()))) == {
        "<system>Be brief.<user>hi<assistant>yes<user>q Box it.<assistant>",
        "<system>Be brief.<user>plain Box it.<assistant>",
    }
    with pytest.raises(ValueError, match="chat=True needs a tokenizer with a chat template"):
        dataset.build(0)


USER, SAID = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}
SYSTEM = {"role": "system", "content": ""}


@pytest.mark.parametrize("chat", [False, True])
def test_the_answer_behind_a_question_stays_out_of_the_prompt_and_is_counted(write, caplog, chat):
    """Rows of supervised training: what the assistant says last is the gold, whether or not something is in it."""
    talk = [USER, SAID, USER]
    found = [
        [USER, SAID],
        [*talk, SAID, SAID],
        talk,
        [SYSTEM, USER],
        [SYSTEM | {"content": None}, USER, SAID | {"content": None}],
    ]
    path = write(*({"question": messages, "answer": "4"} for messages in found))
    held = write({"question": [USER], "answer": "4"}, name="held.jsonl")
    task = Dataset(path, heldout_paths=(held,), chat=chat).build(0, ChatTokenizer() if chat else None)
    assert [record.getMessage() for record in caplog.records if "assistant" in record.getMessage()] == [
        f"{path}: in 3 of 5 rows the messages end with the assistant's own, which are left out of the prompt"
    ]
    if chat:
        once, twice = "<user>2 + 2?<assistant>", "<user>2 + 2?<assistant>It is 4.<user>2 + 2?<assistant>"
        assert task.train.questions == (once, twice, twice, f"<system>{once}", f"<system>{once}")
    else:
        assert task.train.questions == ("2 + 2?", *["2 + 2?\n\nIt is 4.\n\n2 + 2?"] * 2, "2 + 2?", "2 + 2?")


def test_without_a_path_there_are_held_out_prompts_alone(write, caplog):
    held = write(row("a"), row("b"))
    task = Dataset("", heldout_paths=(held,)).build(0)
    assert (len(task.train.questions), task.heldout.questions, caplog.records) == (0, ("a", "b"), [])
    with pytest.raises(ValueError, match="'': not a regular file"):
        Dataset("").build(0)


def test_a_verifier_of_the_users_own(write):
    task = Dataset(
        write(row("a"), row("b")), verifier="user_verifiers:length", num_heldout=1, max_prompt_tokens=6000
    ).build(0)
    assert task.verify_many([("q", "four", "1")])[0].reward == 0.4
    task.verify_many.__self__.close()
    with pytest.raises(ValueError, match=r"verifier='user_verifiers:no' cannot be loaded: AttributeError"):
        Dataset(write(row()), verifier="user_verifiers:no").build(0)


def broken_line(rng):
    """A row, or what a careless script, a crash or an editor makes of one."""
    values = ["q", 1, 2.5, True, None, [], {}, ["x"], {"a": {"b": [1, "c"]}}, "", " ", float("nan"), float("inf"),
              "é\u2028", "x" * 5000, [{"role": "user", "content": "m"}], [{"role": "user"}], [1, 2],
              "\ud800", "\x00"]  # fmt: skip
    keys = ["question", "answer", "Question", "a.b.1", "a", "", "id"]
    fields = {keys[rng.integers(len(keys))]: values[rng.integers(len(values))] for _ in range(rng.integers(6))}
    fields |= {key: "1" for key in ("question", "answer") if rng.random() < 0.6}
    line = json.dumps(fields, ensure_ascii=bool(rng.random() < 0.8)).encode("utf-8", "surrogatepass")
    kind = rng.integers(8)
    if kind == 0:
        return line[: rng.integers(len(line) + 1)]
    if kind == 1:
        place = rng.integers(len(line) + 1)
        return line[:place] + bytes(rng.integers(0, 256, rng.integers(1, 4)).tolist()) + line[place:]
    if kind == 2:
        return line[:-1] + b', "answer": "2"}'
    if kind == 3:
        return b"\xef\xbb\xbf" + line + b"\r"
    if kind == 4:
        return [b"", b"null", b"[]", b"7", b'"text"', b"NaN", b"{" * 2000, b"[" * 10**5, line * 2, b"\r"][
            rng.integers(10)
        ]
    return line


def test_thousands_of_broken_rows_are_named_or_loaded(tmp_path):
    """3,000 files of a broken row between two good ones: loaded with what is in it, or one line with file and line."""
    rng, loaded, refused = np.random.default_rng(0), 0, 0
    path = tmp_path / "rows.jsonl"
    for _ in range(3000):
        line = broken_line(rng)
        path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
        try:
            task = Dataset(
                str(path), "question|a", "answer|a.b.1", verifier="exact", num_heldout=1, max_prompt_tokens=6000
            ).build(0)
        except ValueError as error:
            refused += 1
            message = str(error)
            assert message.startswith((f"{path}:2: ", f"{path}:3: ")), message  # 3: a line feed was inserted
            assert "\n" not in message
            assert len(message) < 700
        else:
            loaded += 1
            assert len(task.train.questions) + len(task.heldout.questions) == 2 + bool(line.strip(b"\r\n\t \x0b\x0c"))
    assert min(loaded, refused) > 500


def test_data_sets_are_told_apart_by_as_much_of_their_paths_as_it_takes():
    assert dataset._names(["a/aime24.jsonl", "b/amc.23.parquet"]) == ["aime24", "amc.23"]
    assert dataset._names(["a/x/test.jsonl", "a/y/test.jsonl"]) == ["x/test", "y/test"]
    assert dataset._names(["a/all.jsonl", "a/b.jsonl"]) == ["a/all", "a/b"]
    with pytest.raises(ValueError, match="one stands twice"):
        dataset._names(["a/test.jsonl", "a/test.jsonl"])


def test_of_several_fields_the_first_that_is_not_null_counts():
    assert read_files.pick("f:1", {"a": None, "b": "x"}, "a|b") == "x"
    assert read_files.pick("f:1", {"a": None}, "a|b") is None  # which `text` then refuses by name
    with pytest.raises(ValueError, match=r"f:1: no field 'a\|b'"):
        read_files.pick("f:1", {"c": 1}, "a|b")
