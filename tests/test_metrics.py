"""Metrics files that a crash and a resume leave bit-identical, TensorBoard beside them, and the progress line."""

import contextlib
import fcntl
import io
import json
import os
import re
import struct
import subprocess
import termios

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from cero_jax.metrics import MetricsWriter, Progress

LABELS = {"length 2-4": 0.75, "wrong gold": 0.0}


def step_row(step):
    return {
        "kind": "step",
        "step": step,
        "epoch": step // 2,
        "spent": 32 * (step + 1),
        "prompt_ids": np.arange(3) + step,
        "reward": np.float32(0.1) * step,
        "loss": -0.25,
    }


def eval_row(step):
    return {"kind": "eval", "step": step, "spent": 32 * (step + 1), "accuracy": 0.5, "accuracy_by_label": LABELS}


def tensorboard_events(run_dir):
    """Every event in the order in which TensorBoard reads: by file name, then by place."""
    events = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)  # a record: length, its checksum, data, its checksum
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def shown(events):
    """{(tag, step): value} after what a START event at a step hides: that step and later ones seen before it."""
    points = {}
    for event in events:
        if event.session_log.status == SessionLog.START:
            points = {(tag, step): value for (tag, step), value in points.items() if step < event.step}
        for value in event.summary.value:
            points[value.tag, event.step] = value.simple_value
    return points


def write(run_dir, steps, position=None):
    writer = MetricsWriter(run_dir, position)
    for step in steps:
        writer.write(step_row(step), {"sample_seconds": 0.5})
        writer.write(eval_row(step), {})
        writer.write_samples("eval", 32 * (step + 1), [{"prompt_id": i, "completion": "ü" * step} for i in range(2)])
    position = writer.position()
    writer.close()
    return position


def test_rows_read_back(tmp_path):
    write(tmp_path, range(3))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["step", "eval"] * 3
    assert rows[2]["prompt_ids"] == [1, 2, 3]
    assert rows[2]["reward"] == float(np.float32(0.1))
    assert rows[1] == eval_row(0)
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert timings[2] == {"kind": "step", "step": 1, "spent": 64, "sample_seconds": 0.5}
    assert "seconds" not in (tmp_path / "metrics.jsonl").read_text()


def test_scalars_reach_tensorboard_over_rollouts(tmp_path):
    write(tmp_path, range(3))
    points = shown(tensorboard_events(tmp_path))
    assert {step for _, step in points} == {32, 64, 96}
    assert points["step/reward", 96] == pytest.approx(0.2)
    assert points["timings/sample_seconds", 32] == 0.5
    assert points["eval/accuracy_by_label/length_2-4", 64] == 0.75
    assert not any("prompt_ids" in tag for tag, _ in points)


