"""Verifiers in processes of their own, where none of them can stop the run: whatever hangs, dies or eats is killed.

Workers are spawned (forking a process in which JAX has started deadlocks), run no main module again and import no jax.
The parent enforces the time limit by killing, and the kernel the memory limit. Each worker leads a session of its own:
a signal to the run's process group does not reach it, and what its verifier started ends with it, but for what began a
session of its own. Built on pebble.
"""

import contextlib
import importlib
import inspect
import logging
import os
import resource
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import CancelledError, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.machinery import ModuleSpec
from multiprocessing import connection, parent_process, popen_spawn_posix, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from cero_jax.rewards import ERROR, TIMED_OUT, Verdict, Verifier, verdict
from cero_jax.terminal import printable

MAX_WORKERS = 16  # where nobody says: they share one pipe
RENEWALS = 3  # times that a broken pool is made anew for the same batch
START_SECONDS = 120  # for a worker's imports
LOOK_SECONDS = 1.0  # between two looks at whether the pool is still there
OUT_OF_MEMORY = 77  # exit code of a worker that reached its limit: its memory may never come back, so it ends

ORPHAN_SECONDS = 5.0  # beyond the limit, after which an answer ends its worker where no parent is left to do so
HELD_OFF = (signal.SIGTERM, signal.SIGINT)  # from a worker that has no session of its own yet

_starting = threading.Lock()


class Pool:
    """The verifier `module:function` run in worker processes; what goes wrong there is a status, never an exception.

    function: of (question, completion, answer), as `module:function`; the module is looked for as the caller would. Its
      `warm_up()`, where it has one, is called before the first answer.
    seconds: wall-clock limit of one answer; memory_mb: address space of a worker; workers: processes, None one
      a core and at most 16.
    The processes start with the first answer and end with this one. Raises ImportError without pebble.
    """

    def __init__(self, function: str, *, seconds: float = 3.0, memory_mb: int = 2048, workers: int | None = None):
        if not seconds > 0 or memory_mb < 256 or (workers is not None and workers < 1):
            raise ValueError(
                f"verifier: seconds={seconds} must be positive, memory_mb={memory_mb} at least 256, workers={workers} "
                "at least 1"
            )
        self.function, self.seconds, self.memory_mb = function, seconds, memory_mb
        self.workers = workers or min(MAX_WORKERS, os.cpu_count() or 1)
        self._logged = self._stuck = False
        self._pool = self._new()

    def __call__(self, question: str, completion: str, answer: str) -> Verdict:
        """The verdict on one answer."""
        return self.many([(question, completion, answer)])[0]

    def many(self, asked: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        """The verdicts on (question, completion, answer) each, in order. Blocks until the last is there."""
        verdicts: list[Verdict | None] = [None] * len(asked)
        for attempt in range(1 + RENEWALS):
            waiting = [i for i, found in enumerate(verdicts) if found is None]
            if not waiting:
                break
            if not self._pool.active or self._stuck:
                self.close()
                self._pool, self._stuck = self._new(), False
            futures = []
            with contextlib.suppress(RuntimeError):  # the pool broke meanwhile: what is not scheduled is asked again
                futures += (self._pool.schedule(_verify, args=asked[i], timeout=self.seconds) for i in waiting)
            for i, future in zip(waiting, futures, strict=False):
                verdicts[i] = self._outcome(future, first=attempt == 0)
        found = [each or Verdict(0.0, ERROR, "the verifiers' processes broke again and again") for each in verdicts]
        self._log_first_error(found)
        return found

    def check(self) -> None:
        """Raise ValueError where the function cannot be imported, or takes other arguments."""
        try:
            failure = self._pool.schedule(_loaded).result(START_SECONDS)
        except TimeoutError:
            failure = f"its import has not ended after {START_SECONDS} s"
        except BrokenProcessPool:
            failure = "its import ends the process"
        if failure:
            self.close()
            missing = failure.startswith("ModuleNotFoundError")
            looked_for = f"looked for {_search_path()}: put its folder on PYTHONPATH; " if missing else ""
            raise ValueError(
                f"verifier={self.function!r} cannot be loaded: {failure} ({looked_for}memory_mb={self.memory_mb})"
            )

    def close(self) -> None:
        """End the workers."""
        self._pool.stop()
        self._pool.join()

    def _outcome(self, future, first: bool) -> Verdict | None:
        """What became of an answer; None where it is to be asked again.

        That is where it was not looked at, because the pool broke before, and, on the first attempt, where a signal
        ended its worker: that may have come from outside.
        """
        from pebble import ProcessExpired

        try:
            self._wait(future)
            return None if self._stuck else future.result()
        except TimeoutError:
            return Verdict(0.0, TIMED_OUT, f"after {self.seconds:g} s")
        except ProcessExpired as error:
            if first and error.exitcode < 0:
                return None
            why = "out of memory" if error.exitcode == OUT_OF_MEMORY else f"exit code {error.exitcode}"
            return Verdict(0.0, ERROR, f"the worker died: {why}")
        except (BrokenProcessPool, CancelledError):
            return None
        except Exception as error:  # it could not be sent over: an odd string or result
            return Verdict(0.0, ERROR, f"{type(error).__name__}: {error}"[:500])

    def _wait(self, future) -> None:
        """Wait until the future is done, or the pool is seen to be stuck.

        A worker killed at a bad moment may end the pool's threads and leave its futures open for ever. Answers are
        taken in turn, so that the next of them is never further off than a worker's start and its own limit.
        """
        until = time.monotonic() + START_SECONDS + self.seconds
        while not self._stuck and not wait([future], LOOK_SECONDS).done:
            ended = not self._pool.active and not wait([future], LOOK_SECONDS).done
            self._stuck = ended or time.monotonic() > until

    def _new(self):
        from pebble import ProcessPool

        settings = (self.function, self.memory_mb * 2**20, self.seconds + ORPHAN_SECONDS)
        return ProcessPool(self.workers, initializer=_start, initargs=settings, context=_Spawn())

    def _log_first_error(self, verdicts: list[Verdict]) -> None:
        for each in verdicts:
            if each.status == ERROR and not self._logged:
                self._logged = True
                logging.getLogger("cero_jax").warning(
                    "verifier %s: %s (no evidence; later errors are only counted)",
                    self.function,
                    printable(each.extracted),
                )


def _search_path() -> str:
    """Where this process, and so a worker, looks for a module, in words: what is installed counts as one place."""
    installed = sysconfig.get_paths()
    places = [os.path.realpath(place) for place in sys.path if os.path.isdir(place or ".")]  # "": the working directory
    standard = os.path.realpath(installed["stdlib"])
    packages = {os.path.realpath(installed[name]) for name in ("purelib", "platlib")}
    own = [each for each in places if each not in packages and not f"{each}{os.sep}".startswith(f"{standard}{os.sep}")]
    return " ".join(["in", *(f"{place}," for place in dict.fromkeys(own)), "and among the installed packages"])


class _Popen(popen_spawn_posix.Popen):
    """Ends what a worker has started, by its process group, with the worker."""

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):  # another thread was first
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | flag):
                    self._send_signal(signal.SIGKILL)  # it has ended; until it is reaped the number is no other's
        return super().poll(flag)

    def _send_signal(self, sig: int) -> None:  # of terminate() and kill(): at once, and to the whole group
        if self.returncode is None:
            for end in (os.killpg, os.kill):  # it leads no group before it has a session of its own
                with contextlib.suppress(ProcessLookupError):
                    end(self.pid, signal.SIGKILL)


