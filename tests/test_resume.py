"""Killed at any time and resumed, a run ends as if it had not been: parameters, allocator, metrics, to the bit."""

import dataclasses
import json
import os
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
from cero_jax.run_directory import changes_to_say, check_resumable, open_run_dir
from cero_jax.saved_config import to_json
from cero_jax.sharding import MeshConfig
from cero_jax.tasks.dataset import Dataset

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("one_length")


@pytest.fixture(scope="module")
def whole(one_length, tmp_path_factory):
    """An uninterrupted run; its folder's cache serves the others."""
    work_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(tiny_config(work_dir)) == 0
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
    command = [sys.executable, "-m", "tests.tiny_run", str(cut), *(str(each) for end in ends for each in end)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    ended = re.findall(r"^(\w+) (\d+) ended with (-?\d+)$", done.stdout, re.MULTILINE)
    wanted = [(point, str(count), "143" if point.endswith("sigterm") else "-9") for point, count in ends]
    assert ended == wanted, done.stderr
    assert done.stdout.count("the same command goes on") == sum(point.endswith("sigterm") for point, _ in ends)
    assert train.main(tiny_config(cut)) == 0
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    (cursor, state), (cursor_whole, state_whole) = runs_end(cut), runs_end(whole)
    assert cursor.spent == cursor_whole.spent == 240
    for mine, theirs in zip(state, state_whole, strict=True):
        np.testing.assert_array_equal(mine, theirs)


BROKEN_SAVE = """
import shutil
from cero_jax.checkpoint import Checkpoints
from tests.tiny_run import one_length, tiny_config

one_length()
save, config = Checkpoints.save, tiny_config({work_dir!r}, checkpoint_every_steps=1)

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
        capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if "error" in line.lower() or "traceback" in line.lower()]
    assert len(said) == 1
    assert re.match(r"error: a checkpoint in .*broken/checkpoints could not be saved .* goes on", said[0])


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
    """Also where an earlier start, under other settings, ended before it saved anything."""
    work_dir = whole.parent / "twice"
    run, _, _ = runs.start(tiny_config(work_dir))
    run.close()
    assert json.loads((work_dir / "config.json").read_text())["seed"] == 0
    config = tiny_config(work_dir, task=FirstDigit(num_prompts=20, num_heldout=8), seed=1)
    run, _, _ = runs.start(config)
    run.close()
    assert json.loads((work_dir / "config.json").read_text())["seed"] == 1
    assert len(json.loads((work_dir / "prompts.json").read_text())["labels"]) == 20


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_goes_on(whole, tmp_path, capsys):
    """By itself, and to the same end, to the bit; an evaluation reads the one before, too, and moves nothing."""
    work_dir = tmp_path / "damaged"
    shutil.copytree(whole, work_dir)
    newest = max((work_dir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for arrays in (path for path in newest.rglob("d/*") if path.is_file()):  # not all of their bytes are read back
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 4
        arrays.write_bytes(content)
    assert train.main(tiny_config(work_dir)) == 0
    assert f"put aside as {newest.parent}/put_aside/{newest.name}" in capsys.readouterr().err
    assert (work_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    mine, theirs = runs_end(work_dir)[1], runs_end(whole)[1]
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    cursor = newest / "cursor/metadata"
    cursor.write_text(cursor.read_text().replace('"spent": 240', '"spent": 241'))
    assert restore_policy(work_dir, {}, {}).spent < 240
    assert f"{newest}: a damaged checkpoint" in capsys.readouterr().err
    assert newest.exists()


def test_a_finished_run_copied_elsewhere_says_so_without_a_warm_start(whole, tmp_path, capsys, monkeypatch):
    def started(*args):
        raise AssertionError("the policy that RL started from is not needed")

    monkeypatch.setattr(runs, "starting_policy", started)
    work_dir = tmp_path / "elsewhere" / "copy"
    shutil.copytree(whole, work_dir)
    assert train.main(tiny_config(work_dir)) == 0
    assert "has spent its budget" in capsys.readouterr().out


def test_metrics_without_a_checkpoint_are_put_aside_with_a_word(whole, tmp_path, capsys):
    work_dir = tmp_path / "lost"
    shutil.copytree(whole, work_dir)
    shutil.rmtree(work_dir / "checkpoints")
    (tmp_path / ".cache").symlink_to(whole.parent / ".cache")
    before = (work_dir / "metrics.jsonl").read_bytes()
    run, _, cursor = runs.start(tiny_config(work_dir))
    run.close()
    assert cursor.spent == 0
    assert (work_dir / "put_aside/metrics.jsonl").read_bytes() == before
    assert "put_aside/metrics.jsonl" in capsys.readouterr().err


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 7 on a host, since then")
file.flush()
print("held", flush=True)
time.sleep(100)
"""


def test_a_directory_is_held_by_one_process_and_a_dead_one_is_no_obstacle(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        refused = rf"^{tmp_path} is in use by process 7 on a host, since then: let that run end, or choose another"
        with pytest.raises(ValueError, match=refused):
            open_run_dir(tiny_config(tmp_path))
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    for _ in range(2):  # by this process twice, as after a run that failed
        open_run_dir(tiny_config(tmp_path))
    assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    third = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", third, str(tmp_path / "lock")], capture_output=True, text=True)
    assert "BlockingIOError" in done.stderr  # it is held now


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
    _, got = checkpoints.restore(cursor, like=Swapped(one * 0, one * 0))
    np.testing.assert_array_equal(got.successes, one)
    np.testing.assert_array_equal(got.failures, two)
    _, alone = checkpoints.restore(cursor, like=one * 0, part="failures")
    np.testing.assert_array_equal(alone, two)
    with pytest.raises(ValueError, match="/1 holds no mistakes: go on with"):
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
        del saved["checksum"]
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


def test_a_setting_that_changes_no_mathematics_is_said_and_gone_on_with():
    config = tiny_config("somewhere", task=Dataset(path="x.jsonl"))
    cursor = Cursor(config=to_json(config), prompts_hash="h")
    assert changes_to_say(cursor, config) == []
    changed = dataclasses.replace(
        config,
        name="renamed",
        mesh=MeshConfig(fsdp=2),
        model=dataclasses.replace(config.model, remat=True, attention="xla"),
        sampler=dataclasses.replace(config.sampler, slots=16, window=8),
        learner=dataclasses.replace(config.learner, rows_per_microbatch=4, logit_chunk_tokens=64),
        task=Dataset(path="y.jsonl", verifier_seconds=9.0, verifier_memory_mb=4096),
    )
    check_resumable(cursor, changed, "h")
    elsewhere = cursor._replace(devices="2 process(es), 16 device(s)")
    (line,) = changes_to_say(elsewhere, config)
    assert line.startswith("warning: 2 process(es), 16 device(s) before, 1 process(es), 8 device(s) now: the same math")
    bits, limits = "the run's last bits may be others", "which answers time out may change"
    said = {line.split()[1]: line for line in changes_to_say(cursor, changed)}
    for name in ("mesh.fsdp", "model.remat", "model.attention", "sampler.slots", "sampler.window",
                 "learner.rows_per_microbatch", "learner.logit_chunk_tokens"):  # fmt: skip
        assert said.pop(name).endswith(bits)
    for name in ("task.verifier_seconds", "task.verifier_memory_mb"):
        assert said.pop(name).endswith(limits)
    assert said == {}
    for name, value in {"max_completion_tokens": 9, "temperature": 0.5}.items():  # of the same pieces, and refused
        other = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, **{name: value}))
        with pytest.raises(ValueError, match=f"sampler.{name} was .* and is {value}"):
            check_resumable(cursor, other, "h")


