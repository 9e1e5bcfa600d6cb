"""Rows of JSONL, JSON, CSV and Parquet files, and the text in their fields: of data sets, and of logs.

What is wrong with one is a single line that names the file, the row and the field.
"""

import csv
import glob
import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cero_jax.huggingface import hub
from cero_jax.paths import local_path
from cero_jax.starting import install

OTHERS = {  # how a file begins that holds no rows to be read -> what it is, and what to do
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or export it as CSV",
    b"(\xb5/\xfd": "compressed by zstd: unpack it",
    b"BZh91AY&SY": "compressed by bzip2: unpack it",
    b"\xfd7zXZ\x00": "compressed by xz: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"ARROW1": "an Arrow file: write it as Parquet",
    b"\xff\xff\xff\xff": "an Arrow stream: write it as Parquet",
    b"\x04\x22\x4d\x18": "compressed by lz4: unpack it",
    b"\x1f\x8b": "packed by gzip twice: unpack it once",  # where it was unpacked already
    **dict.fromkeys(
        (b"\x80\x02", b"\x80\x03", b"\x80\x04\x95", b"\x80\x05\x95"),
        "a Python pickle, which may run anything when it is read: write its rows as JSONL",
    ),
    b"Obj\x01": "an Avro file: write it as Parquet",
    b"FEA1": "a Feather file: write it as Parquet",
    b"ORC": "an ORC file: write it as Parquet",
    b"\xd0\xcf\x11\xe0": "a spreadsheet: export it as CSV",
    b"%PDF": "a PDF document: give its rows as JSONL",
    b"\x93NUMPY": "a NumPy array: write its rows as JSONL",
    b"\x89HDF": "an HDF5 file: write its rows as JSONL",
    b"SQLite format 3": "an SQLite database: export a table as CSV",
    b"\xff\xfe\x00\x00": "UTF-32 text: save it as UTF-8",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"version https://git-lfs": "Git's pointer to a large file, and not the file: fetch it with `git lfs pull`",
    b"<!doctype html": "a web page: download the file itself, not the page about it",
    b"<html": "a web page: download the file itself, not the page about it",
}
ENDINGS = {  # of a name, perhaps before .gz
    ".tsv": "tab-separated text: save it as CSV",
    ".tar": "a tar archive: unpack it",
    ".tgz": "a tar archive: unpack it",
}
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"


