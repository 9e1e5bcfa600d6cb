"""`cero`: cross-epoch adaptive rollout optimisation, re-solved every round with what is left of the budget.

What follows the public points of the method (arXiv 2606.05606): the Beta posterior, its expected Bernoulli variance as
the value of more rollouts, a concave saturating utility of the *cumulative* rollouts, one global budget, and its price
as a dual variable. This project's own choices: the price is solved for afresh in every round instead of followed by
gradient steps, evidence is forgotten as rollouts are spent, and a part of a round goes to prompts that have not been
heard of for long.
"""

import jax.numpy as jnp
from jax import Array

from cero_jax.allocator.base import Allocator, AllocatorState, Prompts, build, known
from cero_jax.allocator.dual import shares_at_budget
from cero_jax.allocator.posterior import expected_variance, fitted_prior
from cero_jax.allocator.utility import utility_family

STALE_EVIDENCE = 10.0  # rollouts of decayed evidence under which `explore` may visit a prompt
_LEAST_VARIANCE = 1e-30  # keeps the logarithm finite; where every v is 0 the shares are equal


def cero(
    *,
    total_budget,
    num_epochs: int,
    min_group: int = 4,
    max_group: int = 32,
    tau=None,
    prior=(0.5, 0.5),
    discount=0.9,
    explore=0.08,
    utility: str = "exponential",
    fit_prior: bool = True,
) -> Allocator:
    """The default allocator: rollouts go where v_i h'(X_i / tau), the utility of one more, is highest.

    In each round the shares are n_i = clip(X_i*(lambda) - X_i, 0, max_group), with X_i the prompt's cumulative
    rollouts, X_i*(lambda) = tau h'^-1(lambda tau / v_i), and the price lambda such that they sum to the round's budget.

    total_budget: rollouts of the whole run, below 2^31. num_epochs: rounds it is cut into; a round may be a pass over
    the data or a few steps. min_group, max_group: bounds of a group that is drawn at all. tau: rollouts at which a
    prompt's utility saturates; None: total_budget / N. prior: Beta(alpha, beta) of a prompt's success probability.
    discount: evidence kept over a pass of 8 N rollouts. explore: share of a round for prompts whose decayed evidence
    has fallen under STALE_EVIDENCE rollouts, stalest first; what they do not need goes back to the rule.
    utility: "exponential" or "rational". total_budget, tau, prior, discount and explore may be traced.
    Raises ValueError on static misuse.

    >>> allocator = cero(total_budget=800, num_epochs=10)
    >>> state = allocator.init(num_prompts=10)
    >>> num_rollouts, state = allocator.allocate(state)
    >>> int(num_rollouts.sum())
    80
    """
    family = utility_family(utility)
    if not all(x > 0 for x in known(tau)):
        raise ValueError(f"tau={tau} rollouts must be positive, or None for total_budget / N")
    if not all(0 <= x <= 1 for x in known(explore)):
        raise ValueError(f"explore={explore} must lie in [0, 1]: it is a share of a round")

    def rule(state: AllocatorState, prompts: Prompts, budget: Array, key) -> tuple[Array, AllocatorState]:
        del key
        scale = state.ledger.total.astype(jnp.float32) / state.alpha.shape[0] if tau is None else tau
        scale = jnp.maximum(jnp.asarray(scale, jnp.float32), 1e-6)
        prior_alpha, prior_beta = (jnp.asarray(x, jnp.float32) for x in prior)
        successes, failures = prompts.alpha - prior_alpha, prompts.beta - prior_beta
        alpha, beta = prompts.alpha, prompts.beta
        if fit_prior:
            a, b = fitted_prior(state.alpha - prior_alpha, state.beta - prior_beta, prior)
            alpha, beta = jnp.maximum(successes, 0) + a, jnp.maximum(failures, 0) + b
        floor = _stale_groups(
            successes + failures,
            prompts.valid,
            jnp.asarray(explore, jnp.float32) * budget.astype(jnp.float32),
            min_group,
        )
        log_v = jnp.log(jnp.maximum(expected_variance(alpha, beta), _LEAST_VARIANCE))
        rollouts = prompts.rollouts.astype(jnp.float32)

        def shares_at(log_price):
            target = scale * family.inverse_log_slope(log_price - log_v)
            return jnp.where(prompts.valid, jnp.maximum(jnp.clip(target - rollouts, 0, max_group), floor), 0)

        low = jnp.min(log_v + family.log_slope((rollouts + max_group) / scale))
        high = jnp.max(log_v + family.log_slope(rollouts / scale))
        shares, log_price = shares_at_budget(shares_at, low, high, budget)
        return shares, state._replace(budget_dual=jnp.exp(log_price) / scale)

    return build(
        rule,
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        prior=prior,
        discount=discount,
    )


def _stale_groups(evidence: Array, valid: Array, amount: Array, min_group: int) -> Array:
    """[P] float32, at most min_group each and `amount` in all, to the valid prompts with the least evidence."""
    stale = valid & (evidence < STALE_EVIDENCE)

    def shares_at(level):  # the level is minus the evidence below which a prompt is visited
        return jnp.where(stale & (evidence < -level), float(min_group), 0.0)

    return shares_at_budget(shares_at, jnp.float32(-STALE_EVIDENCE), jnp.float32(1.0), amount)[0]
