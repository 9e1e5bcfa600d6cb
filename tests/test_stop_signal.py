"""Ctrl-C and SIGTERM, sent for real: said at once, whatever the main thread does, and the second ends it."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cero_jax import stop_signal
from cero_jax.checkpoint import Cursor
from cero_jax.stop_signal import StopSignal, quit_while_starting
from train import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def said(monkeypatch):
    """What is said, and when."""
    lines = []
    monkeypatch.setattr(stop_signal, "say", lambda text: lines.append((text, time.monotonic())))
    return lines


@pytest.fixture
def quits(monkeypatch):
    """The statuses that the process would have ended with."""
    statuses = []
    monkeypatch.setattr(stop_signal.os, "_exit", statuses.append)
    return statuses


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def left_behind():
    """Whether there are more threads or open files than now; what others left open may be collected meanwhile."""
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    return lambda: threading.active_count() > threads or len(os.listdir("/proc/self/fd")) > files


def busy_in_c(seconds):
    """Keep the main thread where it runs no handler, as a long computation on a device does; returns when it ended."""
    rounds, took = 50_000, 0.0
    while took < seconds:
        began, rounds = time.monotonic(), 2 * rounds
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
        took = time.monotonic() - began
    return time.monotonic()


def test_the_first_is_said_at_once_and_the_second_quits_while_the_main_thread_is_busy(number, said, quits):
    stop = StopSignal()
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    threading.Timer(0.15, os.kill, (os.getpid(), number)).start()
    ended = busy_in_c(0.4)
    wait_for(lambda: quits)
    stop.close()
    assert stop.number == number
    assert quits == [128 + number]
    (first, first_at), (second, second_at) = said
    assert first == f"{signal.Signals(number).name}: stopping after this step; again to quit now"
    assert second == "quit: the same command goes on from the last checkpoint"
    assert first_at < second_at < ended
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_second_signal_acts_as_it_always_did(said, quits):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    stop = StopSignal()
    signal.raise_signal(signal.SIGINT)
    assert stop.number == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    stop.close()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    wait_for(lambda: said)
    assert not quits


def test_other_signals_are_none_of_its_business_and_nothing_is_left_behind(said):
    more = left_behind()
    handler = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    stop = StopSignal()
    signal.raise_signal(signal.SIGUSR1)
    stop.close()
    signal.signal(signal.SIGUSR1, handler)
    wait_for(lambda: not more())
    assert not said
    assert not stop.number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_so(said, quits, number):
    before = signal.signal(number, signal.SIG_IGN)
    stop = StopSignal()
    with quit_while_starting():
        signal.raise_signal(number)
    signal.raise_signal(number)
    time.sleep(0.05)
    assert signal.getsignal(number) == signal.SIG_IGN
    stop.close()
    assert signal.signal(number, before) == signal.SIG_IGN
    assert (stop.number, said, quits) == (0, [], [])


def test_a_run_that_fails_gives_the_handlers_back(number):
    def fail(state, cursor):
        assert signal.getsignal(number) != signal.SIG_DFL
        raise OSError("no disk")

    run: Any = SimpleNamespace(evaluate=fail, ended=lambda cursor: False, metrics=io.StringIO())
    more = left_behind()
    with pytest.raises(OSError, match="no disk"):
        train(run, SimpleNamespace(), Cursor({}, ""))  # type: ignore[arg-type]
    assert signal.getsignal(number) == signal.SIG_DFL
    assert run.metrics.closed
    wait_for(lambda: not more())


def test_ctrl_c_while_a_run_starts_is_one_line(said, quits):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with quit_while_starting():
        signal.raise_signal(signal.SIGINT)
        wait_for(lambda: quits)
    signal.signal(signal.SIGINT, before)
    assert [text for text, _ in said] == ["stopped while starting: the same command starts again"]
    assert quits == [130]


def test_ctrl_c_during_the_imports_leaves_no_traceback():
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the process inherits it where it is ignored
    process = subprocess.Popen([sys.executable, "train.py", "--help"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "numpy" in maps.read_text())  # which the first of the imports begins with
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert printed == ""
