"""The programs of a run, compiled ahead of time for pods and GPUs that are not here, and what they will cost there.

    python benchmarks/compiled.py --libtpu DIR --cuda DIR                      # every config on every target
    python benchmarks/compiled.py --libtpu DIR --configs qwen3_4b --targets v5e-16 --meshes 1,4,4 1,16,1

No accelerator is needed, only the compilers, each in a directory of its own beside the project's environment (VERSION
is that of the jax installed; libtpu's is the one that `pip install 'jax[tpu]'` of that version asks for):

    pip install --no-deps --target DIR 'libtpu==0.0.42.*'
    pip install --no-deps --target DIR jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION nvidia-cuda-nvcc-cu12 \
        nvidia-nvjitlink-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-cupti-cu12

Programs: a micro-batch of the learner (`add`), a step of decoding (`run_window`, over its steps), reading the prompts
(`read`), the largest parameter's copy for sampling (`copy`) and the optimiser (`finish`): the very functions that a run
calls. Speeds are bounds, from bandwidths that the makers publish: no program reaches them.
"""

import argparse
import dataclasses
import gzip
import hashlib
import inspect
import json
import math
import os
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hlo

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CACHE = ROOT / "benchmarks" / ".compiled"  # programs' texts, so that a second look at them compiles nothing
GB = 1e9


class Target(NamedTuple):
    """Chips of one kind, connected, and what their makers publish of one chip."""

    platform: str
    topology: str
    chips: int
    memory: float  # bytes
    flops: float  # a second, dense bfloat16
    bandwidth: float  # bytes a second, of memory
    link: float  # bytes a second, that a chip sends to all its neighbours


