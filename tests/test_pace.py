"""Where the time of a step goes, stalls by name, and which steps a profiler traces."""

import gzip
import json

import jax.numpy as jnp
import pytest

from cero_jax import pace
from cero_jax.pace import Clock, Profile, Seconds, parsed


@pytest.fixture
def now(monkeypatch):
    """The time, in a list, to be set."""
    time = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: time[0])
    return time


def test_a_batchs_time_is_parted_by_phase_and_what_is_beside_is_left_out(now):
    clock = Clock()
    now[0] += 7  # two steps: 4 s drawn, 1 s waited for verdicts, 0.5 and 0.75 learned, 0.75 of the host's own
    assert clock.step(Seconds(4, 1, steps=2), 0.5) == ({}, "")
    timings, told = clock.step(Seconds(4, 1, steps=2), 0.75)
    assert timings["batch_seconds"] == 7
    assert timings["phase_seconds"] == {"draw": 4, "verify": 1, "learn": 1.25, "host": 0.75}
    assert timings["device_idle_at_least"] == 1.75 / 7
    assert told == ""
    with clock.beside():
        now[0] += 50
    now[0] += 3
    timings, _ = clock.step(Seconds(2, 0), 1)
    assert timings["batch_seconds"] == 3
    assert timings["phase_seconds"]["host"] == 0
    assert Seconds(4, 1, steps=2).of_a_step == 2.5


def test_a_step_that_takes_ten_medians_is_said_with_what_it_waited_for(now):
    clock = Clock()

    def step(drawing, waiting):
        now[0] += drawing + waiting
        return clock.step(Seconds(drawing, waiting), 0)[1]

    assert [step(200, 0), *(step(2, 0) for _ in range(pace.FIRST - 1))] == [""] * pace.FIRST  # the first compiles
    assert step(2, 17) == ""
    assert step(2, 28) == "a stall: 30.0 s, 15 times the median; verify 28.0 s"
    assert step(2, 0) == ""


def test_the_steps_named_are_traced_once(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(pace.jax.profiler, "start_trace", called.append)
    monkeypatch.setattr(pace.jax.profiler, "stop_trace", lambda: called.append("stopped"))
    profile = Profile("10:12", tmp_path)
    for step in range(8, 14):
        profile.at(step)
        called.append(step)
    assert called == [8, 9, str(tmp_path), 10, 11, "stopped", 12, 13]
    unfinished = Profile("3:9", tmp_path)
    unfinished.at(5)
    unfinished.close()
    unfinished.close()
    assert called[-2:] == [str(tmp_path), "stopped"]
    never = Profile(None, tmp_path)
    never.at(0)
    never.close()
    assert called[-1] == "stopped"
    for wrong in ("10", "12:10", "a:b", "3:3", "-1:2"):
        with pytest.raises(ValueError, match=f"profile_steps='{wrong}' must be FIRST:END, such as 10:12"):
            parsed(wrong)


def test_a_trace_holds_what_was_run_meanwhile(tmp_path):
    profile = Profile("0:1", tmp_path)
    profile.at(0)
    jnp.ones(3).sum().block_until_ready()
    profile.at(1)
    (trace,) = tmp_path.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("reduce_sum" in event.get("name", "") for event in events)
    assert next(tmp_path.rglob("*.xplane.pb")).stat().st_size > 0
