"""`cero`: cross-epoch adaptive rollout optimisation, re-solved every round with what is left of the budget.

What follows the public points of the method (arXiv 2606.05606): the Beta posterior, its expected Bernoulli variance as
the value of more rollouts, a concave saturating utility of the *cumulative* rollouts, one global budget, and its price
as a dual variable. This project's own choices: the price is solved for afresh in every round instead of followed by
gradient steps, evidence is forgotten as rollouts are spent, the prior is fitted to the population, and a part of a
round goes to prompts that have not been heard of for long.
"""

import jax
import jax.numpy as jnp
from jax import Array

from cero_jax.allocator.base import Allocator, AllocatorState, Prompts, build, known
from cero_jax.allocator.dual import LEAST_VARIANCE, shares_at_budget, water_fill
from cero_jax.allocator.posterior import expected_variance, fitted_prior
from cero_jax.allocator.utility import utility_family

STALE_EVIDENCE = 10.0  # rollouts of decayed evidence under which `explore` may visit a prompt


def cero(
    *,
    total_budget,
    num_epochs: int,
    min_group: int = 4,
    max_group: int = 32,
    tau=None,
    prior=(0.5, 0.5),
    discount=0.9,
    explore=0.1,
    utility: str = "exponential",
    fit_prior: bool = True,
    expected_tokens=None,
) -> Allocator:
    """The default allocator: rollouts go where v_i h'(X_i / tau), the utility of one more, is highest.

    In each round the shares are n_i = clip(X_i*(lambda) - X_i, 0, max_group), with X_i the prompt's cumulative
    rollouts, X_i*(lambda) = tau h'^-1(lambda tau / v_i), and the price lambda such that they sum to the round's budget.

    total_budget: rollouts of the whole run, below 2^31. num_epochs: rounds it is cut into; a round may be a pass over
    the data or a few steps. min_group, max_group: bounds of a group that is drawn at all. tau: rollouts at which a
    prompt's utility saturates; None: total_budget / N. prior: Beta(alpha, beta) of a prompt's success probability, two
    numbers, or two arrays [N] where the data has pass rates. discount: evidence kept over a pass of 8 N rollouts.
    explore: share of a round for prompts whose decayed evidence has fallen under STALE_EVIDENCE rollouts, stalest
    first; what they do not need goes back to the rule. utility: "exponential" or "rational". fit_prior: value prompts
    under a prior fitted to the population instead of `prior`, which then stands in only while little is known.
    expected_tokens: None, or a first guess at the tokens of a rollout: then total_budget is in tokens, below 2^63.
    total_budget (in rollouts), tau, prior, discount and explore may be traced. Raises ValueError on static misuse.

    >>> allocator = cero(total_budget=800, num_epochs=10)
    >>> state = allocator.init(num_prompts=10)
    >>> num_rollouts, state = allocator.allocate(state)
    >>> int(num_rollouts.sum())
    80
    """
    family = utility_family(utility)
    check_tau(tau)
    if not all(0 <= x <= 1 for x in known(explore)):
        raise ValueError(f"explore={explore} must lie in [0, 1]: it is a share of a round")
    fit_prior = fit_prior and all(jnp.ndim(x) == 0 for x in prior)

    def rule(state: AllocatorState, prompts: Prompts, budget: Array, key) -> tuple[Array, AllocatorState, Array]:
        del key
        alpha, beta = prompts.alpha, prompts.beta
        if fit_prior:
            alpha, beta = _under_fitted_prior(state, prompts, prior)
        log_value = jnp.log(jnp.maximum(expected_variance(alpha, beta), LEAST_VARIANCE))
        if prompts.cost is not None:
            log_value = log_value - jnp.log(prompts.cost)
        evidence = prompts.alpha + prompts.beta - jnp.asarray(prior[0] + prior[1], jnp.float32)
        amount = jnp.asarray(explore, jnp.float32) * budget.astype(jnp.float32)
        shares, log_price = water_fill(
            log_value,
            prompts.rollouts.astype(jnp.float32),
            budget,
            tau=saturation(state, tau),
            cap=max_group,
            family=family,
            least=_stale_groups(evidence, prompts, amount, min_group),
            valid=prompts.valid,
            cost=prompts.cost,
        )
        return shares, state._replace(budget_dual=jnp.exp(log_price)), state.prompt_dual

    return build(
        rule,
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
    )


def saturation(state: AllocatorState, tau) -> Array:
    """[] float32 > 0, rollouts: tau, or the whole run's rollouts a prompt where it is None."""
    if tau is None and state.tokens is not None:
        total = state.tokens.total[0].astype(jnp.float32) * 2.0**32 + state.tokens.total[1].astype(jnp.float32)
        tau = total / jnp.sum(state.tokens.mean_tokens)
    elif tau is None:
        tau = state.ledger.total.astype(jnp.float32) / state.alpha.shape[0]
    return jnp.maximum(jnp.asarray(tau, jnp.float32), 1e-6)


def check_tau(tau) -> None:
    """Raises ValueError on a tau known to be wrong."""
    if not all(x > 0 for x in known(tau)):
        raise ValueError(f"tau={tau} rollouts must be positive, or None for total_budget / N")


def _under_fitted_prior(state: AllocatorState, prompts: Prompts, prior) -> tuple[Array, Array]:
    """The alpha and beta [P] with the population's prior in the place of the given one; the state keeps that."""
    a0, b0 = (jnp.asarray(x, jnp.float32) for x in prior)
    a, b = fitted_prior(state.alpha - a0, state.beta - b0, prior)
    return jnp.maximum(prompts.alpha - a0, 0) + a, jnp.maximum(prompts.beta - b0, 0) + b


def _stale_groups(evidence: Array, prompts: Prompts, amount: Array, min_group: int) -> Array:
    """[P] float32, at most min_group each and costing `amount`, to the valid prompts with the least evidence [P]."""
    stale = prompts.valid & (evidence < STALE_EVIDENCE)

    def shares_at(level):  # the level is minus the evidence below which a prompt is visited
        return jnp.where(stale & (evidence < -level), float(min_group), 0.0)

    def solve():
        return shares_at_budget(shares_at, jnp.float32(-STALE_EVIDENCE), jnp.float32(1.0), amount, prompts.cost)[0]

    return jax.lax.cond(jnp.any(stale) & (amount > 0), solve, lambda: jnp.zeros_like(evidence))
