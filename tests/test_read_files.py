"""Rows of CSV and JSON files, packed and not, and what files are that hold none; tests/test_dataset.py has the rest."""

import gzip
import importlib.util
import json
import pickle

import pytest

from cero_jax.read_files import find_files, read_rows
from cero_jax.read_files import messages as read_messages


@pytest.fixture
def write(tmp_path):
    def write(content: bytes, name="rows.csv"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def rows(path):
    """[(row number, row)]."""
    return [(int(source.removeprefix(f"{path}:")), row) for source, row in read_rows(path)]


def test_csv_with_a_bom_crlf_blank_lines_and_fields_over_several_lines(write):
    text = '\ufeffquestion,answer\r\n"2, 3\r\nor ""4""?",007\r\n\r\n\u00fc\u2028,1e400\r\n\r\n'
    assert rows(write(text.encode())) == [
        (2, {"question": '2, 3\r\nor "4"?', "answer": "007"}),  # numbers as they are written
        (5, {"question": "\u00fc\u2028", "answer": "1e400"}),  # and the line of the file that a row begins in
    ]
    long = "x" * 200_000  # beyond what Python's reader takes by itself
    assert rows(write(f'a,b\n1,{long}\n"{long}\n",2\n'.encode())) == [
        (2, {"a": "1", "b": long}),
        (3, {"a": f"{long}\n", "b": "2"}),
    ]
    assert rows(write(b"question,answer\n", "none.csv")) == rows(write(b"", "empty.CSV")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n3\n", r"rows.csv:3: 1 fields, where the first line names 2: mend the row"),
        (b"a,b\n1,2,3\n", r"rows.csv:2: 3 fields, where the first line names 2"),
        (b"\na,b,a\n1,2,3\n", r"rows.csv:2: field 'a' is there twice in the first line: rename one"),
        (b"a,b\n1,\xff\n", r"rows.csv:2: not UTF-8 at byte 3 of the line: save it as UTF-8"),
        (b'a,b\n1,2\n"3,4\n5,6\n', r"rows.csv:3: broken CSV \(unexpected end of data\): mend the row"),
        (b'a,b\n"1"x,2\n', r"rows.csv:2: broken CSV \(.*expected after.*\)"),
        (b"a,b\r1,2\r", r"rows.csv:1: broken CSV \(new-line character seen in unquoted field"),
    ],
)
def test_broken_csv_is_named(write, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        rows(write(content))
    assert "\n" not in str(caught.value)


def test_the_ending_says_what_a_file_is_whatever_its_case(write):
    assert rows(write(b"a\n1\n", "rows.CSV")) == [(2, {"a": "1"})]
    assert rows(write(json.dumps({"a": 1.50}).encode(), "rows.txt")) == [(1, {"a": "1.5"})]
    if importlib.util.find_spec("pyarrow"):
        with pytest.raises(ValueError, match="broken Parquet"):
            rows(write(b"a\n1\n", "rows.Parquet"))


OBJECTS = [{"a": "1", "b": [{"c": "x\u2028"}]}, {"a": "[", "b": None}]


def test_a_json_array_is_read_with_the_line_that_each_object_begins_in(write):
    array = '\ufeff\r\n[\r\n {"a": 1, "b": [\n {"c": "x\u2028"}]}\n , {"a": "[", "b": null}\n]\n\n'.encode()
    assert rows(write(array, "rows.json")) == [(3, OBJECTS[0]), (5, OBJECTS[1])]
    assert [row for _, row in rows(write(json.dumps(OBJECTS).encode(), "one_line.jsonl"))] == OBJECTS
    assert rows(write(b" [ ] \n", "empty.json")) == []


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz", "rows.jsonl", "rows.CSV"])
def test_what_gzip_packed_is_read_whatever_its_name(write, name):
    objects = [{"a": "1", "b": "x"}, {"a": "2", "b": "\u00fc"}]
    lines = [json.dumps(each) for each in objects]
    text = {"csv": "a,b\n1,x\n2,\u00fc\n", "json": f"[{','.join(lines)}]"}.get(
        name.split(".")[1].lower(), "\n".join(lines)
    )
    path = write(gzip.compress(text.encode(), mtime=0), name)
    assert [row for _, row in rows(path)] == objects
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name}: broken gzip \(.*\): write the file again"):
        rows(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", "a zip archive or a spreadsheet"), (b"(\xb5/\xfdrest", "compressed by zstd: unpack it"),
        (b"\xfd7zXZ\x00", "compressed by xz"), (b"BZh91AY&SY", "compressed by bzip2"), (b"ARROW1\x00", "an Arrow file"),
        (pickle.dumps([{"a": 1}]), "a Python pickle, which may run anything"), (b"\x93NUMPY", "a NumPy array"),
        ('[{"a": 1}]'.encode("utf-16"), "UTF-16 text: save"), (b"SQLite format 3\x00", "an SQLite database"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git's pointer to a large file.*git lfs pull"),
        (pickle.dumps([{"a": 1}], 2), "a Python pickle"), (b"Obj\x01\x04", "an Avro file"),
        (b"FEA1\x00", "a Feather file"),
        (b"ORC\n\x03", "an ORC file"), (b"\x04\x22\x4d\x18", "compressed by lz4"), (b"%PDF-1.4", "a PDF document"),
        ("[]".encode("utf-32"), "UTF-32 text: save"),
        (gzip.compress(gzip.compress(b"[]", mtime=0), mtime=0), "packed by gzip twice"),
        (b"<!DOCTYPE html>\n<html>", "a web page: download the file itself"),
        (gzip.compress(b"PAR1", mtime=0), "Parquet packed by gzip: unpack it"),
        (b"a,b\n1,2\n", r"1: broken JSON at column 1 .*\(rows are JSONL or a JSON array of objects, or CSV or Parquet"),
        (b'{\n "a": 1}', r"1: broken JSON at column 2 .*: mend the line \(rows are JSONL"),
        (b'[{"a": 1},\n {"a": ', r"2: broken JSON at column 8 \(Expecting value\): mend the array"),
        (b'[{"a": 1}\n {"a": 2}]', "1: no comma and no end of the array behind this row"),
        (b'[{"a": 1}] {"a": 2}', "more behind the end of the array"),
        (b'[{"a": 1},\n\n 7]', "3: not a JSON object"), (b'[{"a": 1},\n{"a": 1, "a": 2}]', "2: field 'a' is there tw"),
        (b"[" * 10**5, "1: JSON nested too deep"),
    ],
    ids=lambda case: repr(case[:20]),
)  # fmt: skip
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_that_holds_no_rows_is_named_for_what_it_is(write, name, content, message):
    path = write(content, name)
    with pytest.raises(ValueError, match=message) as caught:
        rows(path)
    assert str(caught.value).startswith(f"{path}:")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "message"),
    [("rows.TSV", "tab-separated"), ("rows.tar.gz", "a tar archive"), ("rows.tgz", "a tar archive")],
)
def test_a_file_is_named_by_its_ending_where_its_content_does_not_tell(write, name, message):
    with pytest.raises(ValueError, match=rf"{name}: {message}.*: "):
        rows(write(b"question\tanswer\nq\t1\n", name))


