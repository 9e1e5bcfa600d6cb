"""What a run needs of each device's memory, by formula, before anything is allocated: said at the start, with advice.

An estimate: XLA fuses, pads and reuses. Tests hold it against the compiler's own account of a step.
"""

import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cero_jax import lora, model, sharding
from cero_jax.learner import LearnerConfig, microbatch_rows
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig

GB = 1e9


class Estimate(NamedTuple):
    """Bytes on each device."""

    parameters: int
    sampling_copy: int  # in the dtype that is multiplied in, where parameters are kept in another
    optimizer: int  # Adam's two moments, float32
    gradients: int  # float32: the sum, and what is added to it
    reference: int  # the frozen policy of a KL term
    cache: int  # keys and values of all slots at full length, and of the prompts that are read once
    activations: int  # of one micro-batch
    logits: int  # of one chunk, with its softmax and gradient

    @property
    def total(self) -> int:
        """Bytes held at once at the worst moment: in a step, or while drawing."""
        held = self.parameters + self.optimizer + self.reference
        return held + max(self.gradients + self.activations + self.logits, self.sampling_copy + self.cache)


def estimate(
    model_config: ModelConfig,
    vocab_size: int,
    learner: LearnerConfig,
    sampler: SamplerConfig,
    mesh: Mesh,
    *,
    prompt_tokens: int,
    min_group: int,
) -> Estimate:
    """The estimate for prompts of up to `prompt_tokens` tokens in visits of at least `min_group` rollouts."""
    c, shards = model_config, sharding.row_shards(mesh)
    abstract = jax.eval_shape(lambda: model.init_params(c, vocab_size, 0))
    layout = sharding.shard_params(abstract, mesh)
    number = jax.tree.map(lambda p, s: math.prod(s.shard_shape(p.shape)), abstract, layout)
    stored = jax.tree.map(lambda n, p: n * p.dtype.itemsize, number, abstract)
    size, same = jnp.dtype(c.compute_dtype).itemsize, c.param_dtype == c.compute_dtype
    tensor, length = mesh.shape["tensor"], prompt_tokens + sampler.max_completion_tokens

    rows = learner.rows_per_step * learner.steps_per_batch
    in_cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * size  # a token
    if c.num_kv_heads % tensor == 0:
        in_cache //= tensor
    slots = min(sampler.slots or rows, rows) // shards

    here = microbatch_rows(learner, shards) // shards
    inner = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 3 * c.mlp_width
    layer = here * length * (4 * c.width + inner / tensor) * size  # a layer's inputs and what is multiplied inside it
    layer += 2 * here * c.num_heads / tensor * length**2 * 4  # scores and probabilities, float32
    kept = here * length * c.width * size * c.num_layers + layer if c.remat else layer * c.num_layers
    chunk = min(learner.logit_chunk_tokens, sampler.max_completion_tokens)
    return Estimate(
        parameters=_sum(stored),
        sampling_copy=0 if same else size * _sum(number),
        optimizer=2 * 4 * _sum(lora.split(number)[1]),
        gradients=2 * 4 * _sum(lora.split(number)[1]),
        reference=_sum(lora.split(stored)[1]) if learner.kl_coef else 0,
        cache=in_cache * (slots * length + rows // min_group * prompt_tokens),
        activations=int(kept),
        logits=3 * here * chunk * vocab_size * 4 // tensor,
    )


def _sum(tree: Any) -> int:
    return sum(jax.tree.leaves(tree))


def device_bytes() -> int:
    """Memory of one device: what the backend says, else, on a CPU, the machine's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def describe(needed: Estimate, available: int) -> str:
    """One line, and a second with advice where it will not fit."""
    parts = ", ".join(f"{name} {value / GB:.2f}" for name, value in needed._asdict().items() if value)
    line = f"memory a device: about {needed.total / GB:.2f} of {available / GB:.1f} GB ({parts})"
    if needed.total <= available:
        return line
    advice = {
        "parameters": "raise mesh.fsdp or mesh.tensor, or train adapters (model.lora_rank) of a bfloat16 model",
        "sampling_copy": "set model.param_dtype to model.compute_dtype",
        "optimizer": "raise mesh.fsdp",
        "gradients": "raise mesh.fsdp",
        "reference": "set learner.kl_coef=0, or raise mesh.fsdp",
        "cache": "lower sampler.slots",
        "activations": "lower learner.rows_per_microbatch, or set model.remat=True",
        "logits": "lower learner.logit_chunk_tokens or learner.rows_per_microbatch",
    }
    largest = sorted(advice, key=lambda name: -getattr(needed, name))[:2]
    return f"{line}\nthat will hardly fit: {'; '.join(f'{name}: {advice[name]}' for name in largest)}"
