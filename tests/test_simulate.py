"""The simulator's command line, and logs in every shape with every fault."""

import importlib.util
import json

import numpy as np
import pytest

from cero_jax import simulate
from cero_jax.headroom import explain, headroom

COUNTS = {0: [0, 2, 4], 1: [4, 4], 2: [0, 0, 0]}  # prompt -> successes of 4 at each visit


def rows():
    for prompt, visits in COUNTS.items():
        for epoch, correct in enumerate(visits):
            yield from ({"prompt": f"p{prompt}", "epoch": epoch, "reward": float(i < correct)} for i in range(4))


@pytest.fixture(params=["jsonl", "csv", "counts", "parquet"])
def log(request, tmp_path):
    path = tmp_path / f"log.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    elif request.param == "csv":
        path.write_text(
            "prompt,epoch,reward\n" + "".join(f"{r['prompt']},{r['epoch']},{r['reward']}\n" for r in rows())
        )
    elif request.param == "counts":
        path.write_text("".join(json.dumps({"group_size": 4, "num_correct": c}) + "\n" for c in COUNTS.values()))
    elif importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows())), path)
    return path


def test_every_format_gives_the_same_counts(log):
    successes, rollouts = simulate.read_log(log)
    np.testing.assert_array_equal(successes, [[0, 2, 4], [4, 4, 0], [0, 0, 0]])
    np.testing.assert_array_equal(rollouts, [[4, 4, 4], [4, 4, 0], [4, 4, 4]])


def test_curves_follow_the_counts_and_ignore_visits_that_never_were():
    successes, rollouts = np.array([[0] * 9 + [8] * 9, [8, 8] + [0] * 16]), np.full((2, 18), 8)
    rollouts[1, 2:] = 0
    curves = simulate.success_curves(successes, rollouts, 6)
    assert np.all(np.diff(curves[:, 0]) > 0)
    assert curves[0, 0] < 0.01
    np.testing.assert_allclose(curves[:, 1], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no row in it"),
        ('{"prompt": 1, "epoch": 0}\n', r":1: no field 'reward' \(there are 'prompt', 'epoch'\): .* with --fields"),
        ('{"prompt": 1, "epoch": 0, "reward": 1}\n{"prompt"\n', r":2: broken JSON"),
        ("[1, 2]\n", r":1: not a JSON object"),
        ('{"prompt": 1, "epoch": "first", "reward": 1}\n', r":1: field 'epoch' is 'first', no number"),
        ('{"prompt": 1, "epoch": 0, "reward": NaN}\n', r":1: field 'reward' is nan, no number"),
        ('{"prompt": 1, "epoch": 0, "reward": null}\n', r":1: field 'reward' is None, no number"),
        ('{"prompt": "", "epoch": 0, "reward": 1}\n', r":1: field 'prompt' is empty"),
        ('{"prompt": 1, "prompt": 2, "epoch": 0, "reward": 1}\n', r":1: field 'prompt' is there twice"),
        (
            '{"group_size": 4, "num_correct": [1, 5]}\n',
            r":1: field 'num_correct' holds a count outside 0..group_size=4",
        ),
        ('{"group_size": 4, "num_correct": 3}\n', r":1: field 'num_correct' is '3': give a list, one count a visit"),
        ('{"group_size": "many", "num_correct": [3]}\n', r":1: field 'group_size' is 'many', no number"),
    ],
)
def test_a_bad_log_names_the_file_and_the_line(tmp_path, text, message):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        simulate.read_log(path)


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv"])
def test_a_log_from_another_machine_reads_alike(tmp_path, name):
    """A BOM, CRLF, blank lines, other names, nested fields: what an export or an editor makes of a log."""
    if name == "log.csv":
        lines = ["uid,step,score", *(f"{r['prompt']},{r['epoch']},{r['reward']}" for r in rows())]
        fields = ("uid", "step", "score")
    else:
        lines = [json.dumps({"info": {"uid": r["prompt"]}, "step": r["epoch"], "score": r["reward"]}) for r in rows()]
        fields = ("info.uid", "step", "score")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    successes, rollouts = simulate.read_log(tmp_path / name, fields)
    np.testing.assert_array_equal(successes, [[0, 2, 4], [4, 4, 0], [0, 0, 0]])
    np.testing.assert_array_equal(rollouts, [[4, 4, 4], [4, 4, 0], [4, 4, 4]])


