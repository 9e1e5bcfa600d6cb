"""The config.json of a Hugging Face model folder as a ModelConfig.

Known families, by `model_type`: Qwen2 and 2.5 (with DeepSeek-R1-Distill-Qwen), Qwen3, Llama 3.x, Gemma 3 text.
"""

import json
from pathlib import Path
from typing import Any

from cero_jax.model import LARGEST_SIZE, MOST_LAYERS, Dtype, ModelConfig
from cero_jax.rope import LARGEST_BASE, RopeScaling

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
NUMBERS: dict[str, tuple[type, float, float]] = {  # key -> int or float, the least and the largest that make sense
    "num_hidden_layers": (int, 1, MOST_LAYERS),
    **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), (int, 1, LARGEST_SIZE)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "sliding_window_pattern"), (int, 1, LARGEST_SIZE)),
    "vocab_size": (int, 1, 2**26),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), (int, 1, 2**31 - 1)),
    "sliding_window": (int, 1, 2**31 - 1),
    "max_window_layers": (int, 0, MOST_LAYERS),
    "rms_norm_eps": (float, 1e-30, 1.0),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), (float, 1.0, LARGEST_BASE)),
    "query_pre_attn_scalar": (float, 1e-6, LARGEST_SIZE),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), (float, 1e-6, 1e6)),
}
OBJECTS = ("rope_scaling", "rope_parameters", "full_attention", "sliding_attention")  # hold some of these keys too
LAYER_TYPES = ("full_attention", "sliding_attention")
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
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
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
    raw = _known(read_json(path))
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"{path}: model_type={family!r:.80} (architectures={raw.get('architectures')!r:.80}) is not one of "
            f"{', '.join(FAMILIES)}: choose a model of these families"
        )
    raw = DEFAULTS | FAMILY_DEFAULTS.get(family, {}) | raw
    if wrong := _wrong_values(raw):
        raise ValueError(f"{path}: {'; '.join(wrong)}: no model has that, so download the file again")
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    problems = [f"{key} is missing" for key in needed if key not in raw]
    problems += [f"{key}={raw[key]!r:.200}" for key, fine in REFUSED.items() if raw.get(key, fine) != fine]
    act, known = ("hidden_activation", "gelu_pytorch_tanh") if family == "gemma3_text" else ("hidden_act", "silu")
    problems += [f"{act}={raw[act]!r:.80} (known: {known!r})"] if raw[act] != known else []
    layers = raw.get("num_hidden_layers")
    if "layer_types" in raw and len(raw["layer_types"]) != layers:
        problems.append(f"{len(raw['layer_types'])} layer_types for num_hidden_layers={layers}")
    base, scaling, sliding_base = _rope(raw, problems)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}: this project has no code for that")
    try:
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
    except ValueError as error:  # numbers that do not fit each other
        raise ValueError(f"{path}: {error}: is the file this model's own?") from error
    return config, raw["vocab_size"]


def _known(raw: dict) -> dict:
    """What is there and not null, in the objects inside too."""
    return {key: _known(value) if isinstance(value, dict) else value for key, value in raw.items() if value is not None}


def _wrong_values(values: dict, inside: str = "") -> list[str]:
    """Each value that is of another type than its key's, or beyond all sense."""
    wrong = []
    for key, value in values.items():
        if key in OBJECTS and isinstance(value, dict):
            wrong += _wrong_values(value, f"{inside}{key}.")
        elif must_be := what_it_must_be(key, value):
            wrong.append(f"{inside}{key}={value!r:.80} must be {must_be}")
    return wrong


def what_it_must_be(key: str, value: Any) -> str:
    """In words; "" where it is that, or the key is none that is read."""
    if key in NUMBERS:
        kind, least, most = NUMBERS[key]
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        what = "a whole number" if kind is int else "a number"
        return "" if number and least <= value <= most else f"{what} from {least:g} to {most:.10g}"
    if key in ("tie_word_embeddings", "use_sliding_window") and not isinstance(value, bool):
        return "true or false"
    if key in OBJECTS:
        return "an object"
    if key in ("rope_type", "type") and not isinstance(value, str):
        return "text"
    if key == "layer_types" and not (isinstance(value, list) and all(each in LAYER_TYPES for each in value)):
        return f"a list of {' and '.join(LAYER_TYPES)}"
    return ""


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
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    problems += (
        [f"low_freq_factor={low} of rope_type={kind!r} is not below high_freq_factor={high}"] if low >= high else []
    )
    scaling = None
    if ROPE_KEYS.get(kind) and not absent and low < high:
        scaling = RopeScaling(
            kind,
            factor=rope["factor"],
            low_freq_factor=low,
            high_freq_factor=high,
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
