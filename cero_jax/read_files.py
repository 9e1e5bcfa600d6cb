"""Rows of JSONL, CSV and Parquet files, and the text in their fields.

What is wrong with one is a single line that names the file, the row and the field.
"""

import csv
import glob
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def local_path(given: str) -> Path:
    """A path as a user gave it, with `~`, which a shell leaves as it is behind `=`, resolved.

    Raises ValueError for what lies on no file system of this machine, like gs://bucket/runs.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given):
        raise ValueError(f"{given}: not a path on this machine: copy it here, or mount it, and give its path")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{given}: {error} Give the path without ~") from error


def find_files(pattern: str) -> list[Path]:
    """The files of a path or glob ("data/**/*.jsonl"), sorted. Raises FileNotFoundError, or ValueError at a folder."""
    path = local_path(pattern)
    if path.is_file():
        return [path]
    if path.exists():
        raise ValueError(f"{pattern}: not a regular file: give the path of a file, or a glob of files")
    found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not found:
        raise FileNotFoundError(f"{pattern}: no such file: give the path of a JSONL, CSV or Parquet file, or a glob")
    return found


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:row", row) of each row; numbers of JSONL and CSV are text, as they are written.

    A file ending in .parquet is Parquet, one ending in .csv is CSV with the fields' names in its first line, others are
    JSONL, an object a line. Raises ValueError naming what is wrong, and where.
    """
    reader = {".parquet": _read_parquet, ".csv": _read_csv}.get(path.suffix.lower(), _read_jsonl)
    return reader(path)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends; a BOM is dropped. Raises ValueError where it is not UTF-8."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                try:
                    yield line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line: save it as UTF-8"
                    ) from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """CRLF and blank lines are fine."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip(" \t\n\r\v\f"):
            yield f"{path}:{number}", _object(f"{path}:{number}", line.rstrip("\r\n"))


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """CRLF, blank lines and quoted fields over several lines are fine; a row is known by its first line."""
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


def _object(source: str, line: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            key = next(key for i, (key, _) in enumerate(pairs) if key in [k for k, _ in pairs[:i]])
            raise KeyError(key)
        return row

    try:
        row = json.loads(line, parse_float=str, parse_int=str, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: broken JSON at column {error.colno} ({error.msg}): mend the line") from error
    except RecursionError as error:
        raise ValueError(f"{source}: JSON nested too deep: mend or drop the line") from error
    except KeyError as error:
        raise ValueError(f"{source}: field {error} is there twice in one object: keep one of them") from error
    if not isinstance(row, dict):
        raise ValueError(f"{source}: not a JSON object: expected {{...}} with the fields by name")
    return row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet needs pyarrow: pip install 'cero_jax[parquet]', or give JSONL or CSV"
        ) from error
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


def messages(source: str, field: str, value: Any) -> list[dict[str, str]]:
    """A question as the messages of a chat: a list of {"role", "content"} as it is, text as one of the user's."""
    if not isinstance(value, list):
        return [{"role": "user", "content": text(source, field, value)}]
    if not value or not all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in value):
        shown = json.dumps(value, default=repr)[:40]
        raise ValueError(
            f"{source}: field {field!r} is {shown}, neither text nor a number nor a list of messages with role and "
            "content: mend it"
        )
    return [{key: text(source, f"{field}.{i}.{key}", each[key]) for key in ("role", "content")}
            for i, each in enumerate(value)]  # fmt: skip
