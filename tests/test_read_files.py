"""Rows of CSV files, and what the formats have in common; tests/test_dataset.py has JSONL and Parquet in use."""

import importlib.util
import json

import pytest

from cero_jax.read_files import find_files, read_rows


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
        (b"a,b\n1," + b"x" * 200_000 + b"\n", r"rows.csv:2: broken CSV \(field larger than field limit"),
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


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"none.csv: no such file: give the path of a JSONL, CSV or Parquet file"
    ):
        find_files(str(tmp_path / "none.csv"))
