"""What gpu.py measures: each section's cases, and what each case costs. jax is imported here, in a process of its own.

A section is a function of the sizes that returns its cases; a case yields rows: seconds, and with them tokens, bytes
and FLOPs a second, and a note.
"""

import collections
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
from cero_jax import model, sharding
from cero_jax.attention import Causal, Choice, Kernel, attend
from cero_jax.learner import Batch, Fixed, LearnerConfig, make_learner
from cero_jax.microbatches import Shape
from cero_jax.model import Cache, ModelConfig, Params
from cero_jax.sampler import SamplerConfig, SamplingBatch, make_sampler

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
    row_tokens: tuple[int, int]  # of a training row: prompt, completion
    heads: tuple[int, int, int]  # of attention alone: queries', keys' and values', size of each
    lengths: tuple[int, ...]  # tokens of a row there
    tokens_at_once: int
    prompts: tuple[int, ...]  # of the allocator
    run: tuple[str, ...]  # settings of the embedded task


FULL = Sizes(
    ("qwen2.5-1.5b", "qwen2.5-0.5b"), 2**29, 16_384, (64, 256), 64, 128, 32, (128, 896), (12, 2, 128),
    (1024, 4096, 8192), 8192, (10**6, 10**7), (),
)  # fmt: skip
TINY = Sizes(
    ("tiny",), 2**20, 256, (4,), 8, 8, 4, (8, 24), (4, 2, 16), (32, 64), 64, (10**3,),
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
        x = jax.random.normal(jax.random.key(0), (sizes.copied,), jnp.float32)
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
    layers, width, heads, kv_heads, mlp, vocab_size = SHAPES[shape]
    config = ModelConfig(
        num_layers=layers, width=width, num_heads=heads, num_kv_heads=kv_heads, head_dim=width // heads, mlp_width=mlp,
        qkv_bias=True, rope_base=1e6, compute_dtype="bfloat16", **settings,
    )  # fmt: skip
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    layout = sharding.shard_params(model.abstract_params(config, vocab_size), mesh)
    make = jax.jit(partial(model.init_params, config, vocab_size, 0), out_shardings=layout)  # as one program
    return config, vocab_size, make(), mesh


class Decoding(NamedTuple):
    """Ways to draw the same tokens, each given its call's number."""

    call: Callable[[int], Any]  # the sampler's: prompts are read, one window of steps follows, tokens come to the host
    window: Callable[[int], Any]  # that window alone
    tokens: int  # of a call
    read: float  # bytes that it must read


def make_decoding(sizes: Sizes, shape: str, rows: int) -> Decoding:
    """Of random weights in bfloat16, in groups of 8 rollouts."""
    config, vocab_size, params, mesh = make_model(shape, param_dtype="bfloat16", attention="xla")
    new, row = sizes.new_tokens, np.arange(rows, dtype=np.int32)
    sample = make_sampler(config, SamplerConfig(new, window=new), (), 0, mesh)
    batch = SamplingBatch(
        prompt_tokens=np.random.default_rng(0).integers(0, vocab_size, (-(-rows // 8), sizes.prompt_tokens), np.int32),
        prompt_lengths=np.full(-(-rows // 8), sizes.prompt_tokens, np.int32),
        prompt_of_row=row // 8,
        row_mask=np.ones(rows, bool),
        prompt_ids=row // 8,
        rollout_index=row % 8,
    )
    inside = inspect.getclosurevars(sample).nonlocals  # nothing but a benchmark has a use for them one by one
    space = sizes.prompt_tokens + new
    empty = inside["with_room"](None, rows, (space,), space)
    normal: Any = jax.jit(jax.random.normal, static_argnames=("shape", "dtype"))
    cache = Cache(*(normal(jax.random.key(i), c.shape, c.dtype) for i, c in enumerate(empty.cache)))
    hidden = normal(jax.random.key(2), empty.hidden.shape, empty.hidden.dtype)
    slots = empty._replace(hidden=hidden, limit=jnp.full(rows, new, jnp.int32), cache=cache)
    slots = jax.device_put(slots, jax.tree.map(lambda x: x.sharding, empty))
    length, drawn, done = np.full(rows, sizes.prompt_tokens, np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool)

    def window(_: int) -> Any:
        nonlocal slots
        again = jax.device_put({"length": length, "drawn": drawn, "done": done}, sharding.rows(mesh))
        slots = inside["run_window"](slots._replace(**again), params)
        return slots.length

    read = new * decode_bytes(config, vocab_size, rows, sizes.prompt_tokens + (new + 1) / 2)
    return Decoding(lambda i: sample(params, np.uint32(0), np.uint32(i), batch).tokens, window, rows * new, read)


def decode(sizes: Sizes) -> Cases:
    every = itertools.product(sizes.shapes, sizes.slots)
    return {f"{shape}, {rows} rows": partial(decode_rows, sizes, shape, rows) for shape, rows in every}


def decode_rows(sizes: Sizes, shape: str, rows: int) -> Iterator[dict]:
    """Of the sampler's call and of its window: seconds of a step, tokens and bytes a second."""
    made = make_decoding(sizes, shape, rows)
    for part, call in (("the sampler's call", made.call), ("its window", made.window)):
        seconds = median_seconds(call)
        speeds = {"tokens_per_second": made.tokens / seconds, "bytes_per_second": made.read / seconds}
        note = f"{made.read / sizes.new_tokens / 1e9:.2f} GB a step"
        yield {"part": part, "seconds": seconds / sizes.new_tokens, **speeds, "note": note}


class Training(NamedTuple):
    """A learner's step."""

    step: Callable[[int], Any]
    tokens: int  # of a step
    flops: float  # 6 a parameter and token: 2 forward, 4 backward
    exact: float  # FLOPs with attention's, and with logits of completion tokens alone


class Learning(NamedTuple):
    """How a learner's step is computed."""

    kernel: Choice  # of attention
    remat: bool
    parts: int  # micro-batches of a step
    chunk: int = LearnerConfig.logit_chunk_tokens

    def __str__(self) -> str:
        return f"{self.kernel}{', remat' * self.remat}, {self.parts} micro-batches, logits of {self.chunk}"


def make_training(sizes: Sizes, shape: str, how: Learning) -> Training:
    """Of random weights, stored in float32 and computed with in bfloat16; rows are as long as they may be."""
    config, vocab_size, params, mesh = make_model(shape, attention=how.kernel, remat=how.remat)
    rows, at_once, (width, limit) = sizes.rows, sizes.rows // how.parts, sizes.row_tokens
    settings = LearnerConfig(rows_per_step=rows, rows_per_microbatch=at_once, logit_chunk_tokens=how.chunk)
    learner = make_learner(config, vocab_size, settings, 1.0, mesh)
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
    num_params, tokens = sum(p.size for p in jax.tree.leaves(params)), rows * (width + limit)
    state, advantages = learner.init(params), learner.advantages(batch)
    # A run compiles a shape for each of three lengths of completion; these rows are all of the longest.
    inside, longest = inspect.getclosurevars(learner.step).nonlocals, Shape(width + limit, limit)
    inputs = (inside["nothing"](state.params), state.params, fixed, jax.device_put(batch, sharding.rows(mesh)))
    some = np.zeros(at_once, np.int32), np.ones(at_once, bool)
    inside["compiled"][longest] = inside["add"].lower(*inputs, advantages, *some, shape=longest).compile()

    def step(_: int) -> Any:
        nonlocal state
        state, metrics = learner.step(state, fixed, batch, advantages, np.float32(1e-6), np.ones(rows, bool))
        return state.step, metrics

    exact = generation.step_flops(config, vocab_size, rows, width, limit)
    return Training(step, tokens, 6.0 * num_params * tokens, exact)


def training(sizes: Sizes) -> Cases:
    kinds = [
        Learning("cudnn", False, 2, 224),
        Learning("cudnn", True, 1, 224),
        Learning("cudnn", False, 4),
        Learning("cudnn", True, 4),
        Learning("xla", True, 4),
    ]
    every = itertools.product(kinds, sizes.shapes)
    return {f"{shape}, {how}": partial(train, sizes, shape, how) for how, shape in every}


def train(sizes: Sizes, shape: str, how: Learning) -> Iterator[dict]:
    """Of a learner's step: seconds, tokens and FLOPs a second."""
    made = make_training(sizes, shape, how)
    seconds = median_seconds(made.step, repeats=3)
    speeds = {"tokens_per_second": made.tokens / seconds, "flops_per_second": made.flops / seconds}
    note = f"{made.exact / seconds / 1e12:.3g} TFLOP/s with attention's, logits of completions alone"
    yield {"seconds": seconds, **speeds, "note": note}


def attention(sizes: Sizes) -> Cases:
    kernels: tuple[Kernel, ...] = ("cudnn", "xla")
    every = itertools.product(sizes.lengths, kernels)
    return {f"{length:,} tokens, {kernel}": partial(attention_alone, sizes, length, kernel) for length, kernel in every}


def attention_alone(sizes: Sizes, length: int, kernel: Kernel) -> Iterator[dict]:
    """Of attention's forward and backward over `tokens_at_once` tokens in rows of `length`."""
    (heads, kv_heads, size), rows = sizes.heads, sizes.tokens_at_once // length
    normal: Any = jax.jit(jax.random.normal, static_argnames=("shape", "dtype"))
    shapes = [(rows, length, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, towards = (normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))

    causal = Causal(jnp.full(rows, length, jnp.int32))

    @jax.jit
    def gradient(q, k, v, towards):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, causal, size**-0.5, kernel=kernel), q, k, v)
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


def kernels(sizes: Sizes) -> Cases:
    shape, how = sizes.shapes[0], Learning("auto", False, 2, 224)
    made = {f"{shape}, {rows} rows, a window": partial(make_decoding, sizes, shape, rows) for rows in sizes.slots}
    cases: Cases = {name: partial(profiled, make, "window") for name, make in made.items()}
    return cases | {
        f"{shape}, {how}, a learner's step": partial(profiled, partial(make_training, sizes, shape, how), "step")
    }


def profiled(make: Callable[[], Any], call: str) -> Iterator[dict]:
    yield profile(getattr(make(), call))


def profile(call: Callable[[int], Any]) -> dict:
    """Seconds that the device's kernels take in a call, what share that is of the call's, and the longest of them."""
    whole = median_seconds(call, repeats=3)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call(0))
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    on_gpu = jax.default_backend() == "gpu"
    plane, lines = ("/device:GPU", "Stream") if on_gpu else ("/host:CPU", "tf_XLA")  # on a CPU only to try it
    taken = collections.Counter()
    for line in (line for each in planes if each.name.startswith(plane) for line in each.lines):
        if line.name.startswith(lines):
            for event in line.events:
                taken[event.name] += event.duration_ns / 1e9
    if not taken:
        raise RuntimeError(f"no kernels in the profile, which has {[each.name for each in planes]}")
    busy = sum(taken.values())
    longest = ", ".join(f"{name[:60]} {part / busy:.0%}" for name, part in taken.most_common(8))
    return {"seconds": busy, "note": f"{busy / whole:.0%} of the {1e3 * whole:.3g} ms that passed; {longest}"}


def embedded(sizes: Sizes) -> Cases:
    return {"chain_sum": partial(run_embedded, sizes)}


def run_embedded(sizes: Sizes) -> Iterator[dict]:
    """Of a whole run of the embedded task: seconds, and its accuracy at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        task = [str(ROOT / "configs" / "chain_sum.py"), f"--work-dir={scratch}/run", *sizes.run]
        start = time.perf_counter()
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{scratch}/cache"}
        env.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)  # which leaves the memory to this process
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *task], env=env, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"train.py ended with status {done.returncode}: {done.stderr[-200:]}")
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
    "kernels": kernels,
    "embedded": embedded,
    "embedded_cpu": embedded,
}
