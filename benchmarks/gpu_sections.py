"""What gpu.py measures: each section's cases, and what each case costs. jax is imported here, in a process of its own.

A section is a function of the sizes that returns its cases; a case yields rows: seconds, and with them tokens, bytes
and FLOPs a second, and a note.
"""

import inspect
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import generation
import jax
import jax.numpy as jnp
import numpy as np
from allocator_speed import state_of
from jax.sharding import Mesh

import cero_jax
from cero_jax import learner as learning
from cero_jax import model, sampler, sharding
from cero_jax.learner import Batch, Fixed, LearnerConfig
from cero_jax.microbatches import Shape
from cero_jax.model import Cache, ModelConfig, Params
from cero_jax.sampler import SamplerConfig, SamplingBatch
from cero_jax.slots import Slots

ROOT = Path(__file__).parent.parent
SHAPES = generation.SHAPES | {"tiny": (2, 64, 4, 2, 128, 512)}


class Sizes(NamedTuple):
    """How large everything is."""

    shapes: tuple[str, ...]
    copied: int  # float32 values
    matmul: int  # the side of a square
    slots: tuple[int, ...]  # rows decoded at once
    prompt_tokens: int
    new_tokens: int
    rows: int  # of a training step
    rows_at_once: int
    row_tokens: tuple[int, int]  # of a training row: prompt, completion
    heads: tuple[int, int, int]  # of attention alone: queries', keys' and values', size of each
    lengths: tuple[int, ...]  # tokens of a row there
    tokens_at_once: int
    prompts: tuple[int, ...]  # of the allocator
    run: tuple[str, ...]  # settings of the embedded task


FULL = Sizes(
    ("qwen2.5-1.5b", "qwen2.5-0.5b"), 2**29, 16_384, (64, 256), 64, 128, 32, 8, (128, 896), (12, 2, 128),
    (1024, 4096, 8192), 8192, (10**6, 10**7), (),
)  # fmt: skip
TINY = Sizes(
    ("tiny",), 2**20, 256, (4,), 8, 8, 4, 2, (8, 24), (4, 2, 16), (32, 64), 64, (10**3,),
    ("--warm-start.num-steps=5", "--allocator.total-budget=32", "--allocator.num-epochs=2"),
)  # fmt: skip
Cases = dict[str, Callable[[], Iterator[dict]]]  # a case's name, and what measures its rows


# --- counts ---


def decode_bytes(config: ModelConfig, vocab_size: int, rows: int, length: float) -> float:
    """Bytes that a decode step must read: every weight once, of the embedding only what logits take, and the cache.

    rows: decoded at once. length: tokens that each has in the cache.
    """
    params = model.abstract_params(config, vocab_size)
    if not config.tied_embeddings:
        del params["embed"]  # looked up, a few rows of it
    params = jax.eval_shape(partial(model.cast, dtype=config.compute_dtype), params)
    token = jax.eval_shape(lambda: model.init_cache(config, 1, 1))
    weights, kept = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (params, token))
    return weights + rows * length * kept


def attention_flops(rows: int, length: int, heads: int, head_dim: int) -> float:
    """FLOPs of causal attention, forward and backward: seven products of [length, length, head_dim], half of each.

    Two of them forward, five backward: the scores are computed again, as a kernel that keeps none has to.
    """
    pairs = length * (length + 1) / 2
    return rows * heads * 7 * 2 * head_dim * pairs


# --- what is measured ---


def median_seconds(call: Callable[[int], Any], calls: int = 1, repeats: int = 5) -> float:
    """The median of a call's seconds, after a first that compiles; `calls` of them are in flight at once.

    call: is given its number, to choose its input by.
    """
    jax.block_until_ready(call(0))
    taken, number = [], itertools.count(1)
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = call(next(number))
        jax.block_until_ready(out)  # pyright: ignore[reportPossiblyUnboundVariable]
        taken.append((time.perf_counter() - start) / calls)
    return float(np.median(taken))