def find_files(pattern: str) -> list[Path]:
    """The files of a path or glob ("data/**/*.jsonl"), sorted, or of a name on the hub ("hf:openai/gsm8k:main/train").

    Raises FileNotFoundError where there is none, ValueError at a folder, or where the system does not let it be read,
    and as `hub.data_files` does.
    """
    if hub.is_name(pattern):
        return hub.data_files(pattern)
    path = local_path(pattern)
    with _unreadable_named(path):
        if path.is_file():
            return [path]
        if path.exists():
            mend = f"the files in it, for example {path / '*.jsonl'}" if path.is_dir() else "a file, or a glob of files"
            raise ValueError(f"{pattern or repr(pattern)}: not a regular file: give the path of {mend}")
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not found:
        raise FileNotFoundError(f"{pattern}: no such file: give the path of a JSONL, CSV or Parquet file, or a glob")
    return found


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:row", row) of each row, by the line that it begins in; numbers of JSON and CSV are text, as written.

    A file named .csv is CSV with the fields' names in its first line, one that begins as Parquet or is so named is
    Parquet, others are JSON: an object a line, or one array of objects. All but Parquet may be compressed by gzip.
    Raises ValueError naming what is wrong, and where, or what else the file is.
    """
    begins, name = _beginning(path), path.name.lower()
    for mark, what in OTHERS.items():
        if begins.lower().startswith(mark.lower()):
            raise ValueError(f"{path}: {what}")
    for ending, what in ENDINGS.items():
        if name.removesuffix(".gz").endswith(ending):
            raise ValueError(f"{path}: {what}")
    if begins.startswith(PARQUET) or name.endswith(".parquet"):
        return _read_parquet(path)
    return _read_csv(path) if name.removesuffix(".gz").endswith(".csv") else _read_json(path)


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    """The file, as it is or unpacked."""
    with open(path, "rb") as file:
        packed = file.read(2) == GZIP
    return gzip.open(path, "rb") if packed else open(path, "rb")


def _beginning(path: Path) -> bytes:
    with _unreadable_named(path), _open(path) as file:
        begins = file.read(32)
        if isinstance(file, gzip.GzipFile) and begins.startswith(PARQUET):
            raise ValueError(f"{path}: Parquet packed by gzip: unpack it, Parquet is compressed inside")
        return begins


@contextmanager
def _unreadable_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: broken gzip ({error}): write the file again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends; a BOM is dropped. Raises ValueError where it is not UTF-8."""
    with _unreadable_named(path), _open(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line: save it as UTF-8"
                ) from error


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSONL, or an array where the first character says so. CRLF and blank lines are fine."""
    lines, first = _lines(path), True
    for number, line in enumerate(lines, 1):
        if not line.strip(" \t\n\r\v\f"):
            continue
        if first and line.lstrip().startswith("["):
            yield from _elements(path, number, line + "".join(lines))
            return
        mend = "mend the line"
        if first:
            mend += " (rows are JSONL or a JSON array of objects, or CSV or Parquet in a file so named)"
        source = f"{path}:{number}"
        with _broken_json_named(source, path, number, mend):
            row = _DECODER.decode(line.rstrip("\r\n"))
        yield source, _object(source, row)
        first = False


def _elements(path: Path, first: int, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON array, each with the line that it begins in. text: the array, from line `first` on."""
    line, counted, place = first, 0, _behind_space(text, text.index("[") + 1)
    while not text.startswith("]", place):
        line, counted = line + text.count("\n", counted, place), place
        source = f"{path}:{line}"
        with _broken_json_named(source, path, first, "mend the array"):
            row, place = _DECODER.raw_decode(text, place)
        yield source, _object(source, row)
        place = _behind_space(text, place)
        if text.startswith(",", place):
            place = _behind_space(text, place + 1)
        elif not text.startswith("]", place):
            raise ValueError(f"{source}: no comma and no end of the array behind this row: mend the array")
    if text[place + 1 :].strip():
        raise ValueError(f"{path}: more behind the end of the array: give one array, or an object a line")


def _behind_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\n\r":
        place += 1
    return place


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        key = next(key for i, (key, _) in enumerate(pairs) if key in [k for k, _ in pairs[:i]])
        raise KeyError(key)
    return row


_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, object_pairs_hook=_once)


@contextmanager
def _broken_json_named(source: str, path: Path, first: int, mend: str) -> Iterator[None]:
    """Errors of a decoder in one line. source: of the row; first: the line that the decoder's text begins in."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{first + error.lineno - 1}: broken JSON at column {error.colno} ({error.msg}): {mend}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{source}: JSON nested too deep: mend or drop the row") from error
    except KeyError as error:
        raise ValueError(f"{source}: field {error} is there twice in one object: keep one of them") from error


def _object(source: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{source}: not a JSON object: expected {{...}} with the fields by name")
    return row


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """CRLF, blank lines and quoted fields over several lines are fine; a row is known by its first line."""
    csv.field_size_limit(sys.maxsize)  # of this process: by itself it refuses a long solution as broken
    reader, header, begin = csv.reader(_lines(path), strict=True), None, 1
    try:
        for cells in reader:
            source, begin = f"{path}:{begin}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                for name in header:
                    if header.count(name) > 1:
                        raise ValueError(f"{source}: field {name!r} is there twice in the first line: rename one")
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{source}: {len(cells)} fields, where the first line names {len(header)}: mend the row"
                )
            yield source, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{begin}: broken CSV ({error}): mend the row") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: Parquet needs pyarrow: {install('train')}, or give JSONL or CSV") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path}: broken Parquet after row {number} ({why}): write the file again") from error


def pick(source: str, row: dict[str, Any], field: str) -> Any:
    """The value of a field: a name, a path into nested ones ("a.b.0"), or several, "a|b": the first not null."""
    found = False
    for path in field.split("|"):
        value, missing = row.get(path), path not in row
        if missing:
            value, missing = _descend(row, path.split("."))
        if value is not None:
            return value
        found |= not missing
    if found:
        return None
    raise ValueError(f"{source}: no field {field!r} (there are {', '.join(map(repr, row))[:300]}): name the right one")


def _descend(value: Any, path: list[str]) -> tuple[Any, bool]:
    for part in path:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isascii() and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None, True
    return value, False


def text(source: str, field: str, value: Any) -> str:
    """A field's value as text. Raises ValueError where it is empty, or neither text nor a finite number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)  # Parquet's; JSON's numbers were kept as written
    if not isinstance(value, str):
        shown = json.dumps(value, default=repr)[:40]
        raise ValueError(f"{source}: field {field!r} is {shown}, neither text nor a number: mend it")
    if not value.strip():
        raise ValueError(f"{source}: field {field!r} is empty: fill it or drop the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{source}: field {field!r} holds half a surrogate pair, which is no text: mend it") from error
    return value


