"""Where a run's time goes, as its host sees it; which steps stall; a profiler's trace of some of them."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

STALL = 10  # medians
MEMORY, FIRST = 50, 10  # sampling batches that the median is taken over: at most, at least


class Seconds(NamedTuple):
    """What the steps of a sampling batch took before they were learned from."""

    drawing: float  # until its last rollout was drawn
    waiting: float  # from then on until the last was verified
    steps: int = 1  # in the batch

    @property
    def of_a_step(self) -> float:
        """A step's share of both."""
        return (self.drawing + self.waiting) / self.steps


class Clock:
    """Parts the time between sampling batches by what the host did or waited for in it."""

    def __init__(self):
        self._since, self._beside, self._learning, self._steps = time.perf_counter(), 0.0, 0.0, 0
        self._usual = deque[float](maxlen=MEMORY)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is no part of a step: an evaluation, a save."""
        began = time.perf_counter()
        yield
        self._beside += time.perf_counter() - began

    def step(self, seconds: Seconds, learning: float) -> tuple[dict, str]:
        """Take in a step that took `learning` seconds to learn from, and `seconds` with the others of its batch.

        Returns, with the last step of a batch, its seconds by phase as timings; and a word where that took more than
        STALL times the median, else "".
        """
        self._learning, self._steps = self._learning + learning, self._steps + 1
        if self._steps < seconds.steps:
            return {}, ""
        now = time.perf_counter()
        total = now - self._since - self._beside
        phases = {"draw": seconds.drawing, "verify": seconds.waiting, "learn": self._learning}
        phases["host"] = max(total - sum(phases.values()), 0.0)
        self._since, self._beside, self._learning, self._steps = now, 0.0, 0.0, 0
        told = ""
        if len(self._usual) >= FIRST and total > STALL * (usual := statistics.median(self._usual)):
            longest = max(phases, key=lambda name: phases[name])
            told = f"a stall: {total:.1f} s, {total / usual:.0f} times the median; {longest} {phases[longest]:.1f} s"
        self._usual.append(total)
        idle = (phases["verify"] + phases["host"]) / total
        return {"batch_seconds": total, "phase_seconds": phases, "device_idle_at_least": idle}, told


class Compiling:
    """How long JAX has been compiling in this process since this was made, tracing and reading its cache among it."""

    def __init__(self):
        self._since, self._spans = time.monotonic(), list[tuple[float, float]]()  # rising, none touching another
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds: what is compiled within or beside another thing counts once."""
        return sum(end - begin for begin, end in self._spans)

    def close(self) -> None:
        """Listen no longer."""
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.monotonic()
            begin = max(end - duration_secs, self._since)
            while self._spans and self._spans[-1][1] >= begin:
                begin = min(begin, self._spans.pop()[0])
            self._spans.append((begin, end))


class Profile:
    """A trace of the steps that "10:12" names, for TensorBoard or Perfetto, by each process into its own folder."""

    def __init__(self, steps: str | None, folder: Path):
        self._first, self._end = parsed(steps)
        self._folder, self._running = folder, False

    def at(self, step: int) -> None:
        """Begin or end the trace where `step` steps are done."""
        wanted = self._first <= step < self._end
        if wanted and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif not wanted:
            self.close()

    def close(self) -> None:
        """End the trace, if one is under way."""
        if self._running:
            jax.profiler.stop_trace()
        self._running = False


def parsed(steps: str | None) -> tuple[int, int]:
    """The first step and the end of "10:12"; of None such that nothing lies between. Raises ValueError for others."""
    if steps is None:
        return 0, 0
    first, _, end = steps.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"profile_steps={steps!r} must be FIRST:END, such as 10:12 for steps 10 and 11")
    return int(first), int(end)