def test_a_setting_newer_than_the_run_counts_as_its_default():
    """Which is what was done before there was one: else no run could be gone on with under the next version."""
    config = tiny_config("somewhere", task=Dataset(path="x.jsonl"))
    saved = to_json(config)
    del saved["overlong_tokens"], saved["learner"]["adam_eps"], saved["task"]["rewards"], saved["evaluation"]
    del saved["allocator"]["prior"], saved["mesh"]["fsdp"]
    cursor = Cursor(config=saved, prompts_hash="h")
    check_resumable(cursor, config, "h")
    assert changes_to_say(cursor, config) == []
    other = dataclasses.replace(
        config,
        overlong_tokens=4,
        learner=dataclasses.replace(config.learner, adam_eps=1e-5),
        task=Dataset(path="x.jsonl", rewards="correct=1, format=1"),
        allocator=dataclasses.replace(config.allocator, prior=(2.0, 1.0)),
    )
    refused = (
        r"allocator.prior was None and is \[2.0, 1.0\]; learner.adam_eps was 1e-08 and is 1e-05; overlong_tokens was 0 "
        r"and is 4; task.rewards was 'correct=1' and is 'correct=1, format=1'\. Give"
    )
    with pytest.raises(ValueError, match=refused):
        check_resumable(cursor, other, "h")
    gone = Cursor(config=to_json(config) | {"no_longer": True}, prompts_hash="h")
    with pytest.raises(ValueError, match="no_longer was True and is None"):
        check_resumable(gone, config, "h")


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "a\\b"])
def test_a_work_directory_that_orbax_reads_as_a_pattern_is_refused_before_any_work(tmp_path, name):
    config = tiny_config(tmp_path / name, task=Dataset(path="nowhere.jsonl"))  # which would be read first
    with pytest.raises(ValueError, match=r"the work directory .* holds .*, which would lose its checkpoints: choose"):
        runs.start(config)
    assert not (tmp_path / name).exists()


def test_an_address_is_no_path_and_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    for url in ("gs://bucket/runs", "s3://bucket/x", "file:///tmp/x"):
        with pytest.raises(ValueError, match=f"{url}: not a path on this machine"):
            runs.start(tiny_config(url, task=Dataset(path="nowhere.jsonl")))
        with pytest.raises(ValueError, match=f"{url}: not a path on this machine"):
            runs.start(tiny_config(tmp_path, model_folder=url))
        with pytest.raises(ValueError, match=f"{url}: not a path on this machine"):
            Dataset(path=url).build(0)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiny_config("~/runs/x").run_dir == tmp_path / "runs/x"
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/none/config.json"):
        runs.start(tiny_config(tmp_path, model_folder="~/none"))
    with pytest.raises(ValueError, match=r"~nobody-here/x: .* without ~"):
        tiny_config("~nobody-here/x").run_dir  # noqa: B018


def test_what_cannot_be_written_at_the_end_is_named_in_one_line(whole, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    run, state, cursor = runs.start(tiny_config(whole))
    monkeypatch.setattr(runs, "draw_report", fail)
    with pytest.raises(OSError, match=r"^.*/report.png could not be written \(.*the same command writes it") as caught:
        run.finish(state, cursor)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(runs.weights, "save", fail)
    run = run._replace(config=dataclasses.replace(run.config, model_folder=str(whole)))
    with pytest.raises(OSError, match=r"^.*/export-240 could not be written"):
        run.export(state, cursor)
