"""How fast completions are drawn, compared with transformers' `generate`, and how fast an optimiser step is.

    python benchmarks/generation.py --reference reference/bin/python       # tokens a second of both sides
    python benchmarks/generation.py --profile                              # where a decode step's time goes
    python benchmarks/generation.py --step --rows 16                       # share of the measured matmul peak
    python benchmarks/generation.py --step --shape qwen2.5-0.5b --dtype bfloat16 --rows 64 --microbatch 8     # on a GPU

`--reference` is the Python of an environment with torch and transformers (model_folder.py says how to make it). Both
sides read one model folder (`--folder`, or random weights of `--shape`) and draw the same rows: `--group` rollouts of
each prompt of `--prompt-tokens` tokens, `--slots` rows at once. Each row's length is imposed, on our side by
`max_tokens` and on theirs by a StoppingCriteria, so that both draw the same number of tokens:

- fixed: every completion has `--median` tokens;
- long tail: log-normal lengths, scaled so that the longest is 8 times the median; neither side knows them beforehand;
- known: the same lengths, known to both sides: ours takes the longest first, theirs makes batches of like length.

The sides alternate. Each run is a process of its own on `--threads` cores, and warms up before it is measured. Where
other work runs, one thread gives the fairer ratio: torch's threads wait for each other at every operation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

TAIL = 8  # length of the longest completion over the median length
SHAPES = {  # of Qwen2: layers, width, heads, key-value heads, MLP width, vocabulary
    "small": (12, 512, 8, 2, 2048, 32_768),  # 62M parameters
    "qwen2.5-0.5b": (24, 896, 14, 2, 4864, 151_936),
    "qwen2.5-1.5b": (28, 1536, 12, 2, 8960, 151_936),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="Python with torch and transformers")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--folder", help="a Hugging Face folder instead of random weights of --shape")
    parser.add_argument("--dtype", default="float32", help="compute dtype of --profile and --step")
    parser.add_argument("--rows", type=int, default=128, help="rollouts to draw, or rows of an optimiser step")
    parser.add_argument("--slots", type=int, default=16, help="rows decoded at once")
    parser.add_argument("--group", type=int, default=8, help="rollouts of each prompt")
    parser.add_argument("--window", type=int, default=8, help="decode steps between two refills")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--median", type=int, default=16, help="median tokens of a completion")
    parser.add_argument("--microbatch", type=int, default=4, help="rows whose gradient is computed at once")
    parser.add_argument("--threads", type=int, default=2, help="cores that a side may use")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the work, the same for both sides ---


def lengths(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The workloads: [R] int32, the tokens of each row's completion."""
    normal = np.random.default_rng(0).standard_normal(args.rows)
    normal -= np.median(normal)
    tail = np.exp(normal * np.log(TAIL) / normal.max())  # median 1, longest TAIL
    tail = np.maximum(np.round(args.median * tail), 1).astype(np.int32)
    return {"fixed": np.full(args.rows, args.median, np.int32), "long tail": tail, "known": tail}


