"""The policy that RL starts from: a model folder's, or a warm start's; what of it is trained, and what stays."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cero_jax import lora
from cero_jax.checkpoint import Cursor
from cero_jax.config import Config
from cero_jax.data import Task
from cero_jax.huggingface import hub, weights
from cero_jax.learner import Fixed, Learner
from cero_jax.model import Dtype, ModelConfig, Params, abstract_params, init_params
from cero_jax.optimizer import TrainState
from cero_jax.warm_start import warm_start


def dtypes(config: Config) -> dict[str, Dtype]:
    """What a model folder's weights are stored and computed in."""
    return {"param_dtype": config.model.param_dtype, "compute_dtype": config.model.compute_dtype}


def starting_policy(config: Config, task: Task, mesh: Mesh, cache_dir: Path) -> Params:
    """The policy that RL starts from, without adapters: the model folder's, or one warm-started here."""
    if config.model_folder is not None:
        return weights.load(hub.model_folder(config.model_folder), mesh, **dtypes(config))[1]
    return warm_start(
        config.warm_start,
        dataclasses.replace(config.model, lora_rank=None),
        task,
        seed=config.seed,
        max_tokens=config.sampler.max_completion_tokens,
        mesh=mesh,
        cache_dir=cache_dir,
    )


def check_same_start(cursor: Cursor, params: Params, config: Config) -> Cursor:
    """The cursor with the hash of the parameters that RL started from. Raises ValueError where it began from others."""
    found = weights.fingerprint(params)
    if cursor.start_hash not in ("", found):
        source = config.model_folder or "the warm start in the cache beside the run"
        raise ValueError(f"{source}: not the weights that this run started from, which it still needs: put those back")
    return cursor._replace(start_hash=found)


def needs_start(config: Config, cursor: Cursor) -> bool:
    """Whether the policy that RL starts from is read: to begin from it, as a model's frozen part, or for the KL to it.

    A run that has ended needs no more than what is exported with it.
    """
    if cursor.finished and not config.extend:
        return bool(config.model.lora_rank and config.model_folder)
    return not cursor.checkpoint_number or bool(config.model.lora_rank or config.learner.kl_coef)


def abstract_policy(config: ModelConfig, vocab_size: int, learner: Learner) -> TrainState:
    """Shape, dtype and sharding of each array of the policy and its optimiser; nothing is allocated."""
    _, trained = lora.split(abstract_params(config, vocab_size))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(learner.init, trained), learner.shardings,
    )  # fmt: skip


def fresh_adapters(config: Config, vocab_size: int, learner: Learner) -> Params:
    """Fresh adapters: B is zero, so the policy is unchanged. The jitted function computes no other parameter."""

    def adapters() -> Params:
        return lora.split(init_params(config.model, vocab_size, config.seed))[1]

    return jax.jit(adapters, out_shardings=learner.shardings.params)()


def kept_from_start(config: Config, vocab_size: int, learner: Learner, params: Params) -> tuple[Fixed, Params]:
    """Of the policy that RL starts from: what stays as it is, and what is trained."""
    frozen = {}
    if config.model.lora_rank:
        frozen, params = params, fresh_adapters(config, vocab_size, learner)
    # A copy: the step donates the parameters it is given.
    return Fixed(frozen, jax.tree.map(jnp.copy, params) if config.learner.kl_coef else None), params
