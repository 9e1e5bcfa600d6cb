"""Verifiers in processes of their own: each way to go wrong is made for real, and the other rows stand."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from user_verifiers import misbehave

from cero_jax.rewards import ERROR, RIGHT, TIMED_OUT, WRONG, Verdict, verdict
from cero_jax.rewards.pool import Pool

FOLDER = os.path.dirname(__file__)


@pytest.fixture(scope="module")
def pool():
    # 256 MB are eaten within the second on a busy machine too
    pool = Pool("user_verifiers:misbehave", seconds=1.0, memory_mb=256, workers=2)
    yield pool
    pool.close()


def many(pool, *completions):
    return pool.many([("q", completion, "gold") for completion in completions])


def test_rewards_keep_their_order(pool):
    texts = ["gold" if i % 3 == 0 else f"other {i}" for i in range(200)]
    assert [each.status for each in many(pool, *texts)] == [RIGHT if i % 3 == 0 else WRONG for i in range(200)]
    assert pool("q", "gold", "gold") == Verdict(1.0, RIGHT)
    assert misbehave("q", "gold", "gold") == 1.0
    assert pool.many([]) == []


@pytest.mark.parametrize(
    ("what", "status", "why"),
    [
        ("raise", ERROR, r"KeyError: 'a bug\\nof mine' \("),
        ("hang", TIMED_OUT, "after 1 s"),
        ("compute", TIMED_OUT, "after 1 s"),
        ("ignore", TIMED_OUT, "after 1 s"),
        ("eat", ERROR, "the worker died: out of memory"),
        ("die", ERROR, "the worker died: exit code -9"),
        ("leave", ERROR, "SystemExit: 0"),
        ("quit", ERROR, "the worker died: exit code 3"),
        ("nan", ERROR, "ValueError: it gave nan: a reward must be finite"),
        ("text", ERROR, "ValueError: it gave 'right': give a number"),
        ("none", ERROR, "ValueError: it gave None: give a number"),
        ("list", ERROR, "ValueError: it gave [1.0]: give a number"),
        ("bool", ERROR, "ValueError: it gave True: give a number"),
        ("numeral", ERROR, "ValueError: it gave '1': give a number"),
    ],
)
def test_what_goes_wrong_is_a_status_and_the_other_rows_stand(pool, what, status, why):
    started = time.monotonic()
    verdicts = many(pool, "gold", what, "gold", "no", what, "gold")
    assert time.monotonic() - started < 20  # the limit, the kill and two workers' start; the rest for a busy machine
    assert [each.reward for each in verdicts] == [1, 0, 1, 0, 0, 1]
    assert [each.status for each in verdicts] == [RIGHT, status, RIGHT, WRONG, status, RIGHT]
    assert verdicts[1].extracted.startswith(why.replace(r"\\", "\\").replace(r"\(", "("))


@pytest.mark.parametrize(
    "wrong",
    [None, [1.0], True, np.True_, "1", np.ones(1), {}, Verdict(None, RIGHT), Verdict(True, RIGHT), ("1", RIGHT)],
)  # pyright: ignore[reportArgumentType]
def test_what_is_no_reward_is_refused(wrong):
    with pytest.raises(ValueError, match=f"it gave {re.escape(repr(wrong))}: give a number, or a Verdict"):
        verdict(wrong)


@pytest.mark.parametrize("reward", [1, 0.75, np.float32(0.75), np.int64(1), np.ones(()), Verdict(np.float32(1), RIGHT)])
def test_any_kind_of_number_is_a_reward(reward):
    assert verdict(reward).status == RIGHT
    assert type(verdict(reward).reward) is float


def test_a_verdict_holds_plain_values_whatever_a_verifier_put_there():
    """What it read goes into samples.jsonl: a Fraction there ended the run."""
    assert verdict(Verdict(np.float32(1), RIGHT, Fraction(3, 4))) == Verdict(1.0, RIGHT, "3/4")  # type: ignore[arg-type]
    assert json.dumps(verdict(Verdict(np.float32(1), np.str_(RIGHT), np.int64(7)))) == '[1.0, "right", "7", {}]'


def is_running(pid):
    """Whether there is such a process, and not only what is left of it for its parent to read."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for_the_end_of(pids, seconds=30):
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))


def test_an_answer_whose_worker_was_killed_once_is_asked_again(pool, tmp_path):
    assert pool(str(tmp_path / "asked"), "once", "once") == Verdict(1.0, RIGHT)


def test_what_a_verifier_started_ends_with_its_worker(pool, tmp_path):
    paths = tmp_path / "late", tmp_path / "left"
    verdicts = pool.many([(str(paths[0]), "parent", ""), (str(paths[1]), "leave a child", "")])
    assert [each.status for each in verdicts] == [TIMED_OUT, ERROR]
    assert verdicts[1].extracted == "the worker died: exit code 3"
    pids = [path.read_text().strip() for path in paths]
    assert all(pids)
    wait_for_the_end_of(pids)


def test_a_verdict_of_the_users_own_comes_through(pool):
    assert many(pool, "object") == [Verdict(0.25, "no answer", "seen")]


def test_workers_import_no_jax_and_run_no_main_module_again(pool):
    assert "jax" in sys.modules  # this process has it
    _, _, rest = many(pool, "where")[0].extracted.partition("[")
    assert rest == "] None"


