"""`cero_dual`: the method as published, by projected online gradient descent on both dual variables, as the reference.

Source: CERO (arXiv 2606.05606), public points 1 to 6. The run's problem, with X_i = sum_k n_ik, is

    max  sum_i U_i(X_i)   under   sum_ik n_ik <= B,   0 <= n_ik <= M,   U_i(X) = v_i h(X / tau)

Its objective does not separate over epochs, because U_i sees only the sum. The Fenchel dual takes it apart: U_i is
concave, so for X in [0, KM]

    U_i(X) = min over theta >= 0 of  theta X + U_i*(theta),    U_i*(theta) = max over X in [0, KM] of  U_i(X) - theta X

and the maximiser of the second is the inverse marginal, X_i*(theta) = tau h'^-1(theta tau / v_i), cut to [0, KM]. With
lambda >= 0 for the budget, and b = B / K,

    min over theta, lambda of  sum_k { sum_i max_n (theta_i - lambda) n  +  lambda b  +  (1/K) sum_i U_i*(theta_i) }

which separates over epochs. In epoch k the inner maximum is linear, so bang-bang: n_ik = M where theta_i > lambda,
else 0, already a whole group. The subgradients are n_ik - X_i*(theta_i) / K in theta_i and b - sum_i n_ik in lambda;
both step downhill and are projected, theta_i onto [U_i'(KM), U_i'(0)], lambda onto [0, max_i U_i'(0)].

This project's own choices, as the paper's constants are not at hand: a step is STEP times a variable's range over its
largest subgradient, divided by sqrt(k) (which needs no horizon), and the duals start where a uniform allocation of the
whole budget would put them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cero_jax.allocator.base import Allocator, AllocatorState, Candidates
from cero_jax.allocator.build import build_allocator
from cero_jax.allocator.defaults import DISCOUNT, MAX_GROUP, MIN_GROUP, PRIOR, UTILITY
from cero_jax.allocator.dual import LEAST_VARIANCE
from cero_jax.allocator.ledger import as_float
from cero_jax.allocator.posterior import expected_variance
from cero_jax.allocator.utility import check_tau, saturation, utility_family

STEP = 0.3


class Duals(NamedTuple):
    """What the rule keeps from call to call; negative where it has not started yet."""

    prompt_dual: Array  # [N] float32, theta: utility a rollout
    budget_dual: Array  # [] float32, lambda: utility a rollout


def _no_duals(num_prompts: int) -> Duals:
    return Duals(jnp.full(num_prompts, -1.0, jnp.float32), jnp.full((), -1.0, jnp.float32))


def cero_dual(
    *,
    total_budget: ArrayLike,
    num_epochs: int,
    min_group: int = MIN_GROUP,
    max_group: int = MAX_GROUP,
    tau: ArrayLike | None = None,
    prior: tuple[ArrayLike, ArrayLike] = PRIOR,
    discount: ArrayLike = DISCOUNT,
    utility: str = UTILITY,
    expected_tokens: ArrayLike | None = None,
) -> Allocator:
    """The published method, readable beside its mathematics. For short runs use `cero`.

    It spends what its duals say, at most what is left: an epoch may come out above or below its budget, or empty, and a
    run may end with a rest. So run num_epochs epochs; all zeros do not end the run.
    Source: CERO (arXiv 2606.05606), public points 1 to 6, derived at the top of this file.

    Args:
        total_budget: rollouts of the whole run, below 2^31, may be traced; tokens where expected_tokens is given.
        num_epochs: calls of `allocate` that the budget is cut into: each may be a pass over the data, or a few steps.
        min_group: rollouts of the smallest group that is drawn at all, at least 2; a smaller share is drawn by chance.
        max_group: rollouts of the largest group.
        tau: rollouts at which a prompt's utility saturates, may be traced. None: total_budget / N.
        prior: Beta(alpha, beta) of a prompt's success probability: two numbers, or two arrays [N].
        discount: share of the evidence kept over a pass of 8 N rollouts, in (0, 1]; may be traced.
        utility: how it saturates at z = X / tau: "exponential", 1 - exp(-z), or "rational", z / (1 + z).
        expected_tokens: a first guess at the tokens of a rollout: the budget is in tokens, below 2^63. None: rollouts.

    Returns:
        The allocator: init, allocate and update, three pure functions on one state.

    Raises:
        ValueError: a setting that is known now is out of its range.
    """
    family = utility_family(utility)
    check_tau(tau)

    def rule(state: AllocatorState, candidates: Candidates, budget: Array, key) -> tuple[Array, AllocatorState]:
        del key
        duals: Duals = state.rule_state
        theta, price = candidates.take(duals.prompt_dual), duals.budget_dual
        scale = saturation(state, tau)
        most = float(num_epochs * max_group)  # KM
        cost = jnp.ones_like(candidates.alpha) if candidates.cost is None else candidates.cost
        # the utility of what one unit of budget buys: a rollout, or a token's worth of one
        v = jnp.where(candidates.valid, expected_variance(candidates.alpha, candidates.beta), 0) / cost

        def marginal(rollouts):  # U_i'(X), [P]
            return v / scale * jnp.exp(family.log_slope(jnp.asarray(rollouts, jnp.float32) / scale))

        top, bottom = marginal(0.0), marginal(most)
        even = jnp.minimum(saturation(state, None), most)  # X_i of a uniform allocation
        theta = jnp.clip(jnp.where(theta < 0, marginal(even), theta), bottom, top)
        price = jnp.where(price < 0, jnp.max(marginal(even)), price)

        # the bang-bang primal; where theta = lambda every n is a maximiser, and the one that meets the budget is taken
        above, tied = theta > price, candidates.valid & (theta == price)
        rest = budget.astype(jnp.float32) - max_group * jnp.sum(jnp.where(above, cost, 0))
        part = jnp.clip(rest / jnp.maximum(jnp.sum(jnp.where(tied, cost, 0)), 1e-6), 0, max_group)
        num_rollouts = jnp.where(above, float(max_group), jnp.where(tied, part, 0.0))

        ratio = jnp.maximum(theta * scale, LEAST_VARIANCE) / jnp.maximum(v, LEAST_VARIANCE)
        target = jnp.clip(scale * family.inverse_log_slope(jnp.log(ratio)), 0, most)  # X_i*(theta_i)
        epoch = _epochs_begun(state, num_epochs)
        size = STEP / jnp.sqrt(epoch)
        theta_step = size * top / max_group * (num_rollouts - target / num_epochs)
        largest = max_group * jnp.maximum(
            jnp.sum(jnp.where(candidates.valid, cost, 0)), 1e-6
        )  # of the next subgradient
        price_step = size * jnp.max(top) / largest * (budget.astype(jnp.float32) - jnp.sum(num_rollouts * cost))
        theta = jnp.clip(theta - theta_step, bottom, top)
        price = jnp.clip(price - price_step, 0, jnp.max(top))
        duals = Duals(candidates.put(duals.prompt_dual, theta), price)
        return num_rollouts, state._replace(rule_state=duals, budget_dual=price)

    return build_allocator(
        rule,
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
        spends_all=False,
        init_rule=_no_duals,
    )


def _epochs_begun(state: AllocatorState, num_epochs: int) -> Array:
    """[] float32 >= 1: epochs' worth of budget that is spent or reserved, plus one. Time is rollouts, not calls."""
    if state.tokens is None:
        total = state.ledger.total.astype(jnp.float32)
        used = (state.ledger.spent + state.ledger.reserved).astype(jnp.float32)
    else:
        total = as_float(state.tokens.total)
        used = total - state.tokens.left(state.reserved)
    return 1 + used * num_epochs / jnp.maximum(total, 1)
