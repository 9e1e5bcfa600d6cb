"""A terminal that is gone: what would have been said is lost, and nothing else."""

import contextlib
import fcntl
import os
import sys
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cero_jax import hosts, run
from cero_jax.checkpoint import Checkpoints, Cursor, fail_at_once
from cero_jax.evaluation import Evaluation, EvaluationConfig
from cero_jax.metrics import Progress
from cero_jax.pace import Clock
from cero_jax.run import Run
from cero_jax.run_directory import hold, set_metrics_aside
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.warm_start import WarmStartConfig, _imitate


def save_where_another_lies(folder):
    (folder / "checkpoints/1").mkdir(parents=True)
    checkpoints = Checkpoints(folder / "checkpoints")
    assert checkpoints.save(Cursor({}, ""), {"x": np.ones(3, np.float32)}).checkpoint_number == 1
    checkpoints.close()
    assert [path.name for path in (folder / "checkpoints/put_aside").iterdir()] == ["1"]


def begin_over_metrics(folder):
    (folder / "metrics.jsonl").write_text("{}\n")
    set_metrics_aside(folder)
    assert not (folder / "metrics.jsonl").exists()


def hold_where_there_are_no_locks(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError("no locks")))
        hold(folder)
    assert (folder / "lock").read_text()


def imitate(folder):
    nothing: Any = None
    task, config = ChainSum(num_prompts=8, num_heldout=4).build(0), WarmStartConfig(num_steps=2, rows_per_step=4)
    step = lambda state, batch, rate: (state, jnp.float32(0))  # noqa: E731
    with pytest.raises(AttributeError, match="params"):  # of the state, which is None: behind all steps
        _imitate(config, step, nothing, task, seed=0, max_tokens=25)


def show_progress(folder):
    sys.stderr.isatty = lambda: True  # type: ignore[method-assign]
    progress = Progress(100)
    progress.update(50, epoch=1)
    progress.close()


def tell(folder):
    hosts.tell("that all is well")


def fail(folder):
    exits = []
    for error in (OSError("a disk"), KeyError("a bug")):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(OSError):
            patch.setattr(os, "_exit", exits.append)
            sys.stdout.write("no whole line")
            try:
                raise error
            except Exception:
                fail_at_once(OSError)
    assert exits == [1, 1]


@pytest.mark.parametrize(
    "act",
    [fail, save_where_another_lies, begin_over_metrics, hold_where_there_are_no_locks, imitate, show_progress, tell],
)
def test_a_terminal_that_is_gone_stops_nothing(tmp_path, monkeypatch, act):
    gone = [open("/dev/full", "w", buffering=1) for _ in range(2)]  # noqa: SIM115 (closing it raises)
    monkeypatch.setattr(sys, "stdout", gone[0])
    monkeypatch.setattr(sys, "stderr", gone[1])
    act(tmp_path)
    for stream in gone:
        with contextlib.suppress(OSError):
            stream.close()


def test_what_an_evaluation_shows_is_one_line_of_known_length(monkeypatch, capsys):
    texts = {"question": "1+1" * 400, "completion": "two\x1b[2J\nwords " * 99, "answer": "2", "reward": 1.0}
    found = Evaluation(1.0, {}, {}, texts, [], {})
    monkeypatch.setattr(run, "evaluate", lambda *args: found)
    without = SimpleNamespace(success_threshold=0.5, lowest_reward=0.0, evaluation=EvaluationConfig(), seed=0)
    metrics = SimpleNamespace(write_samples=lambda *args: None)
    fake: Any = SimpleNamespace(
        config=without,
        params=lambda state: None,
        clock=Clock(),
        sample=None,
        task=None,
        log=lambda *a: None,
        metrics=metrics,
        ended=lambda cursor: False,
    )
    Run.evaluate(fake, SimpleNamespace(), Cursor({}, "", spent=1200))  # type: ignore[arg-type]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("    1,200 rollouts: held-out accuracy 1.000; question '1+11+1")
    assert "1+1" * 20 in line
    assert r"completion 'two\x1b[2J\nwords two" in line
    assert line.endswith(" ..., answer '2', reward 1.0")
    assert len(line) < 300
