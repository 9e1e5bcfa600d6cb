"""What moves a policy's parameters: Adam, steps that are left out because they are no numbers, updates in few bits."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from cero_jax import lora, model, sharding
from cero_jax.model import ModelConfig, Params


class TrainState(NamedTuple):
    """What an optimiser step moves."""

    params: Params  # what is trained: adapters where the model has them, else all of it
    opt_state: optax.OptState
    step: Array  # [] int32, optimiser steps taken


class Stepper(NamedTuple):
    """The optimiser around a model's trained parameters: what every kind of training step shares."""

    init: Callable[[Params], TrainState]  # jitted: a fresh optimiser around parameters
    apply: Callable[[TrainState, Params, Array], TrainState]  # (state, gradients, learning rate []), to be jitted
    shardings: Any  # a NamedSharding for each part of a TrainState


def adam(b1: float, b2: float, eps: float, weight_decay: float, max_grad_norm: float) -> optax.GradientTransformation:
    """Adam without its rate: the step multiplies by minus the rate, a function of the budget spent.

    weight_decay: of the parameters that `decays` names, apart from the gradient (AdamW).
    """
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=decays),
    )


def decays(params: Params) -> Any:
    """Which parameters weight decay shrinks: True at matrices and adapters, False at norms, biases and the embedding.

    An output projection of its own is a matrix like others; one that is the embedding is left alone with it.
    """

    def is_matrix(path: Any, leaf: Any) -> bool:
        del leaf
        return not path[-1].key.endswith(("norm", "bias")) and path[-1].key != "embed"

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_stepper(
    model_config: ModelConfig, vocab_size: int, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Stepper:
    """The optimiser of a model's trained parameters, sharded as they are. Raises ValueError as sharding does."""
    _, trained = lora.split(model.abstract_params(model_config, vocab_size))
    params = sharding.shard_params(trained, mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        jax.eval_shape(lambda params: optimizer.init(_float32(params)), trained),
        params,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )
    shardings: Any = TrainState(params, opt_state, sharding.replicated(mesh))  # type: ignore[arg-type]

    @partial(jax.jit, out_shardings=shardings)
    def init(params: Params) -> TrainState:
        return TrainState(params, optimizer.init(_float32(params)), jnp.int32(0))

    def apply(state: TrainState, grads: Params, learning_rate: Array) -> TrainState:
        updates, opt_state = optimizer.update(_float32(grads), state.opt_state, _float32(state.params))
        return TrainState(moved(state.params, updates, learning_rate, state.step), opt_state, state.step + 1)

    return Stepper(init, apply, shardings)


def kept_unless(take: Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` where `take` [] bool, else `old`, to the bit; elementwise, so that nothing more is held of either."""
    return jax.tree.map(lambda new, old: jnp.where(take, new, old), new, old)


def _float32(tree: Params) -> Params:
    """Gradients and moments are float32 whatever the parameters are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def moved(params: Params, updates: optax.Updates, learning_rate: Array, step: Array) -> Params:
    """The parameters less learning_rate * updates, each in its own dtype.

    Where that has fewer bits than float32, the sum is rounded up or down at random, so that it is right on average: at
    a rate of 1e-6 nearly every update is smaller than half the gap between two bfloat16 numbers, and rounding to the
    nearest would undo it. No second copy of the parameters is held. The random bits follow from `step`, [] int32, and
    the parameter's place in the tree alone: a resumed run draws the same ones, on any mesh.
    """
    leaves, tree = jax.tree.flatten(params)
    key = jax.random.fold_in(jax.random.key(_ROUNDING_STREAM), step)
    new = []
    for place, (leaf, update) in enumerate(zip(leaves, tree.flatten_up_to(updates), strict=True)):
        if leaf.dtype == jnp.float32:
            new.append(leaf - learning_rate * update)
        else:
            exact = leaf.astype(jnp.float32) - learning_rate * update
            new.append(rounded_at_random(exact, jax.random.fold_in(key, place), leaf.dtype))
    return tree.unflatten(new)


_ROUNDING_STREAM = 4  # keeps these bits apart from other uses of small seeds


def rounded_at_random(exact: Array, key: Array, dtype: Any) -> Array:
    """`exact`, float32, in a `dtype` of fewer bits: one of its two neighbours there, so that the mean is right.

    The neighbour further from zero comes up with the probability (exact - other) / (it - other): random bits are added
    to those that are cut off. An infinity or a NaN stays one. Of a float16 under 2^-14 in size the mean may be off by
    half its gap, 3e-8. key: consumed. Source: Gupta et al. 2015 (arXiv 1502.02551), section 3.
    """
    cut = jnp.uint32(2 ** (jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant) - 1)  # the bits that are cut off
    bits = jax.lax.bitcast_convert_type(exact, jnp.uint32) + (jax.random.bits(key, exact.shape, jnp.uint32) & cut)
    # By integers, since XLA leaves out a cast to fewer bits and back, and with it the rounding.
    rounded = jax.lax.bitcast_convert_type(bits & ~cut, jnp.float32)
    return jnp.where(jnp.isfinite(exact), rounded, exact).astype(dtype)
