"""A run on a pod, on paper: steps and rollouts an hour at most, and what limits them. No accelerator is needed.

    python benchmarks/pods.py --libtpu DIR --log counts.jsonl --texts math500.jsonl

The bounds are those of compiled.py, by formula where that reads them from compiled programs: max(FLOPs / peak, bytes
read / bandwidth) + bytes sent / link, of what the makers publish of a chip. No program reaches them. A step is R
rollouts of completions up to T tokens:

- decode: each token reads the weights' copy and the cache of all slots. R rows, or fewer at once, whichever is faster:
  a slot that falls free takes the next row, so that fewer wait for the longest;
- learn: 8 FLOPs a parameter and token (6, and the forward pass again, of rematerialised layers), for the rows of live
  groups, in micro-batches of rows of like length, padded to T / 4, T / 2 or T; each gathers the parameters twice and
  scatters the gradients once over fsdp;
- read, copy: the prompts once a group; the weights gathered once for the sampler;
- host: measured by host_time.py and host_faults.py (docs/reliability.md, docs/clusters.md).

--log: {"group_size": 8, "num_correct": [..]} a prompt, a real run's: which share of groups is live. It holds no
lengths: those are of the worked solutions in --texts (a field "solution"), as multiples of their mean.
"""

import argparse
import heapq
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from compiled import ROOT, SHAPES, V5E, V5P, Target, devices, find_compilers

sys.path.insert(0, str(ROOT))
PROMPT, LIMIT, MEAN, GROUP = 320, 8192, 2048, 8  # tokens, tokens, tokens, rollouts
HOST = 0.1  # seconds a step
SHAPES = SHAPES | {
    "qwen2_5_32b": (
        {"num_layers": 64, "width": 5120, "num_heads": 40, "num_kv_heads": 8, "head_dim": 128, "mlp_width": 27_648}
        | {"tied_embeddings": False},
        152_064,
    )
}


class Model(NamedTuple):
    """What a model's shape comes to. Bytes are of bfloat16."""

    layers: int
    width: int
    kv_heads: int
    parameters: float
    products: float  # parameters that a token is multiplied with: all but the embedding where the output has its own
    cache: float  # bytes a token, of keys and values
    attention: float  # FLOPs forward, of a token for each place that it sees