class _Process(SpawnProcess):
    """Spawned without the caller's main module, which would import jax and start a run in every worker."""

    @staticmethod
    def _Popen(process_obj) -> _Popen:
        return _Popen(process_obj)

    def start(self) -> None:
        main: Any = sys.modules["__main__"]
        with _starting:
            resource_tracker.ensure_running()  # starting it lets the signals through again
            kept = main.__spec__
            main.__spec__ = ModuleSpec("__main__", None)  # the child takes it that there is nothing to import
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_OFF)  # the child inherits it
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                main.__spec__ = kept


class _Spawn(SpawnContext):
    Process = _Process  # type: ignore[assignment]


# From here on: in the worker.

_function: Verifier | None = None
_failure = ""  # why there is none
_orphan_seconds = 0.0


def _start(function: str, memory_bytes: int, orphan_seconds: float) -> None:
    """A session and limits, then the verifier: its imports are not on any answer's clock."""
    global _function, _failure, _orphan_seconds
    _orphan_seconds = orphan_seconds
    os.setsid()
    for number in HELD_OFF:
        signal.signal(number, signal.SIG_IGN)  # drops what came meanwhile
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_OFF)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, _, name = function.partition(":")
    try:
        imported = importlib.import_module(module)
        getattr(imported, "warm_up", bool)()
        found = getattr(imported, name)
        inspect.signature(found).bind("question", "completion", "answer")
        _function = found
    except BaseException as error:  # any exception: a worker that fails to start would break the whole pool
        _failure = _one_line(error)


def _end_with_parent() -> None:
    """In the worker, a thread: end the session once the run is gone, however that ended."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _verify(question: str, completion: str, answer: str) -> Verdict:
    """In the worker: the verdict, or what was raised, in one line."""
    if _function is None:
        return Verdict(0.0, ERROR, _failure)
    signal.setitimer(signal.ITIMER_REAL, _orphan_seconds)  # the kernel ends it then: SIGALRM has no handler
    try:
        result = verdict(_function(question, completion, answer))
        return result._replace(extracted=result.extracted[:500])
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:  # SystemExit among them
        return Verdict(0.0, ERROR, _one_line(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _loaded() -> str:
    """In the worker: why there is no function; "" where there is."""
    return _failure


def _one_line(error: BaseException) -> str:
    where = ""
    with contextlib.suppress(Exception):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if frame.filename.startswith("<frozen") else f" ({frame.filename}:{frame.lineno})"
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:400] + where
