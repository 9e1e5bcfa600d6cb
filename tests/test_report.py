"""Reading a run and drawing it: shares by hand, seeds averaged, and one clear error for a broken run."""

import json
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest

from cero_jax.evaluation import Score, scores_table
from cero_jax.metrics import MetricsWriter
from cero_jax.report import picture
from cero_jax.report import read_run as reading
from cero_jax.report.__main__ import main as report
from cero_jax.rewards import STATUSES

LABELS = ["wrong gold", "length 13-18", "length 2-4", "length 2-4"]


def step_row(step, epoch, spent, ids, rollouts, correct, live=0.5):
    return {
        "kind": "step", "step": step, "epoch": epoch, "spent": spent, "prompt_ids": ids, "num_rollouts": rollouts,
        "num_correct": correct, "live_share": live,
    }  # fmt: skip


def eval_row(step, spent, accuracy):
    return {"kind": "eval", "step": step, "epoch": 0, "spent": spent, "accuracy": accuracy, "accuracy_by_label": {}}


ROWS = [
    eval_row(0, 0, 0.2),
    step_row(1, 0, 8, [0, 2], [4, 4], [0, 4], live=0.0),
    step_row(2, 0, 16, [3, 2], [4, 4], [1, 0], live=1.0),
    step_row(3, 1, 24, [1], [8], [5]),
    eval_row(3, 24, 0.6),
]


@pytest.fixture
def make_run(tmp_path):
    """Writes a run directory and returns it."""

    def make_run(rows=ROWS, name="chain_sum", allocator="cero", seed=0, labels=LABELS, **settings):
        run = tmp_path / f"{name}-{allocator}-{seed}-{len(list(tmp_path.iterdir()))}"
        run.mkdir()
        config = {"name": name, "seed": seed, "allocator": {"name": allocator}, "work_dir": str(run), **settings}
        (run / "config.json").write_text(json.dumps(config))
        (run / "prompts.json").write_text(json.dumps({"labels": labels}))
        writer = MetricsWriter(run)
        for row in rows:
            writer.write(row, {})
        writer.close()
        return run

    return make_run


def test_allocation_by_hand(make_run):
    where = reading.allocation(reading.read_run(make_run()))
    assert where.labels == ("length 2-4", "length 13-18", "wrong gold")
    np.testing.assert_array_equal(where.first_epoch, [0, 1, 2])
    np.testing.assert_allclose(where.share, [[12 / 16, 0], [0, 1], [4 / 16, 0]])
    np.testing.assert_allclose(where.of_rollouts, [12 / 24, 8 / 24, 4 / 24])
    np.testing.assert_allclose(where.of_prompts, [2 / 4, 1 / 4, 1 / 4])


@pytest.mark.parametrize("num_epochs", [1, 7, 60, 61, 200])
def test_many_epochs_fit_in_sixty_columns(make_run, num_epochs):
    steps = [step_row(e, e, 4 * (e + 1), [e % 4], [4], [0]) for e in range(num_epochs)]
    where = reading.allocation(reading.read_run(make_run([*steps, eval_row(0, 0, 0.5)])))
    assert where.share.shape[1] == min(num_epochs, 60)
    assert (where.first_epoch[0], where.first_epoch[-1]) == (0, num_epochs)
    widths = np.diff(where.first_epoch)
    assert widths.min() >= 1
    assert widths.max() <= widths.min() + 1
    np.testing.assert_allclose(where.share.sum(axis=0), 1)
    np.testing.assert_allclose((where.share * widths).sum(axis=1) / num_epochs, where.of_rollouts)


def test_prompts_without_labels_are_told_apart_by_their_first_visit(make_run):
    run = reading.read_run(make_run(labels=["all"] * 5))
    assert reading.success_labels(run) == [
        "0 % right at first",
        "34-66 % right at first",
        "100 % right at first",
        "1-33 % right at first",
        "never visited",
    ]
    where = reading.allocation(run)
    assert [label.split(" ")[0] for label in where.labels] == ["0", "1-33", "34-66", "100", "never"]
    np.testing.assert_allclose(where.of_rollouts, np.array([4, 4, 8, 8, 0]) / 24)


