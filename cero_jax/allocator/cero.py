"""`cero`: cross-epoch adaptive rollout optimisation, re-solved every epoch with what is left of the budget.

What follows the published method (arXiv 2610.09679; `cero_dual` is all of it): the Beta posterior, its expected
Bernoulli variance as the value of more rollouts, a concave saturating utility of the *cumulative* rollouts, one global
budget, and its price as a dual variable. This project's own choices: the price is solved for afresh in every epoch
instead of followed by gradient steps, groups have any size within bounds, evidence is forgotten as rollouts are spent,
the prior is fitted to the population, and a part of an epoch's budget goes to prompts that have not been heard of for
long.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cero_jax.allocator.base import Allocator, AllocatorState, Candidates
from cero_jax.allocator.build import build_allocator
from cero_jax.allocator.checks import known
from cero_jax.allocator.defaults import DISCOUNT, EXPLORE, MAX_GROUP, MIN_GROUP, MULTIPLE_OF, PRIOR, UTILITY
from cero_jax.allocator.dual import shares_at_budget, water_fill
from cero_jax.allocator.posterior import expected_variance, under_fitted_prior
from cero_jax.allocator.utility import check_tau, first_slope_and_scale, saturation, utility_family

STALE_EVIDENCE = 10.0  # rollouts of decayed evidence under which `explore` may visit a prompt


def cero(
    *,
    total_budget: ArrayLike,
    num_epochs: int,
    min_group: int = MIN_GROUP,
    max_group: int = MAX_GROUP,
    multiple_of: int = MULTIPLE_OF,
    tau: ArrayLike | None = None,
    prior: tuple[ArrayLike, ArrayLike] = PRIOR,
    discount: ArrayLike = DISCOUNT,
    explore: ArrayLike = EXPLORE,
    utility: str = UTILITY,
    fit_prior: bool = True,
    expected_tokens: ArrayLike | None = None,
) -> Allocator:
    """The default allocator: rollouts go where U_i'(X_i), the utility of one more, is highest.

    In each epoch the shares are `n_i = clip(X_i*(lambda) - X_i, 0, max_group)`, with X_i the prompt's cumulative
    rollouts, `X_i*` the inverse of U_i', and the price lambda such that they sum to the epoch's budget.
    Source of v, of "capture" and lambda: CERO (arXiv 2610.09679), section 2; solving for lambda afresh is our own.

    Args:
        total_budget: rollouts of the whole run, below 2^31, may be traced; tokens where expected_tokens is given.
        num_epochs: calls of `allocate` that the budget is cut into: each may be a pass over the data, or a few steps.
        min_group: rollouts of the smallest group that is drawn at all, at least 1; a smaller share is drawn by chance.
        max_group: rollouts of the largest group.
        multiple_of: divides every group's rollouts, and so must divide min_group and max_group.
        tau: rollouts at which a prompt's utility saturates, may be traced. None: total_budget / N.
        prior: Beta(alpha, beta) of a prompt's success probability: two numbers, or two arrays [N].
        discount: share of the evidence kept over a pass of 8 N rollouts, in (0, 1]; may be traced.
        explore: share of an epoch's budget for prompts with little evidence left, in [0, 1]; may be traced.
        utility: "exponential", v (1 - exp(-z)), "rational", v z / (1 + z), or "capture", 1 - exp(-4 v z); z = X / tau.
        fit_prior: value prompts under a prior fitted to the population; `prior` then counts while little is known.
        expected_tokens: a first guess at the tokens of a rollout: the budget is in tokens, below 2^63. None: rollouts.

    Returns:
        The allocator: init, allocate and update, three pure functions on one state.

    Raises:
        ValueError: a setting that is known now is out of its range.

    What `explore` does not need, where no prompt's decayed evidence is under STALE_EVIDENCE rollouts, goes to the rule.

    >>> allocator = cero(total_budget=800, num_epochs=10)
    >>> state = allocator.init(num_prompts=10)
    >>> num_rollouts, state = allocator.allocate(state)
    >>> int(num_rollouts.sum())
    80
    """
    family = utility_family(utility)
    check_tau(tau)
    if not all(0 <= x <= 1 for x in known(explore)):
        raise ValueError(f"explore={explore} must lie in [0, 1]: it is a share of an epoch's budget")
    fit_prior = fit_prior and all(jnp.ndim(x) == 0 for x in prior)

    def rule(state: AllocatorState, candidates: Candidates, budget: Array, key) -> tuple[Array, AllocatorState]:
        del key
        alpha, beta = candidates.alpha, candidates.beta
        if fit_prior:
            fitted = under_fitted_prior(state.alpha, state.beta, prior)
            alpha, beta = (candidates.take(x) for x in fitted)
        level = saturation(state, tau)
        log_value, scale = first_slope_and_scale(utility, expected_variance(alpha, beta), level)
        if candidates.cost is not None:
            log_value = log_value - jnp.log(candidates.cost)
        evidence = candidates.alpha + candidates.beta - jnp.asarray(prior[0] + prior[1], jnp.float32)
        amount = jnp.asarray(explore, jnp.float32) * budget.astype(jnp.float32)
        shares, log_price = water_fill(
            log_value,
            candidates.rollouts.astype(jnp.float32),
            budget,
            tau=scale,
            cap=max_group,
            family=family,
            least=_stale_groups(evidence, candidates, amount, min_group),
            valid=candidates.valid,
            cost=candidates.cost,
        )
        return shares, state._replace(budget_dual=jnp.exp(log_price - jnp.log(level)))

    return build_allocator(
        rule,
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        multiple_of=multiple_of,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
    )


def _stale_groups(evidence: Array, candidates: Candidates, amount: Array, min_group: int) -> Array:
    """[P] float32, at most min_group each and costing `amount`, to the valid prompts with the least evidence [P]."""
    stale = candidates.valid & (evidence < STALE_EVIDENCE)

    def shares_at(level):  # the level is minus the evidence below which a prompt is visited
        return jnp.where(stale & (evidence < -level), float(min_group), 0.0)

    def solve():
        return shares_at_budget(shares_at, jnp.float32(-STALE_EVIDENCE), jnp.float32(1.0), amount, candidates.cost)[0]

    return jax.lax.cond(jnp.any(stale) & (amount > 0), solve, lambda: jnp.zeros_like(evidence))