def test_a_log_in_several_files_is_one_log(tmp_path):
    found = list(rows())
    for part, lines in enumerate((found[:7], found[7:])):
        (tmp_path / f"part{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    successes, _ = simulate.read_log(tmp_path / "part*.jsonl")
    np.testing.assert_array_equal(successes, [[0, 2, 4], [4, 4, 0], [0, 0, 0]])


CHAT = [{"role": "user", "content": "1 + 1?"}]
ROW = {"prompt": "p", "epoch": 0, "reward": 1}


@pytest.mark.parametrize(
    ("found", "right", "drawn"),
    [
        ([ROW | {"prompt": CHAT}, ROW | {"prompt": CHAT, "reward": 0}], [[1]], [[2]]),  # messages, as TRL writes them
        ([ROW | {"prompt": {"b": 1, "a": 2}}, ROW | {"prompt": {"a": 2, "b": 1}}], [[2]], [[2]]),
        ([ROW | {"prompt": 7}, ROW | {"prompt": 8}], [[1], [1]], [[1], [1]]),
        ([ROW | {"reward": [1.0]}, ROW | {"reward": [1, 0, 0.5], "epoch": 1}], [[1, 2]], [[1, 3]]),
        ([ROW | {"reward": True}, ROW | {"reward": False}, ROW | {"reward": "True"}], [[2]], [[3]]),
        ([ROW | {"reward": -1}, ROW | {"reward": 9}], [[1]], [[2]]),
        ([ROW | {"num_correct": None, "group_size": None}], [[1]], [[1]]),  # columns of the other kind of row
    ],
)
def test_logs_of_other_trainers_are_read(tmp_path, found, right, drawn):
    """Conversations as prompts, rewards in lists, booleans: as JSONL with a blank end, an array, and Parquet."""
    paths = [tmp_path / "log.jsonl", tmp_path / "log.json"]
    paths[0].write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, found)).encode() + b"\r\n\r\n \n")
    paths[1].write_text(json.dumps(found, indent=1))
    if importlib.util.find_spec("pyarrow") and len({type(row["reward"]) for row in found}) == 1:
        import pyarrow
        import pyarrow.parquet

        paths.append(tmp_path / "log.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), paths[-1])
    for path in paths:
        successes, rollouts = simulate.read_log(path)
        np.testing.assert_array_equal(successes, right)
        np.testing.assert_array_equal(rollouts, drawn)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"prompt": value}, r":1: field 'prompt' is ") for value in (None, True, [], {}, "")
    ] + [
        (ROW | {"reward": value}, r":1: field 'reward' is .*") for value in (
            None, [], [None], [[1]], {"a": 1}, "nan", "1_0", 10**400, [1, float("nan")], "right")
    ] + [
        (ROW | {"epoch": value}, r":1: field 'epoch' is .*, no number") for value in (None, [0], True, float("inf"), "")
    ] + [
        ({"group_size": size, "num_correct": counts}, message) for size, counts, message in (
            (4, [9], r":1: field 'num_correct' holds a count outside 0..group_size=4"),
            (4, [-1], r"outside 0..group_size=4"), (4, [1, None], r":1: field 'num_correct' is None, no number"),
            (None, [1], r":1: field 'group_size' is None"), (4, None, r":1: field 'num_correct' is None: give a list"),
            (4, [1.5], "must be whole"), (4.5, [1], "must be whole"), (0, [0], "must be whole, and it positive"),
            (-4, [], "must be whole"), (True, [1], "no number"), (4, [True], "no number"),
            (4, [float("nan")], "no number"), (4, [], "log.jsonl: 0 rollouts in it"), (2**31, [1], "fewer than 2\\^31"),
            (None, None, "no field 'prompt'"))
    ],
)  # fmt: skip
def test_a_log_that_cannot_be_right_is_refused(tmp_path, row, message):
    (tmp_path / "log.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message) as caught:
        simulate.read_log(tmp_path / "log.jsonl")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 300


@pytest.mark.parametrize(
    "wrong",
    [["--epochs=0"], ["--seeds=-1"], ["--prompts=nan"], ["--min-group=0"], ["--min-group=33"], ["--hopeless=nan"],
     ["--hopeless=1"], ["--prompts=100000000"], ["--picture=nowhere/x.png"], ["--log=."], ["--seeds=1e3"],
     ["--picture=gs://b/x.png"], [f"--log={'x' * 300}"]],
)  # fmt: skip
def test_wrong_settings_are_one_line_before_any_work(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        simulate.main(wrong)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("python -m cero_jax.simulate: error: ")


def test_a_missing_log_is_one_line_of_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        simulate.main(["--log", str(tmp_path / "none.jsonl")])
    assert "none.jsonl: no such file" in capsys.readouterr().err


def test_the_command_line_replays_a_log_and_says_what_it_cannot_know(tmp_path, capsys):
    path, picture = tmp_path / "log.jsonl", tmp_path / "replay.png"
    rng = np.random.default_rng(0)
    counts = rng.binomial(8, np.repeat(rng.beta(0.5, 0.5, (40, 1)), 6, 1))
    path.write_text("".join(json.dumps({"group_size": 8, "num_correct": c.tolist()}) + "\n" for c in counts))
    simulate.main(["--log", str(path), "--seeds", "2", "--picture", str(picture)])
    printed, progress = capsys.readouterr()
    dead = 100 * np.mean((counts == 0) | (counts == 8))
    assert f"{dead:.1f} % of them went to groups without variance" in printed
    assert explain(headroom(counts, np.full_like(counts, 8))) in printed
    assert "What a replay cannot know" in printed
    names = ("uniform", "variance", "knapsack", "cero_dual", "cero", "cero, told p")
    for name, line in zip(names, progress.splitlines(), strict=True):
        assert f"| {name} |" in printed
        assert line.startswith(f"{name}: 2 runs of 6 epochs in ")
    assert picture.stat().st_size > 1000


def test_hopeless_prompts_stay_hopeless_and_the_budget_is_spent():
    setup = {"num_prompts": 64, "num_epochs": 8, "total_budget": 2048, "min_group": 4, "tau": 32.0}
    world = simulate.drifting(64, hopeless=0.5)
    outcome = simulate.run_seeds(simulate.uniform, world, seeds=3, settings=setup)
    np.testing.assert_array_equal(np.asarray(outcome.spent_share), 1)
    np.testing.assert_allclose(outcome.hopeless_share, 0.5, atol=0.03)
    np.testing.assert_array_equal((np.asarray(outcome.success) == 0).sum(1), 32)


def test_the_value_of_a_run_is_that_of_its_rollouts():
    """Where the rates stand still, the increments of all epochs add up to v h(X / tau) of the rollouts at the end."""
    p = np.random.default_rng(0).beta(0.4, 0.6, 50)
    setup = {"num_prompts": 50, "num_epochs": 6, "total_budget": 1200, "min_group": 4, "tau": 24.0}
    world = simulate.replayed(np.repeat(p[None], 6, 0))
    outcome = simulate.run_seeds(simulate.cero, world, seeds=2, settings=setup)
    rollouts = np.asarray(outcome.rollouts, np.float64)
    np.testing.assert_array_equal(rollouts.sum(1), 1200)
    assert (rollouts[0] != rollouts[1]).any()
    by_hand = (p * (1 - p) * (1 - np.exp(-rollouts / 24))).sum(1)
    np.testing.assert_allclose(outcome.value, by_hand, rtol=1e-5)
    np.testing.assert_allclose(outcome.accuracy, p.mean(), rtol=1e-5)