def test_a_worker_killed_from_outside_is_replaced(pool):
    for _ in range(2):
        before = {each.extracted.split()[0] for each in many(pool, *["where"] * 40)}
        for pid in before:
            os.kill(int(pid), signal.SIGKILL)
        verdicts = many(pool, *["gold", "no"] * 10, "where")
        assert [each.reward for each in verdicts] == [1.0, 0.0] * 10 + [0.0]
        assert verdicts[-1].extracted.split()[0] not in before


def test_a_pool_whose_threads_ended_with_answers_open_is_made_anew(monkeypatch):
    """Once in many kills of a worker: seen as a run that waited for ever."""
    pool = Pool("user_verifiers:misbehave", seconds=1.0, workers=1)
    assert many(pool, "gold")[0].reward == 1
    broken = pool._pool
    broken.stop()
    broken.join()
    monkeypatch.setattr(type(broken), "active", property(lambda self: self is not broken or not asked))
    asked = []
    schedule = broken.schedule
    monkeypatch.setattr(broken, "schedule", lambda *args, **kwargs: asked.append(args) or Future())
    assert schedule is not broken.schedule
    assert [each.reward for each in many(pool, "gold", "no")] == [1, 0]
    assert asked
    assert pool._pool is not broken
    pool.close()


def test_the_first_error_is_logged_once(caplog):
    pool = Pool("user_verifiers:misbehave", workers=1)
    many(pool, "raise", "raise")
    many(pool, "raise")
    pool.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "user_verifiers:misbehave: KeyError" in line
    assert "user_verifiers.py:" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("user_verifiers:no_such", "AttributeError: module 'user_verifiers' has no attribute 'no_such'"),
    ],
)
def test_a_function_that_is_not_there_is_refused(function, why, monkeypatch):
    monkeypatch.syspath_prepend("/no/such/folder")
    pool = Pool(function, workers=1)
    with pytest.raises(ValueError, match=f"verifier='{function}' cannot be loaded: {why}") as refused:
        pool.check()
    message = str(refused.value)
    assert ("looked for in" in message) == (FOLDER in message) == ("put its folder on PYTHONPATH" in message)
    assert (FOLDER in message) == function.startswith("no_such")  # a folder where it really looked
    assert "/no/such/folder" not in message
    assert "site-packages" not in message
    assert many(pool, "gold")[0].status == ERROR
    pool.close()


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"memory_mb": 10}, {"workers": 0}])
def test_limits_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="=".join(map(str, *wrong.items()))):
        Pool("user_verifiers:length", **wrong)


def test_a_script_is_not_run_again_and_its_workers_end_with_it_alone(tmp_path):
    """As `python train.py` does it: a main module with no guard, jax imported, killed in the middle.

    A SIGTERM to all of its process group, as schedulers send it, which it may answer by saving, costs no answer.
    """
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys, threading
            import jax
            jax.numpy.zeros(2) + 1
            print("main runs", flush=True)
            from cero_jax.rewards.pool import Pool
            pool = Pool("user_verifiers:misbehave", workers=2)
            print(*(each.extracted for each in pool.many([("", "where", "")] * 40)), sep="\\n", flush=True)
            if sys.argv[1:]:
                pool.many([(sys.argv[1], "parent", "")] * 8)
            noted = []
            signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
            pool = Pool("user_verifiers:misbehave", workers=2)
            for after in (0.05, 0.3, 0.8, 1.5):  # while workers start, and while they judge
                threading.Timer(after, os.killpg, (0, signal.SIGTERM)).start()
            while len(noted) < 4:
                judged = {each.status for each in pool.many([("", "slow", "")] * 10)}
                assert judged == {"right"}, judged
            """
        )
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join((FOLDER, os.path.dirname(FOLDER)))}
    how = {"text": True, "env": env, "start_new_session": True}  # so that a signal to its group is to no other
    ended = subprocess.run([sys.executable, script], capture_output=True, check=True, timeout=300, **how)
    lines = ended.stdout.splitlines()
    assert lines.count("main runs") == 1
    assert len(lines) == 41
    assert all(line.endswith("[] None") for line in lines[1:])
    assert ended.stderr == ""
    children = tmp_path / "children"
    killed = subprocess.Popen([sys.executable, script, children], stdout=subprocess.PIPE, **how)
    assert killed.stdout is not None
    lines = [killed.stdout.readline() for _ in range(41)]
    while not children.exists() or not children.read_text().endswith("\n"):
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    killed.stdout.close()
    wait_for_the_end_of([line.split()[0] for line in (*lines[1:], *ended.stdout.splitlines()[1:])])
    wait_for_the_end_of(children.read_text().split())


@pytest.mark.parametrize(
    ("function", "why"),
    [("user_verifiers:NOT_A_FUNCTION", "not a callable"), ("user_verifiers:two_arguments", "too many positional"),
     ("ends_the_process:anything", "its import ends the process")],
)  # fmt: skip
def test_a_verifier_that_cannot_be_one_is_refused_at_the_start(function, why, tmp_path, monkeypatch):
    (tmp_path / "ends_the_process.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = Pool(function, workers=1)
    with pytest.raises(ValueError, match=why):
        pool.check()
