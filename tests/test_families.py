"""The config.json of each family as a ModelConfig, as today's and as older versions of transformers wrote it."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from cero_jax import model, sharding
from cero_jax.huggingface.families import read_config
from cero_jax.model import ModelConfig
from cero_jax.rope import RopeScaling
from cero_jax.sharding import MeshConfig

FIXTURES = Path(__file__).parent / "fixtures"


def copy_of(family, tmp_path):
    return Path(shutil.copytree(FIXTURES / family, tmp_path / family))


def change_config(folder, remove=(), **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: raw[key] for key in raw if key not in remove}))


def test_configs_by_hand():
    config, vocab_size = read_config(FIXTURES / "llama")
    assert vocab_size == 320
    assert config == ModelConfig(
        num_layers=3, width=32, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=48, norm_eps=1e-5,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64), max_positions=256,
    )  # fmt: skip
    config, _ = read_config(FIXTURES / "gemma3", param_dtype="bfloat16")
    assert config == ModelConfig(
        num_layers=6, width=32, num_heads=4, num_kv_heads=1, head_dim=16, mlp_width=48, norm_eps=1e-5,
        rope_base=1000.0, rope_scaling=RopeScaling("linear", 8.0), qk_norm=True, post_norms=True, norm_offset=1.0,
        activation="gelu_tanh", scaled_embeddings=True, query_pre_attn_scalar=24, sliding_layers=(0, 1, 3, 4),
        sliding_window=8, sliding_rope_base=100.0, param_dtype="bfloat16", max_positions=256,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "remove", "old"),
    [
        (
            "gemma3",
            ("rope_parameters", "layer_types", "tie_word_embeddings"),
            {"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"type": "linear", "factor": 8.0}},
        ),
        ("qwen2", ("rope_parameters", "layer_types", "num_key_value_heads"), {"rope_theta": 1000.0, "head_dim": None}),
    ],
)
def test_keys_of_older_versions_give_the_same_config(family, remove, old, tmp_path):
    config, _ = read_config(FIXTURES / family)
    folder = copy_of(family, tmp_path)
    change_config(folder, remove, **old)
    if family == "qwen2":
        config = ModelConfig(**vars(config) | {"num_kv_heads": 4})
    assert read_config(folder)[0] == config


def test_qwen2_with_sliding_windows(tmp_path):
    folder = copy_of("qwen2", tmp_path)
    change_config(folder, ("layer_types",), use_sliding_window=True, max_window_layers=1, sliding_window=7)
    config, _ = read_config(folder)
    assert (config.sliding_layers, config.sliding_window, config.sliding_rope_base) == ((1, 2), 7, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"model_type='mamba'.*qwen2, qwen3, llama, gemma3_text"),
        (
            {"attention_bias": True, "hidden_act": "relu", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            r"attention_bias=True; hidden_act='relu' \(known: 'silu'\); rope_type='yarn'",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor of rope_type='linear' is missing"),
    ],
)
def test_settings_without_code_are_refused_in_one_message(changes, message, tmp_path):
    folder = copy_of("qwen2", tmp_path)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(folder)


ODD = [float("nan"), float("inf"), -1, 0, 10**9, 10**400, -1e300, 1e-300, 2.5, "7", "", True, [], {}, [None]]
NUMBERS = {  # key -> which of the odd values it may have
    "num_hidden_layers": [], "hidden_size": [], "num_attention_heads": [], "intermediate_size": [], "head_dim": [],
    "num_key_value_heads": [], "vocab_size": [], "max_position_embeddings": [10**9], "sliding_window": [10**9],
    "rms_norm_eps": [], "rope_theta": [10**9, 2.5], "tie_word_embeddings": [True], "model_type": [], "layer_types": [],
    "query_pre_attn_scalar": [2.5], "rope_scaling": [{}], "rope_parameters": [{}], "use_sliding_window": [True],
    "max_window_layers": [0], "sliding_window_pattern": [], "hidden_act": [],
}  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
def test_a_value_that_no_model_has_is_one_line(key, tmp_path):
    """Numbers that are none, of another kind, or without bounds: each is refused at once, before it costs anything."""
    folder = copy_of("qwen2", tmp_path)
    (folder / "config.json").write_text(json.dumps(QWEN2_5_7B))
    for value in ODD:
        change_config(folder, **{key: value})
        if value in NUMBERS[key] and isinstance(value, type(next(v for v in NUMBERS[key] if v == value))):
            read_config(folder)
            continue
        with pytest.raises(ValueError, match=rf"config.json: .*{key}") as caught:
            read_config(folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_hundreds_of_odd_values_are_one_line_or_a_model(family, tmp_path):
    """Each key of a folder's config.json, in the objects inside too, with each odd value and null."""
    folder = copy_of(family, tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    places = [(raw, key) for key in raw]
    places += [(inner, key) for inner in raw.values() if isinstance(inner, dict) for key in inner]
    places += [(inner, key) for outer in raw.values() if isinstance(outer, dict)
               for inner in outer.values() if isinstance(inner, dict) for key in inner]  # fmt: skip
    for values, key in places:
        kept = values[key]
        for value in [*ODD[::2], None]:
            values[key] = value
            (folder / "config.json").write_text(json.dumps(raw))
            message = ""
            try:
                config, vocab_size = read_config(folder)
            except ValueError as error:
                message = str(error)
            assert message.isprintable()
            assert message.startswith(f"{folder / 'config.json'}: ") or config.num_layers * vocab_size < 10**6
        values[key] = kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 7}, "head_dim=7 must be even.*is the file this model's own"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must divide num_heads=4: is"),
        ({"layer_types": ["full_attention"] * 2}, "2 layer_types for num_hidden_layers=3"),
        ({"layer_types": ["linear_attention"] * 3}, r"layer_types=\['linear.* must be a list of full_att"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}, "rope_parameters": None}, "low_freq_factor=4.0 .* is not below"),
        ({"rope_parameters": {"rope_theta": 0}}, r"rope_parameters.rope_theta=0 must be a number from 1 to 1e\+30"),
        ({"rope_parameters": {"full_attention": {"factor": "8"}}}, "rope_parameters.full_attention.factor='8' must be"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_each_other_are_named(changes, message, tmp_path):
    folder = copy_of("qwen2", tmp_path)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(folder)


DEEPSEEK_1_5B = {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                 "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 10000,
                 "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21}  # fmt: skip
QWEN2_5_7B = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
              "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 10000.0,
              "tie_word_embeddings": False}  # fmt: skip
QWEN3_4B = {"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "rope_theta": 1000000,
            "tie_word_embeddings": True, "rope_scaling": None, "sliding_window": None}  # fmt: skip
LLAMA_1B = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
            "rope_theta": 500000.0, "tie_word_embeddings": True, "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                "original_max_position_embeddings": 8192}}  # fmt: skip


@pytest.mark.parametrize(
    ("published", "num_parameters", "fsdp"),
    [(DEEPSEEK_1_5B, 1_777_088_000, 8), (QWEN2_5_7B, 7_615_616_512, 4), (QWEN3_4B, 4_022_468_096, 2),
     (LLAMA_1B, 1_235_814_400, 8)],
)  # fmt: skip
def test_published_models_have_their_published_number_of_parameters(published, num_parameters, fsdp, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published))
    config, vocab_size = read_config(tmp_path)
    assert not config.sliding_layers
    shapes = model.abstract_params(config, vocab_size)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == num_parameters
    sharding.shard_params(shapes, sharding.make_mesh(MeshConfig(fsdp=fsdp)))  # raises where one cannot be split evenly
