"""A dry run says what a run would begin with, leaves no trace, and fails as the run would."""

import dataclasses
import fcntl
import json
import re
from pathlib import Path

import pytest
from tiny_run import tiny_config

import train
from cero_jax.command_line import from_command_line
from cero_jax.config import AllocatorConfig
from cero_jax.dry_run import _prompts, dry_run
from cero_jax.evaluation import EvaluationConfig
from cero_jax.pieces import build
from cero_jax.run_directory import check_free
from cero_jax.tasks.dataset import Dataset

ROOT = Path(__file__).resolve().parent.parent


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_says_what_a_run_would_begin_with_and_leaves_no_trace(tmp_path, capfd):
    config = tiny_config(tmp_path / "work" / "run", dry_run=True)
    assert train.main(config) == 0
    assert list(tmp_path.iterdir()) == []
    said = capfd.readouterr().out
    assert re.search(r"prompt 0, 25 tokens:\n    [0-9]{2,24}\.*=\n", said)
    assert "24 prompts of 25 to 25 tokens (median 25) to train on, 8 prompts of 25 to 25 tokens" in said
    assert "memory on each device: about " in said
    assert re.search(r"240 rollouts in 6 epochs, at least 15 steps of up to 16; the first epoch: 40 rollouts of ", said)
    assert re.search(r"compiled in [\d.]+ s: sampling [\d.]+, learning [\d.]+", said)
    assert f"nothing was drawn or written; the run would begin in {tmp_path / 'work' / 'run'}" in said


def test_the_rendered_prompt_and_its_gold_answer_through_the_verifier(tmp_path):
    rows = [{"question": f"What is {n} + {n}?\nSay it.", "answer": f"{2 * n}"} for n in range(20)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = Dataset(str(path), template="Q: {question}\nA: ", num_heldout=4, rewards="correct=1, format=0.5")
    tiny = tiny_config(tmp_path / "run", task=task)
    shown, gold, counted = _prompts(build(tiny))
    (number,) = re.findall(r"What is (\d+) \+", shown)
    question = f"Q: What is {number} + {number}?\nSay it.\nA: "
    assert shown == "\n".join([f"prompt 0, {len(question)} tokens:", *(f"    {x}" for x in question.splitlines())])
    boxed = re.escape(repr(rf"\boxed{{{2 * int(number)}}}"))
    assert re.search(f"completion, {boxed}: right, reward 1.5, correct 1, format 1, read as '{2 * int(number)}'", gold)
    held = "4 prompts of 29 to 31 tokens (median 31) held out; padded to 31 tokens"
    assert counted == f"16 prompts of 29 to 31 tokens (median 29) to train on, {held}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocator": AllocatorConfig(total_budget=1, max_group=8)}, "total_budget=1 is smaller than one group"),
        ({"evaluation": EvaluationConfig(rows=15)}, "evaluation.rows=15 and"),
        ({"work_dir": "a*b"}, r"holds \*"),
        ({"work_dir": f"{__file__}/run"}, r"cannot write to the work directory .*/run: .* Not a directory: '.*\.py'"),
        ({"task": Dataset("none.jsonl")}, "none.jsonl: no such file"),
        ({"model_folder": "no/folder"}, "no/folder"),
        ({"warm_start": 7}, "warm_start.rows_per_step=7 must be a multiple of data x fsdp = 8"),
    ],
    ids=lambda each: "" if isinstance(each, str) else next(iter(each)),
)
def test_it_fails_as_the_run_would(tmp_path, changes, message):
    config = tiny_config(tmp_path / "run")
    if "warm_start" in changes:
        changes = {"warm_start": dataclasses.replace(config.warm_start, rows_per_step=7)}
    with pytest.raises((ValueError, OSError), match=message):
        dry_run(dataclasses.replace(config, **changes))
    assert tree(tmp_path) == {}


def test_a_directory_that_is_held_is_refused_and_left_alone(tmp_path):
    (tmp_path / "lock").write_text("process 7 on a, since then\n")
    with open(tmp_path / "lock") as lock:  # as another process would have it: by a description of its own
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use by process 7 on a, since then: let that run end"):
            check_free(tmp_path)
    check_free(tmp_path)
    assert tree(tmp_path) == {tmp_path / "lock": b"process 7 on a, since then\n"}
    check_free(tmp_path / "new" / "below")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("written", ["--dry-run", "--dry-run=True", "--dry_run=True"])
def test_the_command_line_takes_it_with_and_without_a_value(written, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert from_command_line(["configs/chain_sum.py", written]).dry_run
    assert not from_command_line(["configs/chain_sum.py"]).dry_run