def test_seeds_share_a_curve_and_other_settings_do_not(make_run):
    paths = [
        make_run(seed=0, version="1", task={"class": {"name": "Sums", "file": "/here/sums.py"}, "size": 3}),
        make_run(
            [eval_row(0, 0, 0.4), eval_row(1, 12, 0.4), step_row(1, 0, 20, [0], [4], [0])],
            seed=1,
            version="2",
            task={"class": {"name": "Sums", "file": "/there/sums.py"}, "size": 3},
        ),
        make_run(allocator="uniform"),
        make_run(allocator="uniform", learner={"clip": 0.3}),
    ]
    groups = reading.group_runs([reading.read_run(path) for path in paths])
    assert list(groups) == ["cero", "uniform", f"uniform ({paths[3].name})"]
    curve = reading.accuracy_curve(groups["cero"])
    np.testing.assert_array_equal(curve.spent, [0, 12])  # no further than the shorter one
    np.testing.assert_allclose(curve.mean, [0.3, 0.4])
    np.testing.assert_allclose(curve.low, [0.2, 0.4])  # the first crosses 0.4 half-way to 24
    np.testing.assert_allclose(curve.high, [0.4, 0.4])


def test_names_enter_the_legend_where_they_differ(make_run):
    runs = [reading.read_run(make_run(name=name)) for name in ("chain_sum", "gsm8k")]
    assert list(reading.group_runs(runs)) == ["chain_sum, cero", "gsm8k, cero"]


def test_live_curve_keeps_the_mean(make_run):
    rng = np.random.default_rng(0)
    live = rng.random(600)
    steps = [step_row(i, 0, 8 * (i + 1), [0], [8], [0], live=x) for i, x in enumerate(live)]
    curve = reading.live_curve([reading.read_run(make_run([*steps, eval_row(0, 0, 0.5)]))])
    assert len(curve.spent) == 30
    assert curve.mean.mean() == pytest.approx(live.mean())
    assert curve.mean[0] == pytest.approx(live[:20].mean())
    short = reading.live_curve([reading.read_run(make_run())])
    np.testing.assert_array_equal(short.spent, [8, 16, 24])
    np.testing.assert_array_equal(short.mean, [0, 1, 0.5])


@pytest.mark.parametrize("num_runs", [1, 2, 3, 6])
def test_a_picture_of_any_number_of_runs(make_run, tmp_path, num_runs):
    paths = [make_run(name=f"run{i}", labels=LABELS if i else ["all"] * 4) for i in range(num_runs)]
    paths.append(make_run(name="run0", seed=1, labels=["all"] * 4))
    picture.draw_report(paths, tmp_path / "report.png")
    from matplotlib.image import imread

    drawn = imread(tmp_path / "report.png")
    assert drawn.shape[1] == 1690
    assert 800 < drawn.shape[0] < 2000
    assert 0.1 < (drawn[..., :3].min(axis=-1) < 0.99).mean() < 0.9  # neither blank nor all ink


HOSTILE = "cost $x_{1 \x1b[2J\n\x07 \u202e$"


