"""The graded equations of configs/equations.py: a task that a config file brings itself, through every command."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import train
from cero_jax import evaluate
from cero_jax.command_line import from_command_line
from cero_jax.report.__main__ import main as report
from cero_jax.tokenizer import ByteTokenizer

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "configs/equations.py")
BY_SIGN = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def solve(equation: str) -> int:
    left, sign, right = equation.split()
    return BY_SIGN[sign](int(left), int(right))


@pytest.fixture(params=[0, 1], scope="module")
def task(request):
    return from_command_line([CONFIG, "--task.max-prompt-tokens=99"]).task.build(request.param)


def test_every_answer_is_right_and_of_its_kind(task):
    for prompts in (task.train, task.heldout):
        for question, answer, kind in zip(prompts.questions, prompts.answers, prompts.labels, strict=True):
            *solved, asked = question.splitlines()
            assert all(solve(line.partition(" = ")[0]) == int(line.partition(" = ")[2]) for line in solved)
            left, sign, right = kind.split()
            a, shown, b = asked.removesuffix(" =").split()
            assert (len(a), shown, len(b)) == (int(left), sign, int(right))
            assert int(answer) == solve(asked.removesuffix(" =")) >= 0


def test_no_equation_stands_twice_or_is_solved_in_the_prompt(task):
    together = task.train.questions + task.heldout.questions
    asked = [question.splitlines()[-1] for question in together]
    assert len(set(asked)) == len(asked)
    answers = task.train.answers + task.heldout.answers
    assert not {f"{q} {a}" for q, a in zip(asked, answers, strict=True)} & set(together[0].splitlines()[:-1])


def test_as_many_of_each_kind(task):
    assert set(Counter(task.train.labels).values()) == {24}
    assert set(Counter(task.heldout.labels).values()) == {16}
    assert set(task.train.labels) == set(task.heldout.labels)


def test_a_completion_ends_with_its_line_and_the_tokenizer_given_is_left_as_it_was():
    given = ByteTokenizer()
    task = from_command_line([CONFIG, "--task.max-prompt-tokens=99"]).task.build(0, given)
    assert {ord("\n"), *ByteTokenizer.eos_ids} <= set(task.tokenizer.eos_ids)
    assert given.eos_ids == ByteTokenizer.eos_ids


SMALL = (
    "--task.max-prompt-tokens=99", "--task.train-of-kind=2", "--task.heldout-of-kind=1", "--allocator.total-budget=64",
    "--allocator.num-epochs=4", "--evaluation.rows=8", "--model.width=16", "--model.mlp-width=16",
    "--checkpoint-every-steps=2",
    "--learner.rows-per-microbatch=8",  # the tests have 8 devices
)  # fmt: skip


def test_a_task_of_a_config_file_goes_through_every_command(tmp_path, capsys):
    """Train, resume, refuse another setting, evaluate, report; from another folder than the file's.

    What a process of its own does is read by another: by this one, where its start would add nothing.
    """

    def command(*args):
        args = [sys.executable, *map(str, args)]
        return subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=900)

    def again(*args):
        assert train.main(from_command_line([CONFIG, *SMALL, f"--work-dir={run}", *args])) == 0
        return capsys.readouterr().out

    run = tmp_path / "run"
    done = command("train.py", CONFIG, *SMALL, f"--work-dir={run}")
    assert done.returncode == 0, done.stderr
    saved = json.loads((run / "config.json").read_text())
    assert saved["task"]["class"] == {"name": "Equations", "file": CONFIG}
    with pytest.raises(ValueError, match=r"task\.train_of_kind was 2 and is 3"):
        again("--task.train-of-kind=3")
    assert "has spent its budget" in again()
    longer = again("--allocator.total-budget=80", "--allocator.num-epochs=5", "--extend=True")
    assert "80 rollouts spent" in longer
    measured = command("-m", "cero_jax.evaluate", run, "--samples=2")
    assert measured.stdout.startswith("all"), measured.stderr
    with pytest.raises(SystemExit):
        evaluate.main([str(run), "--verifier=exact"])
    assert "which has no verifier" in capsys.readouterr().err
    report([str(run), "--prompt=3"])
    assert capsys.readouterr().out.startswith("prompt 3 (")
    with pytest.raises(SystemExit):
        from_command_line([CONFIG, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--task.train-of-kind INT Training prompts of each kind." in text