def ceilings(sizes: Sizes) -> Cases:
    def copy():
        x = jax.random.normal(jax.random.key(0), sizes.copied, jnp.float32)
        add = jax.jit(lambda x: x + 1)
        seconds = median_seconds(lambda _: add(x), calls=10)
        yield {"seconds": seconds, "bytes_per_second": 2 * x.nbytes / seconds}

    def matmul():
        draw = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), (sizes.matmul,) * 2, jnp.bfloat16))
        left, right, product = draw(0), draw(1), jax.jit(jnp.matmul)
        seconds = median_seconds(lambda _: product(left, right), calls=10)
        yield {"seconds": seconds, "flops_per_second": 2 * sizes.matmul**3 / seconds}

    return {"copy": copy, "matmul": matmul}


def make_model(shape: str, **settings: Any) -> tuple[ModelConfig, int, Params, Mesh]:
    """Of the shape: ModelConfig, vocabulary size, random parameters, and the mesh of the one device they lie on."""
    if "attention" not in ModelConfig.__dataclass_fields__ and settings.pop("attention", "xla") != "xla":
        raise ValueError("this version has no fused attention")
    layers, width, heads, kv_heads, mlp, vocab_size = SHAPES[shape]
    config = ModelConfig(
        num_layers=layers, width=width, num_heads=heads, num_kv_heads=kv_heads, head_dim=width // heads, mlp_width=mlp,
        qkv_bias=True, rope_base=1e6, compute_dtype="bfloat16", **settings,
    )  # fmt: skip
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    layout = sharding.shard_params(model.abstract_params(config, vocab_size), mesh)
    make = jax.jit(partial(model.init_params, config, vocab_size, 0), out_shardings=layout)  # as one program
    return config, vocab_size, make(), mesh


def decode(sizes: Sizes) -> Cases:
    every = itertools.product(sizes.shapes, sizes.slots)
    return {f"{shape}, {rows} rows": partial(decode_rows, sizes, shape, rows) for shape, rows in every}