PODS = {  # a v5p is named by its cores, two a chip
    "v5e-256": Target("tpu", "v5e:16x16", 256, *V5E),
    "v5p-512": Target("tpu", "v5p:4x8x8", 256, *V5P),
}
TENSOR = {  # of the mesh; all else is fsdp
    ("deepseek_r1_distill_qwen_1_5b", "v5e-256"): 1,
    ("deepseek_r1_distill_qwen_1_5b", "v5p-512"): 1,
    ("qwen2_5_math_7b", "v5e-256"): 4,
    ("qwen2_5_math_7b", "v5p-512"): 1,
    ("qwen2_5_32b", "v5e-256"): 8,
    ("qwen2_5_32b", "v5p-512"): 4,
}
ROWS = (2048, 8192)  # of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libtpu", type=Path, required=True, help="the directory that libtpu was installed in")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    args = parser.parse_args()
    find_compilers(args.libtpu, None)
    live, lengths = live_share(args.log), relative_lengths(args.texts)
    print(
        f"{live:.0%} of groups live; completions of {np.minimum(lengths * MEAN, LIMIT).mean():,.0f} tokens on average, "
        f"{(lengths * MEAN >= LIMIT).mean():.1%} of them cut at {LIMIT:,}; prompts of {PROMPT}, a group of {GROUP}\n"
    )
    columns = (
        "model", "pod", "data x fsdp x tensor", "rows a step, at once", "GB a chip", "decode", "learn, of it gathering",
        "read, copy, host", "steps an hour", "rollouts an hour", "slots at work", "cache in what is read",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for (name, pod), tensor in TENSOR.items():
        for rows in ROWS:
            drawn = np.minimum(np.random.default_rng(0).choice(lengths, rows) * MEAN, LIMIT).astype(int)
            print(row(name, pod, tensor, drawn, live), flush=True)


def live_share(path: Path) -> float:
    """The share of a log's groups whose rewards are not all alike."""
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    counts = np.concatenate([np.array(each["num_correct"]) / each["group_size"] for each in logged])
    return float(((counts > 0) & (counts < 1)).mean())


def relative_lengths(path: Path) -> np.ndarray:
    """[n] lengths of the solutions, as multiples of their mean."""
    lengths = np.array([len(json.loads(line)["solution"]) for line in path.read_text().splitlines()], float)
    return lengths / lengths.mean()


def model_of(name: str) -> Model:
    """A model, by its shape."""
    shape, vocab = SHAPES[name]
    layers, width, heads, kv_heads, size = (
        shape[key] for key in ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim")
    )
    blocks = layers * (width * size * (2 * heads + 2 * kv_heads) + 3 * width * shape["mlp_width"])
    embedding = vocab * width
    return Model(
        layers,
        width,
        kv_heads,
        parameters=blocks + embedding * (1 if shape.get("tied_embeddings", True) else 2),
        products=blocks + embedding,
        cache=2 * 2 * layers * kv_heads * size,
        attention=4.0 * layers * heads * size,
    )


def row(name: str, pod_name: str, tensor: int, lengths: np.ndarray, live: float) -> str:
    """A line of the table. lengths: [R] tokens of a step's completions."""
    model, pod, rows = model_of(name), PODS[pod_name], len(lengths)
    pieces = pod.chips // tensor  # of the rows: all of it fsdp
    mesh = f"1 x {pieces} x {tensor}"
    at_once = [rows // 2**n for n in range(8) if rows // 2**n >= pieces]
    found = [(*decode(model, pod, tensor, lengths, slots), slots) for slots in at_once]
    fitting = [each for each in found if memory_needed(name, pod, pieces, tensor, rows, each[-1]) < 0.9 * pod.memory]
    if not fitting:
        least = memory_needed(name, pod, pieces, tensor, rows, min(at_once)) / 1e9
        return f"| {name} | {pod_name} | {mesh} | does not fit: {least:.1f} of {pod.memory / 1e9:.0f} GB |" + " |" * 8
    drawing, busy, cache_share, slots = min(fitting)
    learning, gathering = learn(model, pod, tensor, lengths, live)
    reading = 2 * model.products * rows / GROUP * PROMPT / pod.chips / pod.flops
    copying = 2 * model.parameters / tensor / pod.link
    steps = 3600 / (drawing + learning + reading + copying + HOST)
    needed = memory_needed(name, pod, pieces, tensor, rows, slots) / 1e9
    return (
        f"| {name} | {pod_name} | {mesh} | {rows:,}, {slots:,} | {needed:.1f} of {pod.memory / 1e9:.0f} | "
        f"{drawing:.0f} s | {learning:.0f} s, {gathering:.0%} | {reading:.1f}, {copying:.1f}, {HOST} s | {steps:.0f} | "
        f"{steps * rows:,.0f} | {busy:.0%} | {cache_share:.0%} |"
    )


def decode(model: Model, pod: Target, tensor: int, lengths: np.ndarray, slots: int) -> tuple[float, float, float]:
    """Seconds to draw all rows in so many slots, the share of slots at work, and of cache in what is read meanwhile.

    A slot that falls free takes the next row. All slots' caches are as long as the longest row under way.
    """
    ends = [0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + int(length))
    steps = max(ends)
    here = slots * tensor / pod.chips  # slots of a chip
    mean_places = PROMPT + (
        LIMIT / 2 if slots == len(lengths) else LIMIT
    )  # with few slots it soon stays at its longest
    cache = here * mean_places * model.cache / min(tensor, model.kv_heads)
    weights = 2 * model.products / tensor
    computed = here * (2 * model.products + model.attention * mean_places) / tensor / pod.flops
    summed = 2 * 2 * model.layers * 2 * model.width * here if tensor > 1 else 0  # two all-reduces a layer, each way
    a_step = max((weights + cache) / pod.bandwidth, computed) + summed / pod.link
    return steps * a_step, sum(lengths) / steps / slots, cache / (weights + cache)


def learn(model: Model, pod: Target, tensor: int, lengths: np.ndarray, live: float) -> tuple[float, float]:
    """Seconds of the gradient of a step's live rows, and the share of them in which parameters are sent."""
    size = pod.chips // tensor  # rows of a micro-batch: one on each piece
    limits = np.array([LIMIT // 4, LIMIT // 2, LIMIT])
    taken = np.sort(lengths[: round(live * len(lengths))])  # which rows are live has nothing to do with their length
    longest = [part[-1] for part in np.split(taken, range(size, len(taken), size))]
    width = PROMPT + limits[np.searchsorted(limits, longest)]  # [micro-batches] places of a row
    forward = 2 * model.products + model.attention * width / 2
    computed = (4 * forward * width).sum() / tensor / pod.flops
    summed = 3 * 2 * 2 * model.layers * 2 * model.width * width.sum() if tensor > 1 else 0
    gathered = len(width) * (2 * 2 + 4) * model.parameters / tensor  # bfloat16 twice, the gradient in float32
    return computed + (summed + gathered) / pod.link, gathered / pod.link / (computed + (summed + gathered) / pod.link)


def memory_needed(name: str, pod: Target, fsdp: int, tensor: int, rows: int, slots: int) -> float:
    """Bytes on each chip, as a run would estimate them at its start."""
    from cero_jax import memory, sharding
    from cero_jax.evaluation import EvaluationConfig
    from cero_jax.learner import LearnerConfig
    from cero_jax.model import ModelConfig
    from cero_jax.sampler import SamplerConfig

    shape: dict[str, Any]
    shape, vocab = SHAPES[name]
    return memory.estimate(
        ModelConfig(compute_dtype="bfloat16", remat=True, **shape),
        vocab,
        LearnerConfig(rows_per_step=rows, rows_per_microbatch=fsdp),
        SamplerConfig(max_completion_tokens=LIMIT, slots=slots),
        EvaluationConfig(samples=2, rows=fsdp),
        sharding.make_mesh(sharding.MeshConfig(1, fsdp, tensor), devices(pod)),
        prompt_widths=(PROMPT,),
        min_group=GROUP,
    ).total


if __name__ == "__main__":
    main()