def test_a_file_that_begins_as_parquet_is_parquet(write):
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="broken Parquet after row 0"):
        rows(write(b"PAR1 and no more", "rows.jsonl"))


def test_a_folder_gets_an_example_of_a_glob(tmp_path):
    with pytest.raises(ValueError, match=r"not a regular file: give the path of the files in it, .*/\*\.jsonl$"):
        find_files(str(tmp_path))


USER, SAID = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}
SYSTEM = {"role": "system", "content": ""}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([SAID], "is all the assistant's: the question must be the user's last message"),
        ([SYSTEM, SAID], "ends with a message of the system"),
        ([USER, {"role": "tool", "content": "4"}], "ends with a message of the tool"),
        (
            [{"role": "human", "content": "x"}],
            r"'question.0.role' is \"human\", none of system, developer, user, assist",
        ),
        ([USER, {"role": 7, "content": "x"}], "'question.1.role' is 7, none of"),
        ([{"role": None, "content": "x"}], "'question.0.role' is null, none of"),
        ([{"role": ["user"], "content": "x"}], "'question.0.role' is .*, none of"),
        ([{"role": "user", "content": " "}], "'question.0.content' is empty"),
        ([USER, SAID | {"content": None}, USER], "'question.1.content' is null, neither text nor a number"),
        (
            [USER, SAID | {"tool_calls": [{"name": "f"}]}, USER],
            "'question.1' calls tools, which a prompt here cannot hold",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "'question.0.content' is .*, neither text"),
    ],
)
def test_messages_that_ask_nothing_are_named(messages, message):
    with pytest.raises(ValueError, match=rf"^rows.jsonl:2: field .*{message}") as caught:
        read_messages("rows.jsonl:2", "question", messages)
    assert "\n" not in str(caught.value)


def test_a_path_that_the_system_refuses_is_named():
    with pytest.raises(ValueError, match=r"x: cannot be read \(File name too long\): check the path and its perm"):
        find_files("x" * 300)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"none.csv: no such file: give the path of a JSONL, CSV or Parquet file"
    ):
        find_files(str(tmp_path / "none.csv"))