# cloud.google.com/tpu/docs/v5e, v6e, v5p (a chip's interchip bandwidth: 1,600, 3,584 and 4,800 Gbit/s); NVIDIA's data
# sheet of the H100 SXM (NVLink: 900 GB/s, both directions together).
V5E, V6E, V5P = (16e9, 197e12, 819e9, 200e9), (32e9, 918e12, 1640e9, 448e9), (95e9, 459e12, 2765e9, 600e9)
H100 = (80e9, 989e12, 3350e9, 450e9)
TARGETS = {
    "v5e-16": Target("tpu", "v5e:4x4", 16, *V5E),
    "v5e-256": Target("tpu", "v5e:16x16", 256, *V5E),
    "v6e-16": Target("tpu", "v6e:4x4", 16, *V6E),
    "v5p-64": Target("tpu", "v5p:4x4x4", 64, *V5P),
    "h100-1": Target("cuda", "1x1x1", 1, *H100),
    "h100-2": Target("cuda", "1x1x2", 2, *H100),
    "h100-8": Target("cuda", "1x1x8", 8, *H100),
}
H100_DESCRIPTION = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
SHAPES = {  # of the models' own config.json, with the size of their vocabulary
    "deepseek_r1_distill_qwen_1_5b": (
        {"num_layers": 28, "width": 1536, "num_heads": 12, "num_kv_heads": 2, "head_dim": 128, "mlp_width": 8960}
        | {"tied_embeddings": False, "qkv_bias": True},
        151_936,
    ),
    "llama3_2_1b": (
        {"num_layers": 16, "width": 2048, "num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "mlp_width": 8192},
        128_256,
    ),
    "qwen2_5_math_7b": (
        {"num_layers": 28, "width": 3584, "num_heads": 28, "num_kv_heads": 4, "head_dim": 128, "mlp_width": 18_944}
        | {"tied_embeddings": False, "qkv_bias": True},
        152_064,
    ),
    "qwen3_4b": (
        {"num_layers": 36, "width": 2560, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "mlp_width": 9728}
        | {"qk_norm": True},
        151_936,
    ),
}
TENSOR = {"qwen2_5_math_7b": 4, "qwen3_4b": 4}  # where a copy of the weights is too much for one small chip


class Case(NamedTuple):
    """A config on a target, split over one mesh."""

    config: str
    target: str
    mesh: tuple[int, int, int]  # data, fsdp, tensor
    tokens: int | None = None  # of a completion at most; None: the config's


class Program(NamedTuple):
    """What the compiler made of one function, on one chip."""

    held: int  # bytes: arguments, results that are not in their place, and temporaries
    temporary: int  # bytes
    collectives: dict[str, float]  # bytes of each kind
    largest: list[tuple[float, int, str, str]]  # the largest: bytes, times, kind and shapes, source
    sent: float  # bytes that the chip sends
    flops: float
    kernels: list[str]  # attention kernels
    squares: list[str]  # arrays that grow with the square of a row's length: scores, masks


def main() -> None:
    args = _arguments()
    find_compilers(args.libtpu, args.cuda)
    rows = []
    for config in args.configs:
        for name in args.targets:
            for mesh in args.meshes or [_usual_mesh(config, TARGETS[name])]:
                rows += report(Case(config, name, mesh, args.completion_tokens), args.programs, args.largest)
    print(
        "\n| config | target, mesh | GB a chip | memory.py | sent a micro-batch, GB | sent a token step, MB "
        "| decode, tokens/s a chip | a step, s |\n|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--meshes", nargs="+", type=_mesh, help="data,fsdp,tensor; default: one for each config")
    parser.add_argument("--completion-tokens", type=int, help="instead of the config's sampler.max_completion_tokens")
    parser.add_argument("--programs", nargs="+", default=["add", "finish", "copy", "read", "run_window"])
    parser.add_argument("--largest", type=int, default=0, help="so many of each program's largest collectives")
    parser.add_argument("--libtpu", type=Path, help="the directory that libtpu was installed in")
    parser.add_argument("--cuda", type=Path, help="the directory that jax-cuda12-plugin was installed in")
    return parser.parse_args()


def _mesh(text: str) -> tuple[int, int, int]:
    data, fsdp, tensor = map(int, text.split(","))
    return data, fsdp, tensor


def _usual_mesh(config: str, target: Target) -> tuple[int, int, int]:
    tensor = TENSOR.get(config, 1) if target.platform == "tpu" else 1
    return 1, target.chips // tensor, tensor


def find_compilers(libtpu: Path | None, cuda: Path | None) -> None:
    """Put the compilers where jax looks for them. To be called before jax is imported."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    sys.path += [str(directory) for directory in (libtpu, cuda) if directory]
    if cuda:
        os.environ["PATH"] = f"{cuda}/nvidia/cuda_nvcc/bin:{os.environ['PATH']}"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"
        from jax._src.cudnn import fused_attention_stablehlo

        fused_attention_stablehlo.check_cudnn_version = lambda: 90800  # as the H100 has it; jax would ask the library


def devices(target: Target) -> list:
    """The target's chips: jax compiles for them, and nothing runs there."""
    from jax.experimental import topologies

    if target.platform == "tpu":
        return list(topologies.get_topology_desc(target.topology, "tpu").devices)
    settings = {"target_config": H100_DESCRIPTION, "topology": target.topology}
    return list(topologies.get_topology_desc("h100", "cuda", **settings).devices)


class Setting(NamedTuple):
    """A config's model and settings on a mesh."""

    model: Any
    vocab_size: int
    learner: Any
    sampler: Any
    evaluation: Any
    prompt_tokens: int
    min_group: int
    mesh: Any


def setting(case: Case) -> Setting:
    """The case, its batches as large as the mesh needs: at least one row for each piece that rows are split into."""
    from cero_jax import sharding

    config = runpy.run_path(str(ROOT / "configs" / f"{case.config}.py"))["config"]
    shape, vocab_size = SHAPES[case.config]
    mesh = sharding.make_mesh(sharding.MeshConfig(*case.mesh), devices(TARGETS[case.target]))
    shards = sharding.row_shards(mesh)
    rows, evaluated = max(config.learner.rows_per_step, shards), max(config.evaluation.rows, shards)
    return Setting(
        dataclasses.replace(config.model, **shape),
        vocab_size,
        dataclasses.replace(config.learner, rows_per_step=rows),
        dataclasses.replace(config.sampler, max_completion_tokens=case.tokens or config.sampler.max_completion_tokens),
        dataclasses.replace(config.evaluation, rows=evaluated),
        config.task.max_prompt_tokens,
        config.allocator.min_group,
        mesh,
    )


class Functions(NamedTuple):
    """A run's functions, to be lowered with the shapes and the shardings that the run calls them with."""

    lower: dict[str, Callable]
    beside: dict[str, int]  # bytes that a chip holds beside the arguments of each
    width: dict[str, int]  # places of a row in each
    read: int  # bytes that a step of decoding reads: parameters and cache, once


def functions(given: Setting) -> Functions:
    """The functions of a run with these settings."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cero_jax import learner, lora, microbatches, model, prefill, sampler, sharding

    mesh, rows, tokens = given.mesh, given.learner.rows_per_step, given.sampler.max_completion_tokens
    made = learner.make_learner(given.model, given.vocab_size, given.learner, given.sampler.temperature, mesh)
    sample = sampler.make_sampler(given.model, given.sampler, (given.vocab_size - 1,), 0, mesh)
    # Out of their closures: nothing but this has a use for them one by one.
    learning, sampling = inspect.getclosurevars(made.step).nonlocals, dict(inspect.getclosurevars(sample).nonlocals)
    sampling |= inspect.getclosurevars(sampling["with_room"]).nonlocals

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(mesh))

    params = model.abstract_params(given.model, given.vocab_size)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    params = jax.tree.map(place, params, sharding.shard_params(params, mesh))
    frozen, trained = lora.split(params)
    batch = learner.Batch(
        prompt_tokens=array(rows, given.prompt_tokens, dtype=jnp.int32),
        prompt_lengths=array(rows, dtype=jnp.int32),
        tokens=array(rows, tokens, dtype=jnp.int32),
        lengths=array(rows, dtype=jnp.int32),
        log_probs=array(rows, tokens),
        reward=array(rows),
        group_ids=array(rows, dtype=jnp.int32),
        row_mask=array(rows, dtype=jnp.bool_),
        row_weight=array(rows),
    )
    advantages = learner.Advantages(array(rows), array(rows, tokens))  # type: ignore[arg-type]
    size = learner.microbatch_rows(given.learner, sharding.row_shards(mesh))
    chosen = np.zeros(size, np.int32), np.ones(size, bool)
    summed = learning["nothing"].lower(trained).out_info
    state = made.init.lower(trained).out_info
    weights = jax.tree.map(place, jax.eval_shape(sampling["copy"], params), sharding.shard_copy(params, mesh))
    largest = max(zip(*map(jax.tree.leaves, (params, weights)), strict=True), key=lambda pair: pair[0].size)
    visits = rows * given.learner.steps_per_batch // given.min_group
    prompts = prefill.chunk_rows(given.model, (given.prompt_tokens,), visits, mesh)[given.prompt_tokens]
    shape = microbatches.Shape(given.prompt_tokens + tokens, tokens)
    texts = {"tokens": np.zeros((prompts, given.prompt_tokens), np.int32), "lengths": np.ones(prompts, np.int32)}
    slots = sampling["empty"].lower(rows, given.prompt_tokens + tokens).out_info
    fixed, rate = learner.Fixed(frozen, None), np.float32(1)
    looked_up = 0 if given.model.tied_embeddings else on_a_chip(weights["embed"])
    learned, moments = on_a_chip(params), on_a_chip(state.opt_state)
    return Functions(
        lower={
            "add": partial(learning["add"].lower, summed, trained, fixed, batch, advantages, *chosen, shape=shape),
            "finish": partial(learning["finish"].lower, state, summed, rate),
            "copy": partial(sharding.moved.lower, *largest, largest[1].sharding),
            "read": partial(sampling["read"].lower, weights, **texts),
            "run_window": partial(sampling["run_window"].lower, slots, weights),
        },
        beside={
            "add": moments,
            "finish": on_a_chip(frozen),
            "copy": learned + moments + on_a_chip(weights) - on_a_chip(largest),
            "read": learned + moments + on_a_chip(slots.cache),
            "run_window": learned + moments + on_a_chip(sampling["read"].lower(weights, **texts).out_info),
        },
        width={"add": shape.width - 1, "read": given.prompt_tokens},
        read=on_a_chip(weights) - looked_up + on_a_chip(slots.cache),
    )


def on_a_chip(tree: Any) -> int:
    """Bytes of the arrays' shapes, as they are split."""
    import jax

    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled(lowered: Any, target: str, width: int) -> Program:
    """What the compiler makes of a function; from the cache where it was compiled before. width: places of a row."""
    import jaxlib.version

    text = lowered.as_text() + target + jaxlib.version.__version__
    path = CACHE / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json.gz"
    if not path.exists():
        executable = lowered.compile()
        stats = executable.memory_analysis()
        memory = {name: getattr(stats, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
        CACHE.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(memory | {"text": executable.as_text()}).encode()))
    return account(**json.loads(gzip.decompress(path.read_bytes())), width=width)


def account(text: str, width: int, argument: int, output: int, alias: int, temp: int) -> Program:
    """A program by its text and by the compiler's figures of its memory, in bytes."""
    lines = hlo.instructions(text)
    found = hlo.collectives(lines)
    largest = sorted(found, key=lambda each: -each.times * each.bytes)[:20]
    return Program(
        held=argument + output - alias + temp,
        temporary=temp,
        collectives=dict(hlo.by_kind(found)),
        largest=[(each.times * each.bytes, each.times, f"{each.kind} {each.shapes}", each.source) for each in largest],
        sent=hlo.sent(found),
        flops=hlo.flops(lines),
        kernels=hlo.kernels(lines),
        squares=hlo.squares(lines, width) if width else [],
    )


def report(case: Case, names: list[str], largest: int) -> list[str]:
    """Print what a case costs; its row of the table, none where the mesh does not fit."""
    from cero_jax import memory

    target = TARGETS[case.target]
    try:
        given = setting(case)
    except (NotImplementedError, ValueError) as error:  # not every mesh fits every pod
        print(f"\n{case.config} on {case.target}, {case.mesh}: {error}", flush=True)
        return []
    run, found = functions(given), {}
    print(f"\n{case.config} on {case.target}, data x fsdp x tensor = {case.mesh}", flush=True)
    for name in names:
        program = found[name] = compiled(run.lower[name](), case.target, run.width.get(name, 0))
        kinds = ", ".join(f"{kind} {amount / GB:.2f}" for kind, amount in program.collectives.items()) or "none"
        print(
            f"{name}: {(program.held + run.beside[name]) / GB:.2f} GB a chip ({program.temporary / GB:.2f} temporary); "
            f"collectives {sum(program.collectives.values()) / GB:.2f} GB ({kinds}); {program.flops / 1e12:.3f} TFLOP; "
            f"attention kernels: {', '.join(program.kernels) or 'none'}; "
            f"arrays [.., T, T]: {', '.join(program.squares[:3]) or 'none'}",
            flush=True,
        )
        for amount, times, shapes, source in program.largest[:largest]:
            print(f"    {amount / GB:.3f} GB in {times}: {shapes} {source[-80:]}")
    needed = memory.estimate(
        given.model, given.vocab_size, given.learner, given.sampler, given.evaluation, given.mesh,
        prompt_widths=(given.prompt_tokens,), min_group=given.min_group,
    )  # fmt: skip
    held = max(program.held + run.beside[name] for name, program in found.items())
    parts = ", ".join(f"{name} {amount / GB:.2f}" for name, amount in needed._asdict().items() if amount)
    print(f"memory: {held / GB:.2f} of {target.memory / GB:.0f} GB; memory.py: {needed.total / GB:.2f} ({parts})")
    speed = bounds(found, run.read, given, target)
    print("bounds: " + ", ".join(f"{name} {value:,.2f}" for name, value in speed.items()), flush=True)
    sent = {name: sum(program.collectives.values()) for name, program in found.items()}
    cells = [case.config, f"{case.target}, {' x '.join(map(str, case.mesh))}"]
    cells += [f"{held / GB:.2f} of {target.memory / GB:.0f}", f"{needed.total / held - 1:+.0%}"]
    cells += [f"{sent['add'] / GB:.1f}" if "add" in sent else ""]
    cells += [f"{sent['run_window'] / given.sampler.window / 1e6:.1f}" if "run_window" in sent else ""]
    cells += [f"{speed['decode']:,.0f}" if "decode" in speed else "", f"{speed['step']:.2f}" if "step" in speed else ""]
    return [f"| {' | '.join(cells)} |"]


def bounds(found: dict[str, Program], read: int, given: Setting, target: Target) -> dict[str, float]:
    """How fast it can be at most: a chip computes and reads at once, and waits for what others send.

    decode: tokens a second a chip. step, micro-batch: seconds of the learner's.
    """
    from cero_jax import learner, sharding

    speed, rows = {}, given.learner.rows_per_step
    if "run_window" in found:
        window = found["run_window"]
        flops, sent = (amount / given.sampler.window for amount in (window.flops, window.sent))
        seconds = max(flops / target.flops, read / target.bandwidth) + sent / target.link
        speed["decode"] = rows / target.chips / seconds
    if "add" in found:
        size = learner.microbatch_rows(given.learner, sharding.row_shards(given.mesh))
        speed["micro-batch"] = found["add"].flops / target.flops + found["add"].sent / target.link
        speed["step"] = rows / size * speed["micro-batch"]
    return speed


if __name__ == "__main__":
    main()
