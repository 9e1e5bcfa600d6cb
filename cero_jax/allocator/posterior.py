"""The Beta posterior over each prompt's success probability, and how it forgets as the policy moves."""

import jax.numpy as jnp
from jax import Array

ROLLOUTS_PER_PASS = 8  # a pass is 8 N rollouts, however they are cut into rounds: the unit of `discount`


def expected_variance(alpha: Array, beta: Array) -> Array:
    """E[p(1 - p)] under Beta(alpha, beta): the value of more rollouts of a prompt.

    alpha, beta: [N] float32 > 0, in rollouts. Returns [N] float32 in (0, 1/4].
    Source: CERO, public point 2; the closed form is a Beta moment. Written as a product of ratios, so that 1e-6 and 1e6
    neither overflow nor vanish.
    """
    total = alpha + beta
    return (alpha / total) * (beta / total) * (total / (total + 1))


def retention(num_spent: Array, *, discount, num_prompts: int) -> Array:
    """[] float32, the share of old evidence that remains after num_spent rollouts: discount ** (num_spent / (8 N)).

    Forgetting by rollouts spent, whether or not a prompt was visited: this project's choice. It brings a prompt left
    alone back towards its prior, so that it is tried again.
    """
    passes = num_spent.astype(jnp.float32) / (ROLLOUTS_PER_PASS * num_prompts)
    return jnp.asarray(discount, jnp.float32) ** passes


def forget(evidence: Array, prior, keep: Array) -> Array:
    """The mix prior + keep (evidence - prior). evidence: [N] float32, alpha or beta; prior: scalar or [N]; keep: []."""
    prior = jnp.asarray(prior, jnp.float32)
    return prior + keep * (evidence - prior)