def decode_rows(sizes: Sizes, shape: str, rows: int) -> Iterator[dict]:
    """Of the sampler's call, of its window and of its step: seconds of a step, tokens and bytes a second."""
    config, vocab_size, params, mesh = make_model(shape, param_dtype="bfloat16")
    new, prompts, row = sizes.new_tokens, -(-rows // 8), np.arange(rows, dtype=np.int32)
    space = sizes.prompt_tokens + new
    read = decode_bytes(config, vocab_size, rows, sizes.prompt_tokens + (new + 1) / 2)

    def figures(part: str, seconds: float) -> dict:
        """Of `new` steps that took so long."""
        speeds = {"tokens_per_second": rows * new / seconds, "bytes_per_second": read * new / seconds}
        return {"part": part, "seconds": seconds / new, **speeds, "note": f"{read / 1e9:.2f} GB a step"}

    settings = SamplerConfig(new, window=new)
    sample = sampler.make_sampler(config, settings, (), 0, mesh)
    batch = SamplingBatch(
        prompt_tokens=np.random.default_rng(0).integers(0, vocab_size, (prompts, sizes.prompt_tokens), np.int32),
        prompt_lengths=np.full(prompts, sizes.prompt_tokens, np.int32),
        prompt_of_row=row // 8,
        row_mask=np.ones(rows, bool),
        prompt_ids=row // 8,
        rollout_index=row % 8,
    )
    seconds = median_seconds(lambda i: sample(params, np.uint32(0), np.uint32(i), batch).tokens)
    yield figures("the sampler's call", seconds)

    inside = inspect.getclosurevars(sample).nonlocals  # nothing but a benchmark has a use for them one by one
    empty = inside["with_room"](None, rows, (space,), space)
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    cache = Cache(*(normal(jax.random.key(i), c.shape, c.dtype) for i, c in enumerate(empty.cache)))
    layout = jax.tree.map(lambda x: x.sharding, empty)
    slots = empty._replace(hidden=normal(jax.random.key(2), empty.hidden.shape, empty.hidden.dtype), cache=cache)
    slots = jax.device_put(slots._replace(limit=jnp.full(rows, new, jnp.int32)), layout)
    begun = {
        "length": np.full(rows, sizes.prompt_tokens, np.int32),
        "drawn": np.zeros(rows, np.int32),
        "done": np.zeros(rows, bool),
    }

    @partial(jax.jit, donate_argnums=0, out_shardings=layout)
    def step(slots: Slots, params: Params) -> Slots:
        one = {"config": SamplerConfig(new, window=1), "eos_ids": (), "pad_id": 0, "stop_early": False}
        return sharding.on(mesh, sampler.decode)(params, slots, model_config=config, **one)

    def run(advance: Callable, times: int, _: int) -> Any:
        nonlocal slots
        slots = slots._replace(**jax.device_put(begun, sharding.rows(mesh)))
        for _ in range(times):
            slots = advance(slots, params)
        return slots.length

    yield figures("its window", median_seconds(partial(run, inside["run_window"], 1)))
    yield figures("its step", median_seconds(partial(run, step, new)))


def training(sizes: Sizes) -> Cases:
    kinds = (("cudnn", True), ("xla", True), ("cudnn", False))
    every = [(shape, *kind) for kind in kinds for shape in sizes.shapes]
    return {
        f"{shape}, {kernel}{', remat' if remat else ''}": partial(train, sizes, shape, kernel, remat)
        for shape, kernel, remat in every
    }


def train(sizes: Sizes, shape: str, kernel: str, remat: bool) -> Iterator[dict]:
    """Of the learner's step, with that kernel of attention: seconds, tokens and FLOPs a second."""
    config, vocab_size, params, mesh = make_model(shape, attention=kernel, remat=remat)
    rows, at_once, (width, limit) = sizes.rows, sizes.rows_at_once, sizes.row_tokens
    settings = LearnerConfig(rows_per_step=rows, rows_per_microbatch=at_once)
    learner = learning.make_learner(config, vocab_size, settings, 1.0, mesh)
    rng, fixed = np.random.default_rng(0), Fixed({}, None)
    batch = Batch(
        prompt_tokens=rng.integers(0, vocab_size, (rows, width), np.int32),
        prompt_lengths=np.full(rows, width, np.int32),
        tokens=rng.integers(0, vocab_size, (rows, limit), np.int32),
        lengths=np.full(rows, limit, np.int32),
        log_probs=np.full((rows, limit), -np.log(vocab_size), np.float32),
        reward=(np.arange(rows) % 2).astype(np.float32),
        group_ids=(np.arange(rows) // 2).astype(np.int32),
        row_mask=np.ones(rows, bool),
        row_weight=np.ones(rows, np.float32),
    )
    num_params = sum(p.size for p in jax.tree.leaves(params))
    state, advantages = learner.init(params), learner.advantages(batch)
    del params
    # A run compiles a shape for each of three lengths of completion; these rows are all of the longest.
    inside, longest = inspect.getclosurevars(learner.step).nonlocals, Shape(width + limit, limit)
    inputs = (inside["nothing"](state.params), state.params, fixed, jax.device_put(batch, sharding.rows(mesh)))
    some = np.zeros(at_once, np.int32), np.ones(at_once, bool)
    inside["compiled"][longest] = inside["add"].lower(*inputs, advantages, *some, shape=longest).compile()
    del inputs

    def step(_: int) -> Any:
        nonlocal state
        state, metrics = learner.step(state, fixed, batch, advantages, np.float32(1e-6), np.ones(rows, bool))
        return state.step, metrics

    seconds, tokens = median_seconds(step, repeats=3), rows * (width + limit)
    exact = generation.step_flops(config, vocab_size, rows, width, limit) / seconds
    yield {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_second": 6 * num_params * tokens / seconds,  # 2 a parameter and token forward, 4 backward
        "note": f"{exact / 1e12:.3g} TFLOP/s with attention's, logits of completions alone",
    }


def attention(sizes: Sizes) -> Cases:
    every = itertools.product(sizes.lengths, ("cudnn", "xla"))
    return {f"{length:,} tokens, {kernel}": partial(attend, sizes, length, kernel) for length, kernel in every}


def attend(sizes: Sizes, length: int, kernel: str) -> Iterator[dict]:
    """Of attention's forward and backward over `tokens_at_once` tokens in rows of `length`."""
    (heads, kv_heads, size), rows = sizes.heads, sizes.tokens_at_once // length
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    shapes = [(rows, length, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, towards = (normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))

    @jax.jit
    def gradient(q, k, v, towards):
        out, pull = jax.vjp(partial(jax.nn.dot_product_attention, is_causal=True, implementation=kernel), q, k, v)
        return out, pull(towards)

    seconds = median_seconds(lambda _: gradient(*inputs, towards), calls=20)
    yield {"seconds": seconds, "flops_per_second": attention_flops(rows, length, heads, size) / seconds}


def allocator(sizes: Sizes) -> Cases:
    return {f"{number:,} prompts": partial(allocate, number) for number in sizes.prompts}


def allocate(num_prompts: int) -> Iterator[dict]:
    """Of a round, the host waiting at its end: seconds, and of its parts; states in turn, more than a cache holds."""
    made, first = state_of(cero_jax.cero, num_prompts)
    names = ("alpha", "beta", "cumulative_rollouts", "reserved")
    number = 8 if num_prompts <= 10**6 else 2
    states = [first._replace(**{n: jnp.roll(getattr(first, n), 97 * i) for n in names}) for i in range(number)]
    after = [made.allocate(state) for state in states]
    correct = [n // 2 for n, _ in after]
    add = jax.jit(lambda *arrays: [x + 1 for x in arrays])

    def both(i: int) -> Any:
        n, state = made.allocate(states[i % number])
        return made.update(state, n, correct[i % number])

    parts = {
        "allocate": lambda i: made.allocate(states[i % number]),
        "update": lambda i: made.update(after[i % number][1], after[i % number][0], correct[i % number]),
        "stream": lambda i: add(*(getattr(states[i % number], n) for n in names)),
    }
    ms = {name: 1e3 * median_seconds(part, repeats=15) for name, part in parts.items()}
    seconds = median_seconds(both, repeats=15)
    note = ", ".join(f"{name} {value:.3f} ms" for name, value in ms.items())
    yield {"seconds": seconds, "note": f"{note}: {1e3 * seconds / ms['stream']:.1f} streams"}


def embedded(sizes: Sizes) -> Cases:
    return {"chain_sum": partial(run_embedded, sizes)}


def run_embedded(sizes: Sizes) -> Iterator[dict]:
    """Of a whole run of the embedded task: seconds, and its accuracy at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        task = [str(ROOT / "configs" / "chain_sum.py"), f"--work-dir={scratch}/run", *sizes.run]
        start = time.perf_counter()
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{scratch}/cache"}
        env.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)  # which leaves the memory to this process
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *task], env=env, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"train.py ended with status {done.returncode}")
        rows = [json.loads(line) for line in (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    note = f"accuracy {last['accuracy']:.3f} with {last['spent']:,} rollouts"
    yield {"seconds": seconds, "note": f"{note}; {len(os.sched_getaffinity(0))} cores"}


MEASURES: dict[str, Callable[[Sizes], Cases]] = {
    "ceilings": ceilings,
    "decode": decode,
    "training": training,
    "attention": attention,
    "allocator": allocator,
    "embedded": embedded,
    "embedded_cpu": embedded,
}
