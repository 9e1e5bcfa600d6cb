"""Model folders against transformers: tests/fixtures holds tiny models, and what transformers computes with them."""

import dataclasses
import json
import resource
import shutil
import signal
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from left_padding import causal_mask, left_padded
from safetensors.numpy import load_file, save_file
from tiny_run import tiny_config

import train
from cero_jax import model, sharding
from cero_jax import run as runs
from cero_jax.config import AllocatorConfig
from cero_jax.evaluate import restore_policy
from cero_jax.evaluation import EvaluationConfig
from cero_jax.huggingface import weights
from cero_jax.huggingface.tokenizer import FolderTokenizer
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.run import saved_run
from cero_jax.sampler import SamplerConfig, SamplingBatch, make_sampler
from cero_jax.sharding import MeshConfig
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.tasks.dataset import Dataset
from cero_jax.warm_start import WarmStartConfig

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("qwen2", "qwen3", "llama", "gemma3")
NEW_TOKENS = 16

forward = jax.jit(model.forward, static_argnames="config")
logits_of = jax.jit(model.logits, static_argnames="config")


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@cache
def loaded(family):
    return weights.load(FIXTURES / family, one_device())


def tensors_of(folder):
    """Every tensor of a folder by name, in its own dtype."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def copy_of(family, tmp_path):
    return Path(shutil.copytree(FIXTURES / family, tmp_path / family))


# --- what transformers computes ---


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    """Rows of unequal length in one batch, padded on the left, against transformers' logits of each row alone."""
    config, params = loaded(family)
    want = np.load(FIXTURES / f"{family}.npz")
    prompts = [want[f"prompt_{row}"] for row in range(3)]
    width = max(map(len, prompts))
    tokens = np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    valid, positions = left_padded(jnp.asarray([len(p) for p in prompts], jnp.int32), width)
    hidden, _ = forward(params, config, tokens, positions, causal_mask(valid))
    got = np.asarray(logits_of(params, config, hidden))
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(got[row, width - len(prompt) :], want[f"logits_{row}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_with_the_cache_gives_the_tokens_of_transformers(family):
    config, params = loaded(family)
    want = np.load(FIXTURES / f"{family}.npz")
    prompts = [want[f"prompt_{row}"] for row in range(3)]
    width = max(map(len, prompts))
    batch = SamplingBatch(
        prompt_tokens=np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in prompts]).astype(np.int32),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        prompt_of_row=np.arange(3, dtype=np.int32),
        row_mask=np.ones(3, bool),
        prompt_ids=np.arange(3, dtype=np.int32),
        rollout_index=np.zeros(3, np.int32),
    )
    settings = SamplerConfig(NEW_TOKENS, temperature=0.0, slots=2, window=5)
    sample = make_sampler(config, settings, eos_ids=(-1,), pad_id=0, mesh=one_device())
    got = sample(params, np.uint32(0), np.uint32(0), batch)
    for row in range(3):
        np.testing.assert_array_equal(got.tokens[row], want[f"greedy_{row}"])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_setting_of_a_family_changes_the_logits(family):
    """So that the comparison with transformers would notice if one did nothing."""
    config, params = loaded(family)
    plain = ModelConfig()
    names = ("rope_scaling", "norm_offset", "activation", "scaled_embeddings", "query_pre_attn_scalar",
             "sliding_layers", "sliding_rope_base")  # fmt: skip
    set_here = [name for name in names if getattr(config, name) != getattr(plain, name)]
    assert len(set_here) == {"qwen2": 0, "qwen3": 0, "llama": 1, "gemma3": 7}[family]
    prompt = np.load(FIXTURES / f"{family}.npz")["prompt_2"]
    valid, positions = left_padded(jnp.asarray([len(prompt)], jnp.int32), len(prompt))

    def last(config):
        hidden, _ = forward(params, config, prompt[None], positions, causal_mask(valid))
        return np.asarray(logits_of(params, config, hidden[:, -1]))

    for name in set_here:
        other = ModelConfig(**vars(config) | {name: getattr(plain, name)})
        assert np.abs(last(other) - last(config)).max() > 1e-2, name


