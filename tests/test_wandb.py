"""W&B: what it is given, that it may fail, and the real package where it is installed; offline, nothing is sent."""

import json
import sys
from types import ModuleType

import pytest
from stand_in_wandb import wandb_stand_in

from cero_jax.metrics import MetricsWriter
from cero_jax.weights_and_biases import COLUMNS, WeightsAndBiases, check

SAMPLES = [{"prompt_id": i, "sample": 0, "question": "1+1=", "completion": "2", "reward": 1.0} for i in range(120)]


def row(spent, **figures):
    return {"kind": "step", "step": spent // 8, "spent": spent} | figures


@pytest.fixture
def stand_in(monkeypatch):
    return wandb_stand_in(monkeypatch)


def test_scalars_settings_completions_and_the_picture_reach_it(stand_in, tmp_path, capsys):
    sink = WeightsAndBiases("team/rollouts", tmp_path, "id7", {"seed": 3})
    writer = MetricsWriter(tmp_path, None, sink)
    writer.write(row(8, reward=0.5, rewards={"format": 1.0}, prompt_ids=[1, 2]), {"learn_seconds": 2.0})
    writer.write_samples("train", 8, SAMPLES)
    writer.write_samples("eval", 8, SAMPLES)
    writer.close()
    writer.end(tmp_path / "report.png")
    (began,) = stand_in.began
    assert {name: began[name] for name in ("entity", "project", "id", "resume", "config", "name")} == {
        "entity": "team", "project": "rollouts", "id": "id7", "resume": "allow", "config": {"seed": 3},
        "name": tmp_path.name,
    }  # fmt: skip
    (_, scalars), (step, completions), (_, picture) = stand_in.logged
    assert scalars == {"step/reward": 0.5, "step/rewards/format": 1.0, "timings/learn_seconds": 2.0}
    columns, data = completions["completions"]
    assert (step, columns, len(data)) == (8, list(COLUMNS), 100)
    assert data[5] == [5, "1+1=", "2", None, None, None, 1.0]
    assert picture == {"report": str(tmp_path / "report.png")}
    assert stand_in.ended == [8]
    assert capsys.readouterr().err == "W&B: https://wandb.ai/x\n"


def test_what_it_has_from_before_a_crash_is_not_sent_again(stand_in, tmp_path):
    stand_in.run.step = 17  # as W&B says of a run that it knows up to 16
    sink = WeightsAndBiases("rollouts", tmp_path, "id7", {})
    writer = MetricsWriter(tmp_path, None, sink)
    for spent in (8, 16, 24):
        writer.write(row(spent, reward=0.5), {})
        writer.write_samples("eval", spent, SAMPLES)
    writer.close()
    writer.end()
    assert [step for step, _ in stand_in.logged] == [24, 24]


@pytest.mark.parametrize("when", ["at once", "later"])
def test_where_it_fails_the_run_goes_on_and_it_is_said_once(stand_in, tmp_path, capsys, when):
    stand_in.fails = when == "at once"
    sink = WeightsAndBiases("rollouts", tmp_path, "id7", {})
    writer = MetricsWriter(tmp_path, None, sink)
    stand_in.fails = True
    for spent in (8, 16):
        writer.write(row(spent, reward=0.5), {})
        writer.write_samples("eval", spent, SAMPLES)
    writer.close()
    writer.end(tmp_path / "report.png")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "W&B failed" in line]
    why = "TimeoutError: no answer" if when == "at once" else "RuntimeError: the service is gone"
    assert said == [
        f"warning: W&B failed ({why}): the run goes on without it; metrics.jsonl has its metrics all the same"
    ]


def test_a_name_that_is_none_or_a_package_that_is_missing_is_refused(stand_in, monkeypatch):
    for name in ("", "a/b/c", "a#b", "/a"):
        with pytest.raises(ValueError, match=r"give PROJECT or ENTITY/PROJECT, without any of"):
            check(name)
    check("team/my rollouts")
    for missing in (None, ModuleType("wandb")):  # the latter as a folder wandb/ is imported
        monkeypatch.setitem(sys.modules, "wandb", missing)
        with pytest.raises(ValueError, match=r"needs the package wandb: pip install '.*\[train,wandb\]'"):
            check("rollouts")


def test_the_real_one_keeps_it_in_the_runs_directory(tmp_path, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setenv("WANDB_MODE", "offline")
    image.new("RGB", (8, 8)).save(tmp_path / "report.png")
    for begin in (8, 32):  # and goes on, under the same id
        writer = MetricsWriter(tmp_path, None, WeightsAndBiases("rollouts", tmp_path, "id7", {"seed": 3}))
        for spent in range(begin, begin + 24, 8):
            writer.write(row(spent, reward=spent / 8), {"learn_seconds": 2.0})
            writer.write_samples("eval", spent, SAMPLES)
        writer.close()
        writer.end(tmp_path / "report.png")
    assert wandb.run is None
    runs = sorted((tmp_path / "wandb").glob("offline-run-*-id7"))
    assert runs
    files = {path.name for path in (tmp_path / "wandb").rglob("*") if path.is_file()}
    assert any(name.startswith("report_") and name.endswith(".png") for name in files)
    assert any(name.startswith("completions_") and name.endswith(".json") for name in files)
    assert any(name.endswith(".wandb") for name in files)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("W&B: offline, in " in line for line in said)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["reward"] == 6.0
