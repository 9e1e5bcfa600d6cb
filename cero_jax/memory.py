"""How much memory of each device a run needs, by formula before anything is allocated, and advice if it is too much.

It is an estimate: XLA fuses operations, pads arrays and uses memory again. The tests compare it with the compiler's own
figures for a step.
"""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cero_jax import lora, model, prefill, sharding
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig, microbatch_rows
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.slots import cache_sizes, number_of_slots

GB = 1e9
# Arrays of a layer as wide as the MLP, as compiled programs have them: kept for the gradient, and at work on it.
KEPT, AT_WORK = 2, 7


class Estimate(NamedTuple):
    """Bytes on each device, by what they hold."""

    parameters: int
    sampling_copy: int  # the parameters in compute_dtype, split over tensor alone, where they are stored otherwise
    moving: int  # the largest parameter as it is gathered for that copy, with it there
    optimizer: int  # Adam's two moments, float32; no second copy of parameters in fewer bits: see optimizer.moved
    gradients: int  # float32: the sum over micro-batches, and that of one micro-batch
    reference: int  # the frozen policy that a KL term compares with
    cast: int  # in compute_dtype while a step learns, where stored otherwise; layers computed again are cast one by one
    activations: int  # of one micro-batch, kept for its gradient
    layer: int  # at work on a layer's gradient: activations with theirs; of fsdp two layers' parameters with theirs
    waiting: int  # on TPUs: the output projection's gradient, which there is sent only behind the layers'
    logits: int  # of one chunk of tokens, with softmax and gradient, and the output projection with its gradient
    cache: int  # keys and values of all slots as the last places are added, and of each prompt once
    prefill: int  # activations of the prompts that are read at once
    drawing: int  # logits of all slots, with what is drawn from them

    @property
    def total(self) -> int:
        """Bytes held at the worst moment, which is in an optimiser step or while completions are drawn."""
        held = self.parameters + self.optimizer + self.reference
        # Of a micro-batch's gradient little is there while logits are.
        late = max(self.layer + self.waiting + self.gradients // 2, self.logits)
        learning = self.gradients // 2 + self.cast + self.activations + late
        drawing = self.cache + max(self.prefill, self.drawing)
        return held + max(learning, self.sampling_copy + max(self.moving, drawing))


def estimate(
    model_config: ModelConfig,
    vocab_size: int,
    learner: LearnerConfig,
    sampler: SamplerConfig,
    evaluation: EvaluationConfig,
    mesh: Mesh,
    *,
    prompt_widths: tuple[int, ...],
    min_group: int,
) -> Estimate:
    """The estimate for prompts that are padded to `prompt_widths` and get at least `min_group` rollouts each.

    Of drawing, that of training or of an evaluation, whichever holds more.
    """
    c, shards = model_config, sharding.row_shards(mesh)
    abstract = model.abstract_params(c, vocab_size)
    number = _numbers(abstract, sharding.shard_params, mesh)
    whole = _numbers(abstract, sharding.shard_copy, mesh)  # as sampling has them, and a layer where it is gathered
    stored = jax.tree.map(lambda n, p: n * p.dtype.itemsize, number, abstract)
    size, same = jnp.dtype(c.compute_dtype).itemsize, c.param_dtype == c.compute_dtype
    tensor, length = mesh.shape["tensor"], prompt_widths[-1] + sampler.max_completion_tokens

    rows = learner.rows_per_step * learner.steps_per_batch
    drawn = (rows // min_group, rows), (evaluation.rows // evaluation.samples or 2, evaluation.rows)
    drawing = [_drawing(c, vocab_size, sampler, mesh, prompt_widths, *numbers) for numbers in drawn]
    cache, read, logits = max(drawing, key=lambda parts: parts[0] + max(parts[1:]))

    here = microbatch_rows(learner, shards) // shards
    kept, at_work = (here * prefill.row_bytes(c, length, *arrays) for arrays in ((2, mesh, KEPT), (4, mesh, AT_WORK)))
    if c.remat:
        kept = here * length * c.width * size
    else:
        at_work -= kept
    chunk = min(learner.logit_chunk_tokens, sampler.max_completion_tokens)
    one_by_one, tpu = c.remat and mesh.shape["fsdp"] == 1, mesh.devices.flat[0].platform == "tpu"
    # Off TPUs a projection that pieces of the rows have copies of is there in float32, beside the gradients of both.
    of_projection = 12 if shards > 1 and not tpu else size + 4
    return Estimate(
        parameters=_sum(stored),
        sampling_copy=0 if same and mesh.shape["fsdp"] == 1 else size * _sum(whole),
        moving=0 if mesh.shape["fsdp"] == 1 else size * max(jax.tree.leaves(whole)),
        optimizer=2 * 4 * _sum(lora.split(number)[1]),
        gradients=2 * 4 * _sum(lora.split(number)[1]),
        reference=_sum(lora.split(stored)[1]) if learner.kl_coef else 0,
        cast=0 if same else size * (_sum(number) - one_by_one * _sum(number["layers"])),
        activations=kept * c.num_layers,
        layer=at_work + (0 if mesh.shape["fsdp"] == 1 else 2 * (size + 4) * _sum(whole["layers"]) // c.num_layers),
        waiting=4 * vocab_size * c.width // tensor if tpu else 0,
        logits=(3 * here * chunk * 4 + of_projection * c.width) * vocab_size // tensor,
        cache=cache,
        prefill=read,
        drawing=logits,
    )


def _numbers(params: Any, layout: Callable, mesh: Mesh) -> Any:
    """How many values of each parameter a device holds in that layout."""
    return jax.tree.map(lambda p, s: math.prod(s.shard_shape(p.shape)), params, layout(params, mesh))


def _drawing(
    c: ModelConfig,
    vocab_size: int,
    sampler: SamplerConfig,
    mesh: Mesh,
    prompt_widths: tuple[int, ...],
    prompts: int,
    rows: int,
) -> tuple[int, int, int]:
    """Bytes on each device, while `rows` completions of `prompts` prompts are drawn: cache, prefill, drawing."""
    tensor, shards = mesh.shape["tensor"], sharding.row_shards(mesh)
    in_cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(c.compute_dtype).itemsize  # bytes a token
    if c.num_kv_heads % tensor == 0:
        in_cache //= tensor
    sizes = cache_sizes(prompt_widths, sampler.max_completion_tokens, sampler.window)
    num_params = sum(p.size for p in jax.tree.leaves(model.abstract_params(c, vocab_size)))
    held = {"config": c, "num_params": num_params, "places": sizes[-1], "row_shards": shards}
    slots = number_of_slots(sampler.slots, rows, **held) // shards
    places = sum(sizes[-2:])  # it grows into a new one, with the old one beside it
    width, chunk = prompt_widths[-1], prefill.chunk_rows(c, prompt_widths, prompts, mesh)
    read = max(each // shards * prefill.row_bytes(c, width, 3, mesh) for width, each in chunk.items())
    return in_cache * (slots * places + prompts * width), read, 3 * slots * vocab_size * 4 // tensor


def _sum(tree: Any) -> int:
    return sum(jax.tree.leaves(tree))


def device_bytes() -> int:
    """Bytes of memory of one device: as the backend says; a CPU's is the machine's, shared by its virtual devices."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def memory_report(needed: Estimate, available: int) -> str:
    """One line: what is needed of the `available` bytes of a device; a second line of advice where that is too much."""
    parts = ", ".join(f"{name} {value / GB:.2f}" for name, value in needed._asdict().items() if value)
    line = f"memory on each device: about {needed.total / GB:.2f} of {available / GB:.1f} GB ({parts})"
    if needed.total <= available:
        return line
    advice = {
        "parameters": "raise mesh.fsdp or mesh.tensor, or train adapters (model.lora_rank) of a bfloat16 model",
        "sampling_copy": "raise mesh.tensor",
        "moving": "raise mesh.tensor",
        "optimizer": "raise mesh.fsdp",
        "gradients": "raise mesh.fsdp",
        "reference": "set learner.kl_coef=0, or raise mesh.fsdp",
        "cache": "lower sampler.slots",
        "prefill": "lower task.max_prompt_tokens",
        "drawing": "lower sampler.slots",
        "activations": "lower learner.rows_per_microbatch, or set model.remat=True",
        "cast": "raise mesh.fsdp",
        "layer": "lower learner.rows_per_microbatch",
        "waiting": "raise mesh.tensor",
        "logits": "lower learner.logit_chunk_tokens or learner.rows_per_microbatch",
    }
    largest = sorted(advice, key=lambda name: -getattr(needed, name))[:2]
    return f"{line}\nthis will probably not fit: {'; '.join(f'{name}: {advice[name]}' for name in largest)}"