def prompts(args: argparse.Namespace, vocab_size: int) -> np.ndarray:
    """[U, Tp] int32 random tokens; row r draws from prompt r // group."""
    shape = (-(-args.rows // args.group), args.prompt_tokens)
    return np.random.default_rng(1).integers(10, vocab_size, shape, dtype=np.int32)


def clocks() -> np.ndarray:
    """[2] wall and CPU seconds. Other work on the machine adds to the first and hardly to the second."""
    return np.array([time.perf_counter(), time.process_time()])


def ours(args: argparse.Namespace) -> dict[str, list[float]]:
    """Wall and CPU seconds that this project's sampler takes for each workload."""
    import jax

    from cero_jax import sharding
    from cero_jax.huggingface import weights
    from cero_jax.sampler import SamplerConfig, SamplingBatch, make_sampler

    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    config, params = weights.load(args.folder, mesh)
    sample = make_sampler(config, SamplerConfig(TAIL * args.median, slots=args.slots, window=args.window), (), 0, mesh)
    tokens, rows = prompts(args, params["embed"].shape[0]), np.arange(args.rows, dtype=np.int32)
    batch = SamplingBatch(
        prompt_tokens=tokens,
        prompt_lengths=np.full(len(tokens), args.prompt_tokens, np.int32),
        prompt_of_row=rows // args.group,
        row_mask=np.ones(args.rows, bool),
        prompt_ids=rows // args.group,
        rollout_index=rows % args.group,
    )
    sample(params, np.uint32(0), np.uint32(0), batch._replace(max_tokens=np.ones(args.rows, np.int32)))
    seconds = {}
    for step, (name, wanted) in enumerate(lengths(args).items()):
        limited = batch._replace(max_tokens=wanted, expected_tokens=wanted if name == "known" else None)
        start = clocks()
        drawn = sample(params, np.uint32(0), np.uint32(step), limited)
        seconds[name] = (clocks() - start).tolist()
        assert (drawn.lengths == wanted).all()
    return seconds


def transformers(args: argparse.Namespace) -> dict[str, list[float]]:
    """Wall and CPU seconds that `generate` takes for each workload, in batches of `slots` rows."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, StoppingCriteriaList  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype="float32").eval()
    model.generation_config.eos_token_id = None
    tokens = prompts(args, model.config.vocab_size)[np.arange(args.rows) // args.group]

    @torch.inference_mode()
    def draw(rows: np.ndarray, wanted: np.ndarray) -> None:
        limit = torch.from_numpy(args.prompt_tokens + wanted[rows])
        ids = torch.from_numpy(tokens[rows]).long()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=0, max_new_tokens=int(wanted[rows].max()),
            stopping_criteria=StoppingCriteriaList([lambda so_far, _scores: so_far.shape[1] >= limit]),
        )  # fmt: skip
        assert out.shape[1] == limit.max()

    draw(np.arange(args.slots), np.full(args.rows, 4))
    seconds = {}
    for name, wanted in lengths(args).items():
        order = np.argsort(-wanted, kind="stable") if name == "known" else np.arange(args.rows)
        start = clocks()
        for first in range(0, args.rows, args.slots):
            draw(order[first : first + args.slots], wanted)
        seconds[name] = (clocks() - start).tolist()
    return seconds


# --- both sides, alternating ---


def compare(args: argparse.Namespace) -> None:
    """Print tokens a second of both sides, and the ratio of each pair of runs."""
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in (
        "folder", "rows", "slots", "group", "window", "prompt_tokens", "median", "threads")]  # fmt: skip
    pythons = {"ours": sys.executable, "transformers": args.reference}
    seconds = {side: [] for side in pythons}
    for repeat in range(args.repeats):
        for side, python in pythons.items():
            command = [python, __file__, f"--side={side}", *options]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds[side].append(json.loads(run.stdout.splitlines()[-1]))
            print(f"run {repeat} of {side}: {run.stdout.splitlines()[-1]}", file=sys.stderr)
    print("| lengths | tokens | steps here / there | clock | ours, tokens/s | transformers, tokens/s | ratio (range) |")
    print("|---|---|---|---|---|---|---|")
    for name, wanted in lengths(args).items():
        total, both = wanted.sum(), (np.array([run[name] for run in seconds[side]]).T for side in pythons)
        for clock, here, there in zip(("wall", "CPU"), *both, strict=True):
            ratio = there / here
            speeds = f"{total / np.median(here):.0f} | {total / np.median(there):.0f}"
            spread = f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
            print(f"| {name} | {total} | {steps(args, name, wanted)} | {clock} | {speeds} | {spread} |")


def steps(args: argparse.Namespace, name: str, wanted: np.ndarray) -> str:
    """Decode steps here / there, by arithmetic: slots refilled after every window, or batches run to their longest."""
    rows = list(np.sort(wanted)[::-1] if name == "known" else wanted)
    there = sum(max(rows[first : first + args.slots]) for first in range(0, len(rows), args.slots))
    here, slots = 0, np.zeros(args.slots, int)
    while rows or slots.any():
        for slot in np.flatnonzero(slots == 0):
            slots[slot] = rows.pop(0) if rows else 0
        took = min(args.window, slots.max())
        here, slots = here + took, np.maximum(slots - took, 0)
    return f"{here} / {there}"


def write_folder(args: argparse.Namespace, folder: Path) -> str:
    """Write random weights of `--shape` as a Hugging Face folder; returns its path."""
    from cero_jax.huggingface import weights

    layers, width, heads, kv_heads, mlp, vocab = SHAPES[args.shape]
    (folder / "source").mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": layers,
        "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp,
        "vocab_size": vocab, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "max_position_embeddings": 32_768, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "source" / "config.json").write_text(json.dumps(config))
    shape, _, params = model_of(args)
    weights.save(folder / "model", folder / "source", shape, params)
    return str(folder / "model")


# --- where the time goes ---


def model_of(args: argparse.Namespace):
    """Of `--shape`: the ModelConfig, with `--dtype` as compute dtype, the vocabulary size, and random parameters."""
    import jax

    from cero_jax import model, sharding
    from cero_jax.model import ModelConfig

    layers, width, heads, kv_heads, mlp, vocab = SHAPES[args.shape]
    config = ModelConfig(
        num_layers=layers, width=width, num_heads=heads, num_kv_heads=kv_heads, head_dim=width // heads, mlp_width=mlp,
        qkv_bias=True, rope_base=1e6, param_dtype="float32", compute_dtype=args.dtype,
    )  # fmt: skip
    params = model.init_params(config, vocab, 0)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    return config, vocab, jax.device_put(params, sharding.shard_params(params, mesh))


def best_seconds(functions: dict, repeats: int = 7) -> dict[str, float]:
    """The shortest of several calls of each function, which other work on the machine disturbs least."""
    import jax

    best = {}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            taken = time.perf_counter() - start
            best[name] = min(best.get(name, np.inf), taken) if name in best else np.inf  # the first call compiles
    return best


def profile(args: argparse.Namespace) -> None:
    """Print the milliseconds of a decode step and of its parts, each measured alone in a loop of as many steps."""
    import jax
    import jax.numpy as jnp

    from cero_jax import model
    from cero_jax.next_token import draw

    config, _, params = model_of(args)
    params, num_steps = model.cast(params, config.compute_dtype), 16
    space = args.prompt_tokens + TAIL * args.median
    keys = jax.random.split(jax.random.key(0), args.slots)
    length = jnp.full(args.slots, args.prompt_tokens, jnp.int32)
    hidden = jnp.ones((args.slots, config.width), config.compute_dtype)
    cache = model.init_cache(config, args.slots, space)

    def logits(params, i, hidden, cache):
        return model.logits(params, config, hidden), cache

    def drawn(params, i, hidden, cache):
        folded = jax.vmap(jax.random.fold_in)(keys, length + i)
        token, log_prob = draw(logits(params, i, hidden, cache)[0], folded, temperature=1.0, top_k=0, top_p=1.0)
        return (token + log_prob)[:, None], cache

    def forward(params, i, hidden, cache, token=jnp.int32(0)):  # noqa: B008
        # Depends on the step before, so that XLA moves nothing out of the loop.
        token = token + (hidden[:, :1] > 1e9).astype(jnp.int32)
        sees = jnp.arange(space, dtype=jnp.int32)[None, None] <= length[:, None, None] + i
        hidden, cache = model.forward(params, config, token, length[:, None] + i, sees, cache, length + i)
        return hidden[:, 0], cache

    def forward_alone(params, i, hidden, cache):
        token = (hidden[:, :1] > 1e9).astype(jnp.int32)
        sees = jnp.ones((args.slots, 1, 1), bool)
        return model.forward(params, config, token, length[:, None], sees)[0][:, 0], cache

    def write(params, i, hidden, cache):
        new = jnp.zeros((args.slots, 1, config.num_kv_heads, config.head_dim), config.compute_dtype) + hidden[0, 0]
        rows = jnp.arange(args.slots, dtype=jnp.int32)[:, None]

        def layer(cache, index):
            return jax.tree.map(lambda c: c.at[index, rows, (length + i)[:, None]].set(new), cache), None

        return hidden, jax.lax.scan(layer, cache, jnp.arange(config.num_layers, dtype=jnp.int32))[0]

    def whole(params, i, hidden, cache):
        token = drawn(params, i, hidden, cache)[0].astype(jnp.int32)
        return forward(params, i, hidden, cache, token)

    def loop(part):
        @partial(jax.jit, donate_argnums=1)
        def run(params, cache):
            def step(i, carry):
                hidden, cache = carry
                out, cache = part(params, i, hidden, cache)
                return hidden + 1e-30 * out[:, :1].astype(hidden.dtype), cache

            return jax.lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), step, (hidden, cache))

        def call():
            nonlocal cache
            out, cache = run(params, cache)
            return out

        return call

    parts = (whole, logits, drawn, forward, forward_alone, write)
    ms = {name: 1e3 * s / num_steps for name, s in best_seconds({f.__name__: loop(f) for f in parts}).items()}
    split = {
        "layers, no cache": ms["forward_alone"],
        "cache write": ms["write"],
        "attention to the cache": ms["forward"] - ms["forward_alone"] - ms["write"],
        "logits": ms["logits"],
        "draw": ms["drawn"] - ms["logits"],
    }
    print(f"a decode step of {args.slots} slots, cache of {space} places: {ms['whole']:.1f} ms")
    for name, value in split.items():
        print(f"  {name:24s} {value:6.1f} ms  {value / sum(split.values()):4.0%}")


# --- an optimiser step ---


def learner_step(args: argparse.Namespace) -> None:
    """Print an optimiser step's model FLOPs a second and what share that is of a large matmul's in the same dtype."""
    import jax
    import jax.numpy as jnp

    from cero_jax import sharding
    from cero_jax.learner import Batch, Fixed, LearnerConfig, make_learner

    config, vocab, params = model_of(args)
    rows, width, limit = args.rows, args.prompt_tokens, TAIL * args.median
    settings = LearnerConfig(rows_per_step=rows, rows_per_microbatch=args.microbatch)
    learner = make_learner(config, vocab, settings, 1.0, sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
    rng = np.random.default_rng(0)
    batch = Batch(
        prompt_tokens=rng.integers(0, vocab, (rows, width), dtype=np.int32),
        prompt_lengths=np.full(rows, width, np.int32),
        tokens=rng.integers(0, vocab, (rows, limit), dtype=np.int32),
        lengths=np.full(rows, limit, np.int32),
        log_probs=np.full((rows, limit), -np.log(vocab), np.float32),
        reward=(np.arange(rows) % 2).astype(np.float32),
        group_ids=(np.arange(rows) // 2).astype(np.int32),
        row_mask=np.ones(rows, bool),
        row_weight=np.ones(rows, np.float32),
    )
    millions = sum(p.size for p in jax.tree.leaves(params)) / 1e6
    side = 8192 if jax.default_backend() == "gpu" else 2048
    square, matmul = jnp.ones((side, side), args.dtype), jax.jit(jnp.matmul)
    state = learner.init(params)

    def step():
        nonlocal state
        inputs = batch, learner.advantages(batch), np.float32(1e-4), np.ones(rows, bool)
        state, metrics = learner.step(state, Fixed({}, None), *inputs)
        return metrics

    seconds = best_seconds({"step": step, "matmul": lambda: matmul(square, square)}, repeats=args.repeats)
    peak, flops = 2 * side**3 / seconds["matmul"], step_flops(config, vocab, rows, width, limit)
    print(f"{millions:.0f}M parameters, {args.dtype}, {rows} rows of {width} + {limit} tokens, "
          f"{args.microbatch} at once: {seconds['step']:.2f} s a step, "
          f"{rows * (width + limit) / seconds['step']:.0f} tokens/s, {flops / seconds['step'] / 1e9:.0f} GFLOP/s, "
          f"{flops / seconds['step'] / peak:.0%} of the matmul peak, {peak / 1e9:.0f} GFLOP/s")  # fmt: skip


def step_flops(config, vocab: int, rows: int, width: int, limit: int) -> float:
    """Model FLOPs of an optimiser step: three times the forward's, whatever `remat` computes again.

    width, limit: tokens of each prompt, of each completion. A forward takes 2 FLOPs for each weight and token, and in a
    layer 4 * H * Dh for each pair of tokens of which one sees the other. Only completion tokens have logits.
    """
    c, tokens = config, width + limit - 1
    heads = 2 * c.num_heads + 2 * c.num_kv_heads
    layer = c.width * (heads * c.head_dim + 3 * c.mlp_width)
    pairs = tokens * (tokens + 1) / 2
    forward = c.num_layers * (2 * layer * tokens + 4 * c.num_heads * c.head_dim * pairs)
    return 3 * rows * (forward + 2 * c.width * vocab * limit)


def main() -> None:
    args = arguments()
    if args.side:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        print(json.dumps({"ours": ours, "transformers": transformers}[args.side](args)))
    elif args.profile:
        profile(args)
    elif args.step:
        learner_step(args)
    elif args.reference:
        with tempfile.TemporaryDirectory() as scratch:
            args.folder = args.folder or write_folder(args, Path(scratch))
            compare(args)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
