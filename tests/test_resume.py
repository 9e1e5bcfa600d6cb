"""Killed at any time and resumed, a run ends as if it had not been: parameters, allocator, metrics, to the bit."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from tiny_run import FirstDigit, runs_end, tiny_config

import train
from cero_jax import run as runs
from cero_jax.checkpoint import LAYOUT, Checkpoints, Cursor
from cero_jax.evaluate import restore_policy
from cero_jax.run_directory import check_resumable

ROOT = Path(__file__).parent.parent


def run_in_process(*args):
    command = [sys.executable, "-m", "tests.tiny_run", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run; its folder's cache serves the others."""
    work_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = run_in_process(work_dir)
    assert done.returncode == 0, done.stderr
    return work_dir


def test_the_run_is_worth_interrupting(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert steps[-1]["spent"] == 240
    assert steps[-1]["optimizer_steps"] > 8
    assert 0.1 < np.mean([row["reward"] for row in steps]) < 0.9
    assert len({tuple(row["num_rollouts"]) for row in steps}) > 5  # the allocation changes


def test_kill_and_resume_is_bit_identical(whole):
    cut = whole.parent / "cut"
    # Before anything is saved, in the middle of a line, of a checkpoint, of an evaluation, of an epoch's beginning.
    ends = [
        ("evaluation_sigterm", 1), ("plan_sigterm", 1), ("step", 3), ("half_line", 6), ("checkpoint_write", 1),
        ("before_checkpoint", 1), ("evaluation", 1), ("sigterm", 2), ("plan", 2), ("checkpoint_write", 2),
    ]  # fmt: skip
    for point, count in ends:
        done = run_in_process(cut, point, count)
        assert done.returncode == (143 if point.endswith("sigterm") else -9), (
            point,
            count,
            done.returncode,
            done.stderr,
        )
        if point.endswith("sigterm"):
            assert "the same command goes on" in done.stdout
    done = run_in_process(cut)
    assert done.returncode == 0, done.stderr
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    (cursor, state), (cursor_whole, state_whole) = runs_end(cut), runs_end(whole)
    assert cursor.spent == cursor_whole.spent == 240
    for mine, theirs in zip(state, state_whole, strict=True):
        np.testing.assert_array_equal(mine, theirs)


BROKEN_SAVE = """
import shutil
from cero_jax.checkpoint import Checkpoints
from tests.tiny_run import tiny_config

save, config = Checkpoints.save, tiny_config({work_dir!r})

def save_into_a_file(self, cursor, state):
    if cursor.checkpoint_number == 1:
        self._manager.wait_until_finished()
        shutil.rmtree({work_dir!r} + "/checkpoints")
        open({work_dir!r} + "/checkpoints", "w").close()
    return save(self, cursor, state)

Checkpoints.save = save_into_a_file
"""


def test_a_failed_save_ends_the_run_with_one_message(whole):
    """Its writer threads never end: the process has to."""
    config_file = whole.parent / "broken_save.py"
    config_file.write_text(BROKEN_SAVE.format(work_dir=str(whole.parent / "broken")))
    done = subprocess.run(
        [sys.executable, "train.py", str(config_file)],
        capture_output=True, text=True, timeout=100, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"OSError: a checkpoint in .*broken/checkpoints could not be saved .* goes on", done.stderr)


def test_a_finished_run_says_so_and_an_extended_one_goes_on(whole, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    (whole / "report.png").unlink()
    assert train.main(tiny_config(whole)) == 0
    assert "has spent its budget" in capsys.readouterr().out
    assert (whole / "report.png").exists()
    assert (whole / "metrics.jsonl").read_bytes() == before

    longer = whole.parent / "longer"
    config = tiny_config(longer)
    assert train.main(config) == 0
    grown = dataclasses.replace(config.allocator, total_budget=320, num_epochs=8)
    with pytest.raises(ValueError, match=r"total_budget was 240 and is 320.*--extend=True"):
        train.main(dataclasses.replace(config, allocator=grown))
    assert train.main(dataclasses.replace(config, allocator=grown, extend=True)) == 0
    run, state, cursor = runs.start(dataclasses.replace(config, allocator=grown))
    run.close()
    assert cursor.finished
    assert cursor.spent == int(state.allocator.ledger.spent) == 320
    assert int(state.allocator.ledger.reserved) == 0


def test_what_is_read_of_a_run_is_what_it_ran_under(whole):
    """Also where an earlier start, under other settings, died before it saved anything."""
    work_dir = whole.parent / "twice"
    done = run_in_process(work_dir, "evaluation", 1)
    assert done.returncode == -9
    config = tiny_config(work_dir, task=FirstDigit(num_prompts=20, num_heldout=8), seed=1)
    run, _, _ = runs.start(config)
    run.close()
    assert json.loads((work_dir / "config.json").read_text())["seed"] == 1
    assert len(json.loads((work_dir / "prompts.json").read_text())["labels"]) == 20


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(whole, tmp_path):
    work_dir = tmp_path / "damaged"
    shutil.copytree(whole, work_dir)
    newest = max((work_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for path in newest.rglob("*"):
        if path.is_file() and "state" in str(path.relative_to(newest)):
            path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(ValueError, match=rf"{newest.name}: a checkpoint that cannot be read .*move it away"):
        runs.start(tiny_config(work_dir))
    shutil.move(newest, tmp_path)
    assert train.main(tiny_config(work_dir)) == 0
    assert (work_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_arrays_are_kept_by_name_and_the_parameters_can_be_read_alone(whole, tmp_path):
    """Fields of one shape that change places in the state are still restored each as itself."""

    class State(NamedTuple):
        successes: jax.Array
        failures: jax.Array

    class Swapped(NamedTuple):
        failures: jax.Array
        successes: jax.Array

    one, two = jax.numpy.arange(3.0), jax.numpy.arange(3.0) + 10
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    cursor = checkpoints.save(Cursor(config={}, prompts_hash=""), State(one, two))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    got = checkpoints.restore(cursor, like=Swapped(one * 0, one * 0))
    np.testing.assert_array_equal(got.successes, one)
    np.testing.assert_array_equal(got.failures, two)
    alone = checkpoints.restore(cursor, like=one * 0, part="failures")
    np.testing.assert_array_equal(alone, two)
    with pytest.raises(ValueError, match=r"a checkpoint that cannot be read \(ValueError: no mistakes in it"):
        checkpoints.restore(cursor, like=one * 0, part="mistakes")

    run, state, _ = runs.start(tiny_config(whole))
    run.close()
    policy = restore_policy(whole, {}, {})
    jax.tree.map(np.testing.assert_array_equal, policy.params, run.params(state))


def test_a_checkpoint_of_another_layout_is_refused_in_one_line(whole, tmp_path):
    work_dir = tmp_path / "older"
    shutil.copytree(whole, work_dir)
    for path in (work_dir / "checkpoints").glob("*/cursor/metadata"):
        saved = json.loads(path.read_text())
        assert saved.pop("layout") == LAYOUT
        path.write_text(json.dumps(saved))
    for reader in (lambda: runs.start(tiny_config(work_dir)), lambda: restore_policy(work_dir, {}, {})):
        with pytest.raises(ValueError, match=r"a checkpoint of layout 1, .* another --work-dir$") as caught:
            reader()
        assert "\n" not in str(caught.value)


def test_other_settings_or_prompts_are_refused(whole):
    config = tiny_config(whole)
    changed = dataclasses.replace(
        config, learner=dataclasses.replace(config.learner, clip_low=0.3), success_threshold=0.7
    )
    with pytest.raises(ValueError, match=r"learner.clip_low was 0.2 and is 0.3; success_threshold was 0.5 and is 0.7"):
        runs.start(changed)
    fine = dataclasses.replace(
        config, checkpoint_every_steps=9, evaluation=dataclasses.replace(config.evaluation, samples=3)
    )
    run, _, _ = runs.start(fine)
    run.close()
    checkpoints = Checkpoints(whole / "checkpoints")
    cursor = checkpoints.cursor()
    checkpoints.close()
    with pytest.raises(ValueError, match="other prompts"):
        check_resumable(cursor, run.config, "another hash")
