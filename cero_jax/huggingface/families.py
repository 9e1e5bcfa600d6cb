"""The config.json of a Hugging Face model folder as a ModelConfig.

Known families, by `model_type`: Qwen2 and 2.5 (with DeepSeek-R1-Distill-Qwen), Qwen3, Llama 3.x, Gemma 3 text.
"""

import json
from pathlib import Path
from typing import Any

from cero_jax.model import Dtype, ModelConfig
from cero_jax.rope import RopeScaling

FAMILIES: dict[str, dict[str, Any]] = {  # model_type -> the settings of ModelConfig that it implies
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "llama": {},
    "gemma3_text": {
        "qk_norm": True,
        "post_norms": True,
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "scaled_embeddings": True,
    },
}

DEFAULTS: dict[str, Any] = {  # values of keys that a config.json may leave out
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "sliding_window": 4096,
}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "gemma3_text": {
        "head_dim": 256,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
REFUSED = {  # keys that model.py has no code for -> the only value with which a folder is accepted
    "attention_bias": False,
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
ROPE_KEYS = {  # rope_type -> the keys that it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError, or ValueError where the file holds no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: give the path of a Hugging Face model folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object: download it again")
    return content


def read_config(
    folder: str | Path, *, param_dtype: Dtype = "float32", compute_dtype: Dtype = "float32"
) -> tuple[ModelConfig, int]:
    """The model's shape and vocabulary size, from a config.json that transformers 4 or later wrote.

    Raises ValueError for an unknown family, and one that lists every key that is missing or that model.py has no code
    for.
    """
    path = Path(folder) / "config.json"
    raw = {key: value for key, value in read_json(path).items() if value is not None}
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: model_type={family!r} (architectures={raw.get('architectures')}) is not one of "
            f"{', '.join(FAMILIES)}: choose a model of these families"
        )
    raw = DEFAULTS | FAMILY_DEFAULTS.get(family, {}) | raw
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    problems = [f"{key} is missing" for key in needed if key not in raw]
    problems += [f"{key}={raw[key]!r}" for key, fine in REFUSED.items() if raw.get(key, fine) != fine]
    act, known = ("hidden_activation", "gelu_pytorch_tanh") if family == "gemma3_text" else ("hidden_act", "silu")
    problems += [f"{act}={raw[act]!r} (known: {known!r})"] if raw[act] != known else []
    base, scaling, sliding_base = _rope(raw, problems)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}: this project has no code for that")
    config = ModelConfig(
        num_layers=raw["num_hidden_layers"],
        width=raw["hidden_size"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads", raw["num_attention_heads"]),
        head_dim=raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"]),
        mlp_width=raw["intermediate_size"],
        rope_base=base,
        rope_scaling=scaling,
        norm_eps=raw["rms_norm_eps"],
        tied_embeddings=raw["tie_word_embeddings"],
        query_pre_attn_scalar=raw.get("query_pre_attn_scalar"),
        sliding_layers=_sliding_layers(raw),
        sliding_window=raw["sliding_window"],
        sliding_rope_base=sliding_base,
        max_positions=raw.get("max_position_embeddings"),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        **FAMILIES[family],
    )
    return config, raw["vocab_size"]


def _rope(raw: dict, problems: list[str]) -> tuple[float, RopeScaling | None, float | None]:
    """(rotary base, scaling, the sliding layers' base), and additions to `problems`.

    Transformers 5 writes one key, `rope_parameters`, for what transformers 4 writes as several.
    """
    rope = raw.get("rope_parameters") or {}
    sliding = {"rope_theta": raw.get("rope_local_base_freq")}
    if "full_attention" in rope or "sliding_attention" in rope:
        sliding |= rope.get("sliding_attention") or {}
        rope = rope.get("full_attention") or {}
    rope = {"rope_theta": raw["rope_theta"]} | raw.get("rope_scaling", {}) | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    absent = [key for key in ROPE_KEYS.get(kind, ()) if key not in rope]
    problems += [f"{key} of rope_type={kind!r} is missing" for key in absent]
    problems += [f"rope_type={kind!r}"] if kind not in ROPE_KEYS else []
    scaling = None
    if ROPE_KEYS.get(kind) and not absent:
        scaling = RopeScaling(
            kind,
            factor=rope["factor"],
            low_freq_factor=rope.get("low_freq_factor", 1.0),
            high_freq_factor=rope.get("high_freq_factor", 4.0),
            original_max_positions=rope.get("original_max_position_embeddings", 8192),
        )
    if sliding.get("rope_type", "default") != "default":
        problems.append(f"rope_type={sliding['rope_type']!r} of the sliding layers")
    return rope["rope_theta"], scaling, sliding["rope_theta"]


def _sliding_layers(raw: dict) -> tuple[int, ...]:
    layers = range(raw["num_hidden_layers"])
    if "layer_types" in raw:
        return tuple(i for i in layers if raw["layer_types"][i] == "sliding_attention")
    if "sliding_window_pattern" in raw:  # Gemma 3: every n-th layer is not sliding
        return tuple(i for i in layers if (i + 1) % raw["sliding_window_pattern"])
    return tuple(i for i in layers if i >= raw["max_window_layers"]) if raw.get("use_sliding_window") else ()
