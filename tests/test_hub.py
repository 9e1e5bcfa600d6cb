"""Models and data by name on the hub, against a hub on this machine: found, pinned, offline, and what may be wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from stand_in_hub import serving
from stand_in_wandb import wandb_stand_in

from cero_jax import run
from cero_jax.checksums import type_of
from cero_jax.command_line import from_command_line
from cero_jax.huggingface import hub
from cero_jax.read_files import find_files

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent
MODEL, DATA = "hf:Qwen/tiny", "hf:openai/gsm8k:main/train"


def rows(*numbers):
    """GSM8K's, as few as asked for."""
    each = ({"question": f"What is {n} + 1?", "answer": f"It is one more.\n#### {n + 1}"} for n in numbers)
    return "".join(json.dumps(row) + "\n" for row in each)


GSM8K = {
    "README.md": "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
    "  - {split: test, path: [main/test-*]}\n- config_name: socratic\n  data_files: socratic/*\n---\nSums.\n",
    "main/train-00000-of-00002.jsonl": rows(*range(12)),
    "main/train-00001-of-00002.jsonl": rows(*range(12, 20)),
    "main/test-00000-of-00001.jsonl": rows(30, 31, 32, 33),
    "socratic/a.jsonl": rows(40),
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{found.address}/{''.join(template[1:])}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        found.folder("models/Qwen/tiny", FIXTURES / "qwen2")
        found.commit("datasets/openai/gsm8k", GSM8K)
        yield found


def read(path):
    """The numbers asked for in the files of a name."""
    return [int(line.split()[3]) for file in find_files(path) for line in file.read_text().splitlines()]


def test_a_name_is_pinned_and_from_then_on_the_hub_is_not_asked(stand_in, monkeypatch):
    first = hub.pinned(DATA, "dataset")
    assert first == f"hf:openai/gsm8k@{find_files(DATA)[0].parent.parent.name}:main/train"
    model = hub.pinned(MODEL, "model")
    assert {path.name for path in hub.model_folder(model).iterdir()} == set(os.listdir(FIXTURES / "qwen2"))
    stand_in.commit("datasets/openai/gsm8k", GSM8K | {"main/train-00000-of-00002.jsonl": rows(99)})
    assert read(DATA) == [99, *range(12, 20)]  # what the name means now
    assert hub.pinned(DATA, "dataset", before=[first]) == first
    assert hub.pinned("hf:openai/gsm8k:main/test", "dataset", before=[first, model[:2]]) == first[:-5] + "test"
    assert read(first) == list(range(20))
    assert hub.pinned("a/path", "dataset") == "a/path"
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        stand_in.asked.clear()
        assert read(first) == list(range(20))
        assert (hub.model_folder(model) / "config.json").is_file()
        assert stand_in.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.pinned(DATA, "dataset") != first  # the newest that was seen
    (find_files(first)[1]).unlink()
    with pytest.raises(OSError, match=r"^hf:openai/gsm8k@.*: not whole in the hub's cache, and HF_HUB_OFFLINE is set"):
        read(first)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("main/test", range(30, 34)),
        ("socratic/train", [40]),  # a configuration without splits is all to train on
        ("test", range(30, 34)),  # of the configuration that has it
        ("main/train-00001*", range(12, 20)),
        ("socratic/a.jsonl", [40]),
    ],
)
def test_the_files_of_a_split(stand_in, name, numbers):
    assert read(f"hf:openai/gsm8k:{name}") == list(numbers)


THERE = ["README.md", "a/train/0000.parquet", "a/train/0001.parquet", "a/x-test.csv", "b/retrain.json", "train.jsonl"]