# --- loaded, and written again ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_a_folder_loaded_and_saved_keeps_every_byte(family, max_shard_bytes, tmp_path):
    source, folder = FIXTURES / family, tmp_path / "out"
    dtype = "bfloat16" if family == "qwen3" else "float32"
    config, params = weights.load(source, one_device(), param_dtype=dtype)
    weights.save(folder, source, config, params, max_shard_bytes=max_shard_bytes)
    before, after = tensors_of(source), tensors_of(folder)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
        assert after[name].tobytes() == tensor.tobytes(), name
    assert json.loads((folder / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (folder / name).exists() == (source / name).exists()
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert len(files) > 2
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
        for file in files:
            there = load_file(folder / file)
            assert {index["weight_map"][name] for name in there} == {file}
            assert len(there) == 1 or sum(tensor.nbytes for tensor in there.values()) <= max_shard_bytes
    jax.tree.map(np.testing.assert_array_equal, weights.load(folder, one_device(), param_dtype=dtype)[1], params)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_shards_over_a_mesh_hold_the_same_values(family, tmp_path):
    config, alone = loaded(family)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    same, params = weights.load(FIXTURES / family, mesh)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    placed, wanted = (jax.tree.map(lambda x: x.sharding, params), sharding.shard_params(params, mesh))
    assert placed == wanted
    weights.save(tmp_path / "out", FIXTURES / family, config, params)
    after = tensors_of(tmp_path / "out")
    for name, tensor in tensors_of(FIXTURES / family).items():
        np.testing.assert_array_equal(after[name], tensor.astype(np.float32))
    assert "float32" in (tmp_path / "out" / "config.json").read_text()  # bfloat16 in qwen3's source


def test_reading_in_blocks_gives_the_same_parameters(monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    jax.tree.map(np.testing.assert_array_equal, weights.load(FIXTURES / "qwen2", one_device())[1], loaded("qwen2")[1])


def test_parameters_are_rounded_once_to_the_dtype_asked_for():
    _, params = weights.load(FIXTURES / "qwen2", one_device(), param_dtype="bfloat16", compute_dtype="bfloat16")
    embed = tensors_of(FIXTURES / "qwen2")["model.embed_tokens.weight"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(np.asarray(params["embed"]), embed.astype(ml_dtypes.bfloat16))


# --- damaged folders ---


def test_all_that_is_wrong_with_the_tensors_is_in_one_message(tmp_path):
    folder = copy_of("gemma3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.9.extra"] = tensors.pop("model.layers.2.mlp.up_proj.weight")
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    tensors["model.layers.0.input_layernorm.weight"] = np.zeros(32, np.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="is the download complete") as caught:
        weights.load(folder, one_device())
    for part in (
        "1 missing: model.layers.2.mlp.up_proj.weight",
        "1 unknown: model.layers.9.extra",
        "1 of another shape: model.norm.weight (31,), not (32,)",
        "1 of another dtype: model.layers.0.input_layernorm.weight I32",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="is the download complete") as looked_at:
        weights.check(folder)
    assert str(looked_at.value) == str(caught.value)
    weights.check(FIXTURES / "gemma3")


def test_a_copy_of_the_tied_table_is_ignored(tmp_path):
    folder = copy_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors
        | {
            "lm_head.weight": tensors["model.embed_tokens.weight"],
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        },
        folder / "model.safetensors",
    )
    jax.tree.map(np.testing.assert_array_equal, weights.load(folder, one_device())[1], loaded("llama")[1])


def test_files_that_are_missing_or_cut_are_named(tmp_path):
    folder = copy_of("qwen2", tmp_path)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: not a complete safetensors file"):
        weights.load(folder, one_device())
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model-00002-of-00002.safetensors: download all"):
        weights.load(folder, one_device())
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file: give the path of a Hugging Face"):
        weights.load(tmp_path / "nowhere", one_device())
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: broken JSON"):
        weights.load(folder, one_device())


@pytest.mark.parametrize(
    "name", ["../model-00001-of-00002.safetensors", "/etc/passwd", "..", "", "config.json", 7, None]
)
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path, name):
    folder = copy_of("qwen2", tmp_path)
    shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path)  # so that it would be found
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json: .* is no safetensors file in this folder"):
        weights.load(folder, one_device())
    for broken in ({}, {"weight_map": []}, {"weight_map": {}}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"index.json: no weight_map"):
            weights.load(folder, one_device())


@pytest.mark.parametrize("room", ["of a thousand bytes", "for the weights, not for the tokenizer"])
def test_a_disk_that_fills_is_an_os_error_and_nothing_is_left_on_it(tmp_path, room):
    """By the system's limit on the size of a file, which each writer meets as a full disk."""
    source, out = Path(shutil.copytree(FIXTURES / "llama", tmp_path / "source")), tmp_path / "out"
    (source / "tokenizer.json").write_bytes(bytes(2**22))
    limit = 1000 if "thousand" in room else 2**21
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    config, params = loaded("llama")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1][1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            weights.save(out, source, config, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert list(tmp_path.iterdir()) == [source]


def test_no_folder_is_overwritten(tmp_path):
    with pytest.raises(ValueError, match="exists: choose another folder"):
        weights.save(tmp_path, FIXTURES / "llama", *loaded("llama"))


@pytest.mark.parametrize("config", [{}, {"qkv_bias": True, "tied_embeddings": False}, {"post_norms": True}])
def test_every_parameter_has_a_name_of_its_own_in_the_file(config):
    config = ModelConfig(qk_norm=True, **config)
    shapes = model.abstract_params(config, 10)
    stored = jax.tree_util.tree_map_with_path(partial(weights._stored, config=config), shapes)
    names = [n for s in jax.tree.leaves(stored, is_leaf=lambda x: isinstance(x, weights.Stored)) for n in s.names]
    assert len(names) == len(set(names))


# --- a run from a folder to a folder ---


@dataclass(frozen=True)
class EvenLength(Dataset):
    """Right where the completion's length is even, which an untrained policy's sometimes is."""

    def build(self, seed, tokenizer=None):
        return super().build(seed, tokenizer)._replace(verify=lambda question, text, answer: float(len(text) % 2 == 0))


def folder_config(tmp_path, **changes):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"question": f"{i} + 1 =", "answer": str(i + 1)}) for i in range(12)))
    settings = {
        "task": EvenLength(path=str(rows), max_prompt_tokens=12, num_heldout=4),
        "model_folder": str(FIXTURES / "qwen2"),
        "allocator": AllocatorConfig(total_budget=64, num_epochs=2, min_group=2, max_group=8),
        "sampler": SamplerConfig(max_completion_tokens=6),
        "learner": LearnerConfig(rows_per_step=16, kl_coef=0.1),
        "warm_start": WarmStartConfig(),
        "evaluation": EvaluationConfig(every_rollouts=64, samples=1, rows=16),
    }
    return tiny_config(tmp_path / "run", **settings | changes)


