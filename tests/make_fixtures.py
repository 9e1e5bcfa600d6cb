"""Write tests/fixtures: a tiny random model of each family, and what transformers computes with it.

It needs an environment of its own, since this project does not depend on torch:

    python3 -m venv reference && reference/bin/pip install torch==2.13.0 transformers==5.24 safetensors
    reference/bin/python tests/make_fixtures.py
    reference/bin/python tests/make_fixtures.py read-back .venv/bin/python

The second form lets cero_jax, run by that Python, load each fixture and write it to a new folder, and checks that
transformers computes the same with the new folder.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent / "fixtures"
VOCAB = 320  # more than the tokenizers' tokens, as in published models
NEW_TOKENS = 16
TEXTS = [
    "Natalia sold 48 clips in April.",
    " two  spaces\n\nand lines\t",
    "naïve 東京 😀",
    "",
    "<|im_end|>x",
    "x = 3 + 4",
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4? "}]

SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=False, rope_theta=1000.0),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True, dtype="bfloat16"),
    "llama": transformers.LlamaConfig(
        **SHAPE, head_dim=16, tie_word_embeddings=True, rope_parameters={"rope_theta": 10000.0} | LLAMA3
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 6, "num_key_value_heads": 1, "vocab_size": 64},
        head_dim=16, query_pre_attn_scalar=24, sliding_window=8, sliding_window_pattern=3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
}  # fmt: skip
LENGTHS = {"qwen2": (5, 13, 24), "qwen3": (5, 13, 24), "llama": (9, 24, 72), "gemma3": (5, 13, 40)}
OLD_KEYS = {  # keys of config.json as transformers 4 wrote them, which most published folders have
    "llama": {"rope_theta": 10000.0, "rope_scaling": LLAMA3, "torch_dtype": "float32"},
    "qwen3": {"rope_theta": 10000.0, "torch_dtype": "bfloat16"},
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>"]
TOKENIZERS = {  # tokenizer_config.json
    "qwen2": {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{%- for message in messages %}\n"
        "    {%- if message.role not in ['system', 'user', 'assistant'] %}\n"
        "        {{- raise_exception('unknown role ' + message.role) }}\n    {%- endif %}\n"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    },
    "llama": {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"
    },
}  # fmt: skip
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n  {% if loop.first %}{{ strftime_now('%Y') | length }}|{% endif %}\n"
    "{{ message['role'] }}: {{ message['content'] | trim }}\n{{ {'é': 1} | tojson }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def random_model(config, seed: int) -> torch.nn.Module:
    """A random model in which every parameter matters: no norm is 1 and no bias is 0."""
    torch.manual_seed(seed)
    dtype = config.dtype or torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype="float32").eval()
    for name, parameter in model.named_parameters():
        wide = "norm" in name or "bias" in name
        parameter.data += torch.randn_like(parameter) * (0.3 if wide else 0.1)
    return model.to(dtype)


def make_tokenizer(folder: Path, name: str) -> None:
    """Write a byte-level BPE tokenizer with a few merges, in the files that published folders have."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator([(Path(__file__).parent.parent / "LICENSE").read_text()], trainer)
    if name == "llama":
        bos = SPECIAL[3]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 3)])
        (folder / "chat_template.jinja").write_text(LLAMA_TEMPLATE)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZERS[name], indent=1))
    stops = {"qwen2": {"eos_token_id": [2, 0]}, "llama": {"bos_token_id": 3, "eos_token_id": 4}}[name]
    (folder / "generation_config.json").write_text(json.dumps(stops))


def tokenized(folder: Path) -> dict:
    """What transformers' tokenizer for the folder makes of TEXTS and MESSAGES."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    chat = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return {
        "texts": TEXTS,
        "ids": ids,
        "decoded": [tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in ids],
        "messages": MESSAGES,
        "chat": chat,
        "chat_ids": tokenizer(chat, add_special_tokens=False).input_ids,
    }


@torch.no_grad()
def reference(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Random prompts, their logits and greedy continuations: each alone, unpadded, float32, without a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    rng, out = np.random.default_rng(1), {}
    for row, length in enumerate(LENGTHS[name]):
        tokens = torch.tensor(rng.integers(0, model.config.vocab_size, (1, length)))
        out[f"prompt_{row}"] = tokens[0].numpy().astype(np.int32)
        out[f"logits_{row}"] = model(tokens).logits[0].numpy()
        for _ in range(NEW_TOKENS):
            best = model(tokens).logits[0, -1].topk(2)
            assert best.values[0] - best.values[1] > 1e-3, f"{name}, row {row}: nearly a tie; take another seed"
            tokens = torch.cat([tokens, best.indices[None, :1]], dim=1)
        out[f"greedy_{row}"] = tokens[0, length:].numpy().astype(np.int32)
    return out


def make(name: str, seed: int) -> None:
    """Write one fixture: the model folder HERE/name, and what is expected of it in name.npz and name.json."""
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    random_model(CONFIGS[name], seed).save_pretrained(folder, max_shard_size="100KB" if name == "qwen2" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name in OLD_KEYS:
        config = json.loads((folder / "config.json").read_text())
        new_keys = ("rope_parameters", "dtype", "layer_types")
        config = {key: value for key, value in config.items() if key not in new_keys}
        (folder / "config.json").write_text(json.dumps(config | OLD_KEYS[name], indent=2))
    if name in TOKENIZERS:
        make_tokenizer(folder, name)
        (HERE / f"{name}.json").write_text(json.dumps(tokenized(folder), indent=1))
    np.savez_compressed(HERE / f"{name}.npz", **reference(folder, name))


EXPORT = """
import sys
from cero_jax import sharding
from cero_jax.huggingface import weights
source, folder, dtype = sys.argv[1:]
mesh = sharding.make_mesh(sharding.MeshConfig())
weights.save(folder, source, *weights.load(source, mesh, param_dtype=dtype))
"""


def read_back(python: str) -> None:
    """Check that cero_jax loads and writes each fixture such that transformers' logits are the same to the bit."""
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as scratch:
            dtype = "bfloat16" if name == "qwen3" else "float32"
            written = Path(scratch) / name
            subprocess.run([python, "-c", EXPORT, HERE / name, written, dtype], check=True, cwd=HERE.parent.parent)
            expected, got = np.load(HERE / f"{name}.npz"), reference(written, name)
            assert set(got) == set(expected)
            for key in got:
                np.testing.assert_array_equal(got[key], expected[key], err_msg=f"{name} {key}")
            if name in TOKENIZERS:
                assert tokenized(written) == json.loads((HERE / f"{name}.json").read_text())
        print(f"{name}: the folder that cero_jax wrote gives the same logits, tokens and tokenization")


if __name__ == "__main__":
    if sys.argv[1:2] == ["read-back"]:
        read_back(sys.argv[2])
    else:
        for seed, name in enumerate(CONFIGS):
            make(name, seed)
