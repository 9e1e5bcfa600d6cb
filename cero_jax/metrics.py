"""What a run leaves for people: three JSONL files, TensorBoard, W&B where it is asked for, one line of progress.

metrics.jsonl has rows of three kinds: "epoch" as one is allocated (docs/glossary.md says what its figures are), "step"
and "eval". It and samples.jsonl hold only what the state determines, so a resumed run's equal an uninterrupted one's to
the bit (but where a verification timed out); timings.jsonl holds the rest.
"""

import contextlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from cero_jax import hosts
from cero_jax.pace import Compiling
from cero_jax.terminal import say
from cero_jax.weights_and_biases import WeightsAndBiases

RECORD = "metrics.jsonl"
FILES = (RECORD, "timings.jsonl", "samples.jsonl")


class MetricsWriter:
    """Appends rows to the files of a run directory.

    metrics.jsonl is the record of the run: where it cannot be written, OSError names it. The others may fail, on a full
    disk or another: each says so once, and the run goes on without what they miss.

    position: what `position()` gave at the checkpoint that is resumed: whatever was appended later, a half-written
    line included, is cut off, and hidden from TensorBoard. None starts the run afresh. Where a file is shorter than
    that, or gone, the run goes on behind its last whole line, with a word. Raises ValueError where that is
    metrics.jsonl, or one cannot be opened.
    wandb: where scalars and an evaluation's completions go too.
    """

    def __init__(
        self, run_dir: Path | str, position: dict[str, int] | None = None, wandb: WeightsAndBiases | None = None
    ):
        run_dir, self._wandb = Path(run_dir), wandb
        start = dict.fromkeys((*FILES, "spent"), 0) | (position or {})
        self._spent, self._failed = start["spent"], set[str]()
        paths = [run_dir / name for name in FILES]
        for path in paths:
            size = path.stat().st_size if path.exists() else 0
            if size < start[path.name]:
                found = f"{path} has {size} bytes, the checkpoint was written at {start[path.name]}"
                if path.name == RECORD:
                    raise ValueError(
                        f"{found}: the file was changed since; put it back, or start anew in another directory"
                    )
                say(f"warning: {found}: what is missing there is lost, and the run goes on")
                start[path.name] = path.read_bytes().rfind(b"\n") + 1 if size else 0
        self._files = [_open(path) for path in paths]
        for path, file in zip(paths, self._files, strict=True):
            file.seek(file.truncate(start[path.name]))
        self._events: FileIO | None = None
        with self._may_fail(run_dir / "tensorboard"):
            # TensorBoard forgets this step and later ones; a run that starts afresh in a used directory, all of them.
            self._events = _open_events(run_dir / "tensorboard", self._spent + 1 if position else 0)

    def write(self, row: dict[str, Any], timings: dict[str, Any]) -> None:
        """Append `row` (with "kind", "step" and "spent", in rollouts) and, with those three, `timings` (in seconds).

        Scalars of both, also of nested dicts, go to TensorBoard and W&B over the rollouts spent. Arrays are written as
        lists.
        """
        self._spent = int(row["spent"])
        timings = {key: row[key] for key in ("kind", "step", "spent")} | timings
        lines = [json.dumps(values, default=lambda array: array.tolist()) for values in (row, timings)]
        with _named(self._files[0]):
            _append(self._files[0], lines[0].encode() + b"\n")
        with self._may_fail(self._files[1].name):
            _append(self._files[1], lines[1].encode() + b"\n")
        scalars = [*_scalars(json.loads(lines[0]), row["kind"]), *_scalars(json.loads(lines[1]), "timings")]
        if self._events is not None:
            with self._may_fail(self._events.name):
                values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars]
                _append(self._events, _record(step=self._spent, summary=Summary(value=values)))
        if self._wandb is not None:
            self._wandb.write(self._spent, dict(scalars))

    def write_samples(self, kind: str, spent: int, samples: list[dict[str, Any]]) -> None:
        """Append completions for a person to read, with the kind ("train", "eval") and the rollouts spent by then."""
        lines = [json.dumps({"kind": kind, "spent": spent} | each).encode() + b"\n" for each in samples]
        with self._may_fail(self._files[2].name):
            _append(self._files[2], b"".join(lines))
        if self._wandb is not None and kind == "eval":
            self._wandb.write_completions(spent, samples)

    def end(self, picture: Path | None = None) -> None:
        """Let W&B have the report's picture, and close there."""
        if self._wandb is not None:
            self._wandb.end(picture)

    def position(self) -> dict[str, int]:
        """How far the files reach, on disk by now: bytes of each, and rollouts spent. What a checkpoint stores."""
        with _named(self._files[0]):
            os.fsync(self._files[0].fileno())
        for file in self._files[1:]:
            with self._may_fail(file.name):
                os.fsync(file.fileno())
        return {name: file.tell() for name, file in zip(FILES, self._files, strict=True)} | {"spent": self._spent}

    def close(self) -> None:
        """Close all files; nothing can be written after."""
        for file in (*self._files, self._events):
            if file is not None:
                with contextlib.suppress(OSError):  # what was written was written at once
                    file.close()

    @contextlib.contextmanager
    def _may_fail(self, path: Any) -> Iterator[None]:
        """Say once that this file cannot be written, and go on."""
        try:
            yield
        except OSError as error:
            if str(path) not in self._failed:
                say(f"warning: {path} cannot be written ({error.strerror}): the run goes on, and some of it is lost")
            self._failed.add(str(path))