def test_a_run_starts_from_a_folder_and_ends_with_one(tmp_path):
    """Its prompts hold the time of its start, to the second: on resume and in an evaluation, too."""
    folder = copy_of("qwen2", tmp_path)
    path = folder / "tokenizer_config.json"
    template = "{{ strftime_now('%y%m%d%H%M%S') }} {{ messages[0].content }}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    task = dataclasses.replace(folder_config(tmp_path).task, chat=True, max_prompt_tokens=40)
    config = folder_config(tmp_path, model_folder=str(folder), task=task)
    assert train.main(config) == 0
    started = datetime.fromisoformat(saved_run(config.run_dir).started)
    prompts = json.loads((config.run_dir / "prompts.json").read_text())["questions"]
    assert {prompt.partition(" ")[0] for prompt in prompts} == {started.strftime("%y%m%d%H%M%S")}
    measured = restore_policy(config.run_dir, {}, {}).task.heldout.questions
    assert {prompt.partition(" ")[0] for prompt in measured} == {started.strftime("%y%m%d%H%M%S")}
    assert datetime.now() - started >= timedelta(seconds=1)  # else this would prove nothing
    exported = tmp_path / "run" / "export-64"
    run, state, cursor = runs.start(config)
    run.close()
    assert cursor.finished
    assert cursor.optimizer_steps > 0
    assert run.task.tokenizer.encode("1 + 1 =") == FolderTokenizer(exported).encode("1 + 1 =")
    shape, params = weights.load(exported, one_device())
    assert shape == run.config.model == loaded("qwen2")[0]
    jax.tree.map(np.testing.assert_array_equal, params, state.policy.params)
    assert run.fixed.ref_params is None  # what it began from is not read again: nothing is left to learn
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), params, loaded("qwen2")[1])
    assert min(jax.tree.leaves(moved)) > 0  # biases too
    before = (exported / "model.safetensors").stat()
    assert run.export(state, cursor) == exported
    assert (exported / "model.safetensors").stat() == before  # not written again


def test_the_folder_sets_the_shape_and_the_run_the_dtypes_remat_and_attention(tmp_path):
    kept = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "remat": True, "attention": "xla"}
    chosen = ModelConfig(**kept)
    run, _, _ = runs.start(folder_config(tmp_path, model=chosen))
    run.close()
    assert run.config.model == dataclasses.replace(loaded("qwen2")[0], **kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ChainSum(num_prompts=24, num_heldout=8)}, "ChainSum has a tokenizer of its own .* a task of text"),
        ({"warm_start": WarmStartConfig(num_steps=1)}, "set it to 0 with a model_folder"),
        ({"model_folder": "nowhere"}, r"nowhere.config.json: no such file"),
    ],
)
def test_a_folder_that_does_not_fit_the_run_is_refused(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        runs.start(folder_config(tmp_path, **changes))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(bad, tmp_path):
    folder = copy_of("qwen2", tmp_path)
    tensors = tensors_of(folder)
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    for name in names:
        tensors[name] = tensors[name].copy()
        tensors[name].ravel()[-1] = bad
    for path in folder.glob("*.safetensors"):
        save_file({name: tensors[name] for name in load_file(path)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinity in 2 of its tensors: ") as caught:
        weights.load(folder, one_device())
    assert all(name in str(caught.value) for name in names)
    assert "layers.0" not in str(caught.value)
