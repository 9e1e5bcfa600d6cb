"""The Beta posterior over each prompt's success probability, and how it forgets as the policy moves."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import digamma

ROLLOUTS_PER_PASS = 8  # a pass is 8 N rollouts, however they are cut into epochs: the unit of `discount`
FIT_SAMPLE = 1024  # prompts that the fitted prior looks at
FIT_STEPS = 20


def expected_variance(alpha: Array, beta: Array) -> Array:
    """E[p(1 - p)] under Beta(alpha, beta): the value of more rollouts of a prompt.

    alpha, beta: [N] float32 > 0, in rollouts. Returns [N] float32 in (0, 1/4].
    Source: CERO (arXiv 2610.09679), eq. 6; the closed form is a Beta moment. Written as a product of ratios, so that
    1e-6 and 1e6 neither overflow nor vanish.
    """
    total = alpha + beta
    return (alpha / total) * (beta / total) * (total / (total + 1))


def add_evidence(
    alpha: Array, beta: Array, num_rollouts: Array, num_correct: Array, num_evidence: Array, *, prior, discount
) -> tuple[Array, Array]:
    """The alpha and beta [N] after new rollouts: old evidence fades by what was spent, then the new is added.

    num_rollouts, num_correct, num_evidence: [N] int32, drawn of each prompt, successes, and rollouts that count.
    prior: two numbers or two arrays [N]. discount: share of the evidence kept over a pass of 8 N rollouts.
    """
    num_spent = jnp.sum(num_rollouts, dtype=jnp.int32)
    keep = retention(num_spent, discount=discount, num_prompts=alpha.shape[0])
    alpha = forget(alpha, prior[0], keep) + num_correct.astype(jnp.float32)
    beta = forget(beta, prior[1], keep) + (num_evidence - num_correct).astype(jnp.float32)
    return alpha, beta


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


def under_fitted_prior(alpha: Array, beta: Array, prior) -> tuple[Array, Array]:
    """Each prompt's alpha and beta [N] with the prior fitted to the population in the place of the given one.

    alpha, beta: [N] float32, `prior` + decayed evidence. prior: two scalars.
    """
    a0, b0 = (jnp.asarray(x, jnp.float32) for x in prior)
    a, b = fitted_prior(alpha - a0, beta - b0, prior)
    return jnp.maximum(alpha - a0, 0) + a, jnp.maximum(beta - b0, 0) + b


def fitted_prior(successes: Array, failures: Array, prior) -> tuple[Array, Array]:
    """The population's Beta prior by maximum marginal likelihood, given what has been seen so far.

    successes, failures: [N] float32 >= 0, decayed evidence. prior: two scalars, what to believe with no evidence; they
    weigh like one more prompt, through the density a exp(-a / a0) on each parameter. Returns two [] float32.

    Minka's fixed point for the Beta-binomial ("Estimating a Dirichlet distribution", 2000), on at most FIT_SAMPLE
    prompts evenly spaced over the file, so that its cost does not grow with N. FIT_STEPS come within 5 % for the
    bimodal populations of real data and stay nearer the given prior for concentrated ones, which need it less.
    """
    stride = -(-successes.shape[0] // FIT_SAMPLE)
    s, f = jnp.maximum(successes[::stride], 0), jnp.maximum(failures[::stride], 0)
    start = tuple(jnp.asarray(x, jnp.float32) for x in prior)

    def step(_, fitted):
        a, b = fitted
        both = jnp.sum(digamma(s + f + a + b) - digamma(a + b))
        return tuple(
            (x * jnp.sum(digamma(seen + x) - digamma(x)) + 1) / (both + 1 / x0)
            for x, seen, x0 in zip((a, b), (s, f), start, strict=True)
        )

    a, b = jax.lax.fori_loop(0, FIT_STEPS, step, start)
    return a, b