@pytest.mark.parametrize("lost", [b"", b'{"kind": "st', b"\xff\n"])
def test_a_crash_after_the_checkpoint_leaves_no_trace(tmp_path, lost):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    write(whole, range(6))
    position = json.loads(json.dumps(write(broken, range(3))))
    write(broken, range(3, 5), position)  # not in any checkpoint
    assert write(broken, [], position) == position
    write(broken, range(3, 5), position)
    for name in ("metrics.jsonl", "timings.jsonl", "samples.jsonl"):
        with open(broken / name, "ab") as file:
            file.write(lost)
    write(broken, range(3, 6), position)
    for name in ("metrics.jsonl", "timings.jsonl", "samples.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert shown(tensorboard_events(broken)) == shown(tensorboard_events(whole))
    starts = [e.step for e in tensorboard_events(broken) if e.session_log.status == SessionLog.START]
    assert starts == [0, 97, 97, 97, 97]


def test_without_a_checkpoint_all_starts_afresh(tmp_path):
    write(tmp_path, range(5))
    write(tmp_path, range(1))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert {step for _, step in shown(tensorboard_events(tmp_path))} == {32}


def test_a_line_is_in_the_file_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(step_row(0), {})
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    writer.close()


def test_a_file_cut_short_is_refused(tmp_path):
    position = write(tmp_path, range(3))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 0 bytes, the checkpoint was written at \d+"):
        MetricsWriter(tmp_path, position)


@pytest.mark.parametrize("name", ["timings.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("kept", [None, 0, 0.5], ids=["deleted", "empty", "half"])
def test_what_is_not_the_record_may_be_lost(tmp_path, capsys, name, kept):
    position, path = write(tmp_path, range(4)), tmp_path / name
    whole = path.read_bytes()
    left = b"" if kept is None else whole[: int(kept * len(whole))]
    path.unlink() if kept is None else path.write_bytes(left)
    other = tmp_path / {"timings.jsonl": "samples.jsonl", "samples.jsonl": "timings.jsonl"}[name]
    before = other.read_bytes()
    write(tmp_path, range(4, 6), position)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} has {len(left)} bytes, the checkpoint was written at {len(whole)}" in line
    spent = [json.loads(row)["spent"] // 32 - 1 for row in path.read_text().splitlines()]
    assert set(spent) == ({0, 1, 4, 5} if kept else {4, 5})
    assert left[: left.rfind(b"\n") + 1] == path.read_bytes()[: left.rfind(b"\n") + 1]
    assert other.read_bytes().startswith(before)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 12


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    """Take all room that is left but some bytes of the pages that other files have begun."""
    with contextlib.suppress(OSError), open(folder / "filler", "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return folder / "filler"


def test_a_full_disk_under_all_but_the_metrics_costs_what_it_would_have_held_and_nothing_else(
    tmp_path, small_disk, capsys
):
    for name in ("tensorboard", "timings.jsonl", "samples.jsonl"):
        (tmp_path / name).symlink_to(small_disk / name)
    (small_disk / "tensorboard").mkdir()
    writer = MetricsWriter(tmp_path)

    def steps(several):
        for step in several:
            writer.write(step_row(step), {"sample_seconds": 0.5})
            writer.write_samples("train", 32 * (step + 1), [{"completion": "ü" * 300}])

    steps(range(3))
    filler = fill(small_disk)
    steps(range(3, 160))
    position = writer.position()
    filler.unlink()
    steps(range(160, 163))  # there is room again
    writer.position()
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(163))
    for name in ("timings.jsonl", "samples.jsonl"):
        spent = [json.loads(line)["spent"] // 32 - 1 for line in (tmp_path / name).read_text().splitlines()]
        assert spent[:3] + spent[-3:] == [0, 1, 2, 160, 161, 162]
        assert len(spent) < 163
    points = shown(tensorboard_events(tmp_path))  # whole records alone, or reading them would fail
    assert points["step/reward", 32] == 0
    assert points["step/reward", 32 * 163] == pytest.approx(16.2)
    assert len({step for _, step in points}) < 163
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for name in ("timings.jsonl", "samples.jsonl", "tensorboard"):
        assert sum(name in line and "No space left on device): the run goes on" in line for line in lines) == 1
    again = MetricsWriter(tmp_path, position)  # cut back to the checkpoint, wherever the others stood then
    assert again.position() == position
    again.close()


def test_metrics_that_cannot_be_written_are_one_message_and_no_half_line(small_disk):
    writer = MetricsWriter(small_disk)

    def steps():
        for step in range(1000):
            writer.write(step_row(step), {})

    with pytest.raises(OSError, match=r"metrics.jsonl cannot be written \(No space left on device\): make room"):
        steps()
    writer.close()
    lines = (small_disk / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    assert lines[-1].endswith(b"}\n")


def test_a_folder_that_tensorboard_cannot_have_is_said_once(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    write(tmp_path, range(3))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert capsys.readouterr().err.count("tensorboard cannot be written (File exists): the run goes on") == 1


def test_metrics_that_cannot_be_opened_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"metrics.jsonl cannot be written \(Is a directory\): mend it"):
        MetricsWriter(tmp_path)


def test_a_progress_line_that_nobody_can_read_stops_nothing():
    stream = open("/dev/full", "w")  # noqa: SIM115 (closing it raises)
    progress = Progress(100, stream=stream, every_seconds=0)
    progress.update(50, epoch=1)
    progress.close()
    with pytest.raises(OSError, match="No space left"):
        stream.close()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_line(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cero_jax.metrics.time.monotonic", lambda: now[0])
    stream = Terminal()
    progress = Progress(25600, initial=12800, stream=stream)
    now[0] = 110.0
    progress.update(12832, reward=0.521, accuracy=None)
    now[0] = 164.0
    progress.update(19200, reward=0.5, accuracy=0.8125, live=0.25, epoch=26)
    progress.close()
    lines = [line.rstrip() for line in stream.getvalue().split("\r")]
    assert "12832/25600 rollouts, 3.2/s, 1:06:30 left, reward 0.52" in lines
    # 80 columns: the epoch has no room
    assert lines[-1] == "19200/25600 rollouts, 100/s, 01:04 left, reward 0.50, accuracy 0.81, live 0.25"


@pytest.mark.parametrize(("columns", "rows", "figures"), [(80, 24, 2), (0, 0, 2), (60, 0, 1), (200, 50, 4), (9, 5, 0)])
def test_the_line_fits_the_terminal_that_there_is(columns, rows, figures, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cero_jax.metrics.time.monotonic", lambda: now[0])
    leader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with open(terminal, "w") as stream:
        progress = Progress(1_000_000, stream=stream)
        now[0] = 200.0
        progress.update(250_000, reward=0.5, accuracy=0.75, live=0.25, epoch=26)
        progress.close()
        shown = b""
        while b"\n" not in shown:
            shown += os.read(leader, 4096)
    os.close(leader)
    line = shown.decode().rstrip().split("\r")[-1].rstrip()
    assert line.startswith("250000/1000000 rollouts")
    assert len(line) < (columns or 80) or columns == 9
    assert len(re.findall("reward|accuracy|live|epoch", line)) == figures


def test_the_rate_leaves_out_the_time_to_compile_which_is_said(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("cero_jax.metrics.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(1000, stream=stream, every_seconds=0)
    now[0] = 140.0
    for seconds in (5.0, 40.0, 7.0):  # the first within the second; the last begins with what was heard before
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)
    jax.monitoring.record_event_duration_secs("/jax/checkpoint/write", 30.0)
    now[0] = 150.0
    progress.update(100)
    progress.update(200)
    progress.close()
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0)  # it listens no longer
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["100/1000 rollouts, 10.0/s, 01:30 left", "200/1000 rollouts, 20.0/s, 00:40 left"]
    assert capsys.readouterr().err == "compiled in 40 s, which the rate leaves out\n"


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cero_jax.metrics.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(10000, initial=5000, stream=stream)
    for second in range(25):
        now[0] = 101.0 + second
        progress.update(5000 + 100 * (second + 1), epoch=second)
    progress.close()
    assert "\r" not in stream.getvalue()
    lines = stream.getvalue().splitlines()
    assert [line.split(" ")[0] for line in lines] == ["5100/10000", "6100/10000", "7100/10000", "7500/10000"]
    # 2,500 left at 100 a second; what was spent before the resume does not count as speed
    assert lines[-1] == "7500/10000 rollouts, 100/s, 00:25 left, epoch 24"