def test_dollars_underscores_and_escape_sequences_are_drawn_as_they_are(make_run, tmp_path):
    """matplotlib takes text between dollars for mathematics, and hides a curve whose name begins with an underscore."""
    labels = [HOSTILE, "$", "_b", "\\frac{" + "c" * 5000]
    paths = [make_run(name=HOSTILE, labels=labels), make_run(name="_$", allocator="$\\x$", labels=["b"] * 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture.draw_report(paths, tmp_path / "report.png")
        with matplotlib.rc_context({"text.parse_math": False}):
            figure = picture._draw([reading.read_run(path) for path in paths])
    legend = figure.subfigs[0].axes[0].get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert [name.split(":")[0] for name in names] == [r"cost $x_{1 \x1b[2J \x07 \u202e$, cero", r" _$, $\x$"]


def test_escape_sequences_of_questions_answers_and_labels_do_not_reach_the_terminal(make_run, capsys, monkeypatch):
    monkeypatch.setattr("cero_jax.report.__main__.draw_report", lambda runs, output: None)
    run = make_run(name=HOSTILE, labels=[HOSTILE] * 4)
    config = json.loads((run / "config.json").read_text())
    config["allocator"] |= {"prior": [0.5, 0.5], "discount": 0.9, "total_budget": 24, "num_epochs": 2}
    (run / "config.json").write_text(json.dumps(config))
    (run / "prompts.json").write_text(
        json.dumps({"labels": [HOSTILE] * 4, "questions": ["\x1b]0;title\x07é 東"] * 4, "answers": ["\x9b31m\r4"] * 4})
    )
    sample = {
        "kind": "train",
        "prompt_id": 1,
        "spent": 8,
        "status": "\x1b[1mright",
        "length": 3,
        "completion": "\x1bc\ta",
    }
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    report([str(run), "--prompt", "1"])
    printed = capsys.readouterr().out
    for shown in (r"\x1b]0;title\x07é 東", r"\x9b31m\r4", r"\x1b[2J", r"\x1b[1mright", "\\x1bc\ta"):
        assert shown in printed
    report([str(run), "--output", str(run / "report.png")])
    for wrong in (["/none\x1b[2J"], [str(run), "--output=gs://x.png"], [str(run), "--html=s3://x.html"]):
        with pytest.raises(SystemExit):
            report(wrong)
    score = Score(1, 0.5, 0.0, 1.0, {"1": 0.5}, dict.fromkeys(STATUSES, 1))
    printed += "".join(capsys.readouterr()) + scores_table({HOSTILE: score})
    assert printed.count("\\x1b[2J") >= 4
    assert printed.count("not a path on this machine: copy it here") == 2
    assert all(character.isprintable() or character in "\n\t" for character in printed)


def test_command_line(make_run, tmp_path):
    output = tmp_path / "one.png"
    command = [sys.executable, "-m", "cero_jax.report"]
    done = subprocess.run([*command, make_run(), "--output", output], capture_output=True, text=True, check=True)
    *figures, last = done.stdout.splitlines()
    assert last == str(output)
    assert figures[0].startswith("chain_sum, cero, seed 0: no figures of the allocation: ")
    assert output.read_bytes().startswith(b"\x89PNG")
    failed = subprocess.run([*command, tmp_path / "none"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].endswith("none: no such run directory")


def append(name, text):
    def change(run):
        with open(run / name, "a") as file:
            file.write(text)

    return change


def overwrite(name, text):
    return lambda run: (run / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "config.json").unlink(), r"config.json: no such file"),
        (lambda run: (run / "metrics.jsonl").unlink(), r"metrics.jsonl: no such file"),
        (lambda run: (run / "prompts.json").unlink(), r"prompts.json: no such file"),
        (overwrite("config.json", '{"name": '), r"config.json: half-written or broken"),
        (overwrite("config.json", "[]"), r"config.json: not a JSON object"),
        (overwrite("config.json", "{}"), r"config.json: no name, allocator or seed"),
        (overwrite("prompts.json", "{}"), r"prompts.json: no labels"),
        (overwrite("metrics.jsonl", ""), r"metrics.jsonl: no step in it yet"),
        (overwrite("metrics.jsonl", json.dumps(ROWS[1]) + "\n"), r"metrics.jsonl: no eval in it yet"),
        (append("metrics.jsonl", '{"kind": "st'), r"metrics.jsonl:6: half-written or broken"),
        (append("metrics.jsonl", "[1]\n"), r"metrics.jsonl:6: half-written or broken"),
        (append("metrics.jsonl", '{"kind": "step", "step": 1}\n'), r"metrics.jsonl:6: no epoch, spent, .* in this"),
        (overwrite("prompts.json", '{"labels": ["a", "b"]}'), r"metrics.jsonl:2: a prompt id outside the 2 prompts"),
    ],
)  # fmt: skip
def test_a_broken_run_is_named(make_run, tmp_path, change, message):
    run = make_run()
    change(run)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        picture.draw_report([run], tmp_path / "report.png")
    assert str(run) in str(caught.value)
    assert not (tmp_path / "report.png").exists()


def test_a_picture_shows_rewards_of_any_scale(make_run, tmp_path, monkeypatch):
    """Of -1 to 1 or in thousands: the axis holds all of the curve, in plain numbers."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    for scores in ((-0.8, 0.4), (200.0, 3000.0), (0.2, 0.6)):
        evals = [eval_row(0, 0, scores[0]), eval_row(3, 24, scores[1])]
        picture.draw_report([make_run([evals[0], *ROWS[1:-1], evals[1]])], tmp_path / "x.png")
        axes = drawn[-1].subfigs[0].axes[0]
        low, high = axes.get_ylim()
        assert low <= min(scores) < max(scores) <= high
        (legend,) = (text.get_text() for text in axes.get_legend().get_texts())
        shown = {0.4: "0.4", 3000.0: "3e+03", 0.6: "60 %"}[scores[1]]
        assert legend.endswith(f": {shown} at the end")