@pytest.mark.parametrize(
    ("split", "head", "files"),
    [
        ("a/train", {}, ["a/train/0000.parquet", "a/train/0001.parquet"]),
        ("a/test", {}, ["a/x-test.csv"]),
        ("default/train", {}, ["a/train/0000.parquet", "a/train/0001.parquet", "train.jsonl"]),
        ("b/retrain", {}, ["b/retrain.json"]),
        ("train", {"configs": [{"config_name": "c", "data_files": "train.jsonl"}]}, ["train.jsonl"]),
        ("train", {"configs": [{"config_name": "c", "data_files": "train.jsonl"},
                               {"config_name": "d", "default": True, "data_files": ["**/retrain.json"]}]},
         ["b/retrain.json"]),
        ("train", {"configs": "broken"}, ["a/train/0000.parquet", "a/train/0001.parquet", "train.jsonl"]),
        ("b/test", {}, "hf:o/n:b/test: no such split or file: there are a/train/0000.parquet, a/train/0001.parquet, "),
        ("c/test", {"configs": [{"config_name": "c", "data_files": "train.jsonl"}]}, "there is c/train$"),
    ],
)  # fmt: skip
def test_files_are_found_by_what_is_declared_or_by_their_names(split, head, files):
    name = hub.Name("o/n", "", split)
    if isinstance(files, list):
        assert hub._files_of(name, THERE, head) == files
    else:
        with pytest.raises(ValueError, match=files):
            hub._files_of(name, THERE, head)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:openai/none:main/train", "no such data set on http://.*, or a private one: check the name"),
        ("hf:openai/gsm8k:main/trian", "no such split or file: there are main/train, main/test, socratic/train$"),
        ("hf:openai/gsm8k@v9:main/train", "no such commit, tag or branch in http://.*/datasets/openai/gsm8k: name an"),
        ("hf:openai/closed:main/train", "must be granted: accept its terms at http://.*/datasets/openai/closed, then"),
        ("hf:openai/images:train", "no JSONL, CSV or Parquet in it: .* hf:openai/images@refs/convert/parquet:"),
        ("hf:openai/gsm8k", "not the name of a data set on the hub: write hf:OWNER/NAME:CONFIGURATION/SPLIT, or "),
        ("hf://datasets/openai/gsm8k/a.jsonl", "not the name of a data set on the hub"),
        ("hf:gsm8k:main/train", "not the name of a data set on the hub"),
    ],
)
def test_a_name_that_cannot_be_had_is_one_line(stand_in, name, message):
    stand_in.commit("datasets/openai/closed", GSM8K)
    stand_in.commit("datasets/openai/images", {"train/0.png": b"?"})
    stand_in.gated.add("datasets/openai/closed")
    with pytest.raises((ValueError, OSError), match=f"^{name}: .*{message}") as caught:
        find_files(name)
    assert "\n" not in str(caught.value)


def test_without_a_hub_or_its_library_there_is_one_line(stand_in, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=f"^{MODEL}: not whole in the hub's cache, and http://127.0.0.1:9 cannot be rea"):
        hub.model_folder(MODEL)
    with pytest.raises(
        ValueError, match="hf:Qwen/tiny:train: not the name of a model on the hub: write hf:OWNER/NAME,"
    ):
        hub.model_folder("hf:Qwen/tiny:train")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for had in (lambda: hub.model_folder(MODEL), lambda: find_files(DATA)):
        with pytest.raises(ValueError, match=r"need huggingface_hub: pip install '.*\[train\]'"):
            had()


def test_the_environment_says_where_the_hub_is_and_its_cache(stand_in, tmp_path):
    code = (
        f"from cero_jax.huggingface import hub; print(hub.pinned({DATA!r}, 'dataset'), len(hub.data_files({DATA!r})))"
    )
    said = []
    for offline in "01":
        given = {"HF_ENDPOINT": stand_in.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": offline}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | given, cwd=ROOT, capture_output=True, text=True, check=True
        )
        said.append(done.stdout)
    commit = stand_in.newest("datasets/openai/gsm8k")
    assert said == [f"hf:openai/gsm8k@{commit}:main/train 2\n"] * 2


def test_the_config_for_one_gpu_begins_from_the_hub_and_goes_on_as_it_began_without(
    stand_in, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(ROOT)
    # Checksums are tested elsewhere: a program of them would be compiled for this model alone.
    monkeypatch.setattr("cero_jax.checkpoint.described", lambda arrays: {x: [type_of(arrays[x]), 0] for x in arrays})
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    files = {path.name: path.read_bytes() for path in (FIXTURES / "qwen2").iterdir()}
    files["config.json"] = files["config.json"].replace(
        b'"max_position_embeddings": 256', b'"max_position_embeddings": 32768'
    )
    model = stand_in.commit(f"models/{name}", files)
    small = ["--allocator.total-budget=640", "--learner.rows-per-step=32", "--sampler.max-completion-tokens=8"]
    small += ["--evaluation.rows=8", f"--work-dir={tmp_path / 'run'}"]
    config = from_command_line(["configs/qwen2_5_0_5b_gsm8k.py", "--wandb=rollouts", *small])
    wandb = wandb_stand_in(monkeypatch)
    first, state, cursor = run.start(config)
    first.save(state, cursor)
    first.close()
    assert "WARNING: JAX sees no GPU and no TPU here" in capfd.readouterr().out
    asked = first.task.train.questions[0]
    assert "What is 0 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}." in asked
    assert (len(first.task.train.questions), len(first.task.heldout.questions)) == (20, 4)
    stand_in.commit(f"models/{name}", files | {"tokenizer_config.json": b"{}"})
    stand_in.commit("datasets/openai/gsm8k", GSM8K | {"main/train-00000-of-00002.jsonl": rows(99)})
    stand_in.asked.clear()
    again, _, cursor = run.start(config)
    again.close()
    assert stand_in.asked == []
    assert cursor.config["model_folder"] == again.config.model_folder == f"hf:{name}@{model}"
    assert again.task.train.questions == first.task.train.questions
    assert len({began["id"] for began in wandb.began}) == 1  # a resumed run goes on in the same W&B run, too
    assert [began["config"]["model_folder"] for began in wandb.began] == [f"hf:{name}@{model}"] * 2