@contextlib.contextmanager
def _named(file: FileIO) -> Iterator[None]:
    """Name the file that cannot be written, in one line."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{file.name} cannot be written ({error.strerror}): make room or mend the folder; the same command goes on "
            "from the last checkpoint"
        ) from error


def _open(path: Path) -> FileIO:
    """A file to append to, unbuffered: what is written outlives this process, however that ends."""
    try:
        return open(path, "ab", buffering=0)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): mend it, or choose another --work-dir"
        ) from error


def _append(file: FileIO, data: bytes) -> None:
    """Append all of the data, or nothing: what a full disk took of it is cut off again."""
    start, rest = file.tell(), memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.seek(file.truncate(start))
        raise


def _open_events(folder: Path, purge_step: int) -> FileIO:
    """A new file for TensorBoard, which reads a folder's files by name. It hides what others hold from that step on."""
    folder.mkdir(exist_ok=True)
    nanoseconds = time.time_ns()  # as the end of the name: two starts may share a second
    name = f"events.out.tfevents.{nanoseconds // 10**9}.{socket.gethostname()}.{nanoseconds}"
    file = open(folder / name, "ab", buffering=0)  # noqa: SIM115 (held until `close`)
    _append(file, _record(file_version="brain.Event:2"))
    _append(file, _record(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
    return file


def _record(**event: Any) -> bytes:
    """An event as TensorBoard reads it: its length, a checksum of that, the event, a checksum of it."""
    data = Event(wall_time=time.time(), **event).SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


class Unwritten:
    """The metrics and the progress of a run's other processes: the first writes and shows them."""

    def write(self, row: dict[str, Any], timings: dict[str, Any]) -> None: ...

    def write_samples(self, kind: str, spent: int, samples: list[dict[str, Any]]) -> None: ...

    def position(self) -> dict[str, int]:
        return {}

    def end(self, picture: Path | None = None) -> None: ...

    def update(self, spent: int, **figures: float | int | None) -> None: ...

    def close(self) -> None: ...


def say_once(text: str) -> None:
    """`say`, once for all processes of a run."""
    if hosts.leads():
        say(text)


def _scalars(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and key not in ("step", "spent"):
            yield f"{prefix}/{key}".replace(" ", "_"), value  # TensorBoard allows no space in a tag


class Progress:
    """One line that moves: rollouts spent of the budget, rollouts a second, time left, and the last figures.

    total, initial: rollouts of the whole run, and those spent before it was resumed. Where `stream` (stderr) is no
    terminal, a plain line every `every_seconds` takes its place. The rate leaves out the time to compile, which is said
    once.
    """

    def __init__(self, total: int, initial: int = 0, stream: TextIO | None = None, every_seconds: float = 10.0):
        self._stream = sys.stderr if stream is None else stream
        self._total, self._initial, self._spent = total, initial, initial
        self._every_seconds = every_seconds
        self._start, self._printed = time.monotonic(), float("-inf")
        self._compiling: Compiling | None = Compiling()
        self._figures: list[str] = []
        self._bar = None
        with contextlib.suppress(OSError):  # here and below: a terminal that is gone, a log on a full disk
            if self._stream.isatty():
                # nrows: a terminal may say that it has none, and then nothing would be shown
                self._bar = tqdm(total=total, file=self._stream, bar_format="{desc}", nrows=20)

    def update(self, spent: int, **figures: float | int | None) -> None:
        """Show `spent` rollouts and the figures by name, e.g. reward=0.52, epoch=3; None leaves one out."""
        if self._spent == self._initial and self._compiling and (seconds := self._compiling.seconds) >= 1:
            say(f"compiled in {seconds:.0f} s, which the rate leaves out")
        self._spent = spent
        self._figures = [
            f"{name} {value}" if isinstance(value, int) else f"{name} {value:.2f}"
            for name, value in figures.items()
            if value is not None
        ]
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.set_description_str(self._line(_columns(self._stream) - 1))
            elif time.monotonic() - self._printed >= self._every_seconds:
                self._print()

    def close(self) -> None:
        """Leave the last line standing."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.close()
            else:
                self._print()
        if self._compiling:
            self._compiling.close()
            self._compiling = None

    def _print(self) -> None:
        self._printed = time.monotonic()
        print(self._line(), file=self._stream, flush=True)

    def _line(self, most: int | None = None) -> str:
        """The line, of `most` characters: figures for which there is no room are left out, the last first."""
        compiling = self._compiling.seconds if self._compiling else 0.0
        seconds = time.monotonic() - self._start - compiling
        rate = (self._spent - self._initial) / seconds if seconds > 0 else 0.0
        left = tqdm.format_interval((self._total - self._spent) / rate) if rate else "?"
        speed = f"{rate:.{1 if rate < 100 else 0}f}/s"
        parts = [f"{self._spent}/{self._total} rollouts", speed, f"{left} left", *self._figures]
        while most is not None and len(parts) > 1 and len(", ".join(parts)) > most:
            parts.pop()
        return ", ".join(parts)


def _columns(stream: TextIO) -> int:
    """Of a terminal; 80 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80
