"""What a run leaves for people: three JSONL files, TensorBoard, one line of progress.

metrics.jsonl has rows of three kinds: "epoch" as one is allocated (docs/glossary.md says what its figures are), "step"
and "eval". It and samples.jsonl hold only what the state determines, so a resumed run's equal an uninterrupted one's to
the bit (but where a verification timed out); timings.jsonl holds the rest.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter
from tqdm import tqdm

FILES = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")
LINE = "{n}/{total} rollouts, {rate_noinv_fmt}, {remaining} left{postfix}"  # in tqdm's names


class MetricsWriter:
    """Appends rows to the files of a run directory.

    position: what `position()` gave at the checkpoint that is resumed: whatever was appended later, a half-written
    line included, is cut off, and hidden from TensorBoard. None starts the run afresh. Raises ValueError where a file
    is shorter than that.
    """

    def __init__(self, run_dir: Path | str, position: dict[str, int] | None = None):
        run_dir = Path(run_dir)
        start = dict.fromkeys((*FILES, "spent"), 0) | (position or {})
        self._spent = start["spent"]
        paths = [run_dir / name for name in FILES]
        for path in paths:
            size = path.stat().st_size if path.exists() else 0
            if size < start[path.name]:
                raise ValueError(
                    f"{path} has {size} bytes, the checkpoint was written at {start[path.name]}: the file was changed "
                    "since; put it back, or start anew in another directory"
                )
        self._files = [open(path, "ab") for path in paths]  # noqa: SIM115 (held until `close`)
        for path, file in zip(paths, self._files, strict=True):
            file.seek(file.truncate(start[path.name]))
        self._tensorboard = SummaryWriter(
            str(run_dir / "tensorboard"),
            # TensorBoard forgets this step and later ones; a run that starts afresh in a used directory, all of them
            purge_step=self._spent + 1 if position else 0,
            flush_secs=10,
            filename_suffix=f".{time.time_ns()}",  # the name has whole seconds, in which two starts would share it
        )

    def write(self, row: dict[str, Any], timings: dict[str, Any]) -> None:
        """Append `row` (with "kind", "step" and "spent", in rollouts) and, with those three, `timings` (in seconds).

        Scalars of both, also of nested dicts, go to TensorBoard over the rollouts spent. Arrays are written as lists.
        """
        self._spent = int(row["spent"])
        timings = {key: row[key] for key in ("kind", "step", "spent")} | timings
        for file, values, prefix in zip(self._files[:2], (row, timings), (row["kind"], "timings"), strict=True):
            line = json.dumps(values, default=lambda array: array.tolist())
            file.write(line.encode() + b"\n")
            file.flush()  # to the system: it outlives this process, however that ends
            for tag, value in _scalars(json.loads(line), prefix):
                self._tensorboard.add_scalar(tag, value, self._spent)

    def write_samples(self, kind: str, spent: int, samples: list[dict[str, Any]]) -> None:
        """Append completions for a person to read, with the kind ("train", "eval") and the rollouts spent by then."""
        self._files[2].writelines(
            json.dumps({"kind": kind, "spent": spent} | each).encode() + b"\n" for each in samples
        )
        self._files[2].flush()

    def position(self) -> dict[str, int]:
        """How far the files reach, on disk by now: bytes of each, and rollouts spent. What a checkpoint stores."""
        for file in self._files:
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in zip(FILES, self._files, strict=True)} | {"spent": self._spent}

    def close(self) -> None:
        """Close all files; nothing can be written after."""
        for file in self._files:
            file.close()
        self._tensorboard.close()


def _scalars(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and key not in ("step", "spent"):
            yield f"{prefix}/{key}".replace(" ", "_"), value  # TensorBoard allows no space in a tag


class Progress:
    """One line that moves: rollouts spent of the budget, rollouts a second, time left, and the last figures.

    total, initial: rollouts of the whole run, and those spent before it was resumed. Where `stream` (stderr) is no
    terminal, a plain line every `every_seconds` takes its place.
    """

    def __init__(self, total: int, initial: int = 0, stream: TextIO | None = None, every_seconds: float = 10.0):
        self._stream = sys.stderr if stream is None else stream
        self._total, self._initial, self._spent = total, initial, initial
        self._every_seconds = every_seconds
        self._start, self._printed = time.monotonic(), float("-inf")
        self._figures = ""
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                file=self._stream,
                unit="",
                bar_format="{bar}| " + LINE,
                dynamic_ncols=True,
            )

    def update(self, spent: int, **figures: float | int | None) -> None:
        """Show `spent` rollouts and the figures by name, e.g. epoch=3, reward=0.52; None leaves one out."""
        self._spent = spent
        self._figures = ", ".join(
            f"{name} {value}" if isinstance(value, int) else f"{name} {value:.2f}"
            for name, value in figures.items()
            if value is not None
        )
        if self._bar is not None:
            self._bar.n = spent
            self._bar.set_postfix_str(self._figures)
        elif time.monotonic() - self._printed >= self._every_seconds:
            self._print()

    def close(self) -> None:
        """Leave the last line standing."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._start
        line = tqdm.format_meter(
            self._spent, self._total, elapsed, initial=self._initial, postfix=self._figures, unit="", bar_format=LINE
        )
        print(line, file=self._stream, flush=True)