def share(source: str, field: str, value: Any) -> float:
    """A field's value as a share, NaN where it is null. Raises ValueError where it is no number from 0 to 1."""
    if value is None or value == "":  # as CSV has it
        return math.nan
    try:
        number = float(text(source, field, value))
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        shown = json.dumps(value, default=repr)[:40]
        raise ValueError(f"{source}: field {field!r} is {shown}, no share from 0 to 1: mend it, or name another field")
    return number


def name(source: str, field: str, value: Any) -> str:
    """A field's value as what it is known by: text or a number as it is, a list or an object as JSON."""
    if isinstance(value, list | dict) and value:
        return json.dumps(value, sort_keys=True, default=repr)
    return text(source, field, value)


ROLES = ("system", "developer", "user", "assistant", "tool")


def messages(source: str, field: str, value: Any) -> tuple[list[dict[str, str]], int]:
    """A question as the messages of a chat, each {"role", "content"}, and how many behind it were left out.

    A list of messages is taken up to the user's last: what the assistant says behind it is an answer, and must not be
    in a prompt. Text is one of the user's. A system message may be empty.

    Raises ValueError at an unknown role, and where another than the user stands last.
    """
    if not isinstance(value, list):
        return [{"role": "user", "content": text(source, field, value)}], 0
    if not value or not all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in value):
        shown = json.dumps(value, default=repr)[:40]
        raise ValueError(
            f"{source}: field {field!r} is {shown}, neither text nor a number nor a list of messages with role and "
            "content: mend it"
        )
    for i, each in enumerate(value):
        if each["role"] not in ROLES:
            shown = json.dumps(each["role"], default=repr)[:40]
            raise ValueError(f"{source}: field '{field}.{i}.role' is {shown}, none of {', '.join(ROLES)}: mend it")
    number = len(value)
    while number and value[number - 1]["role"] == "assistant":
        number -= 1
    if not number or value[number - 1]["role"] != "user":
        last = f"ends with a message of the {value[number - 1]['role']}" if number else "is all the assistant's"
        raise ValueError(f"{source}: field {field!r} {last}: the question must be the user's last message: mend it")
    return [_message(source, f"{field}.{i}", each) for i, each in enumerate(value[:number])], len(value) - number


def _message(source: str, field: str, message: dict[str, Any]) -> dict[str, str]:
    role, content = message["role"], message["content"]
    if message.get("tool_calls"):
        raise ValueError(f"{source}: field {field!r} calls tools, which a prompt here cannot hold: drop the row")
    silent = content is None or (isinstance(content, str) and not content.strip())
    if role in ("system", "developer") and silent:
        return {"role": role, "content": content or ""}
    return {"role": role, "content": text(source, f"{field}.content", content)}
