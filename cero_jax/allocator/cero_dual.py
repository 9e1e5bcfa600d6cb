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

import jax.numpy as jnp
from jax import Array

from cero_jax.allocator.base import Allocator, AllocatorState, Prompts, build
from cero_jax.allocator.cero import check_tau, saturation
from cero_jax.allocator.dual import LEAST_VARIANCE
from cero_jax.allocator.posterior import expected_variance
from cero_jax.allocator.utility import utility_family

STEP = 0.3


def cero_dual(
    *,
    total_budget,
    num_epochs: int,
    min_group: int = 4,
    max_group: int = 32,
    tau=None,
    prior=(0.5, 0.5),
    discount=0.9,
    utility: str = "exponential",
    expected_tokens=None,
) -> Allocator:
    """The published method, readable beside its mathematics. For short runs use `cero`.

    It spends what its duals say, at most what is left: a round may come out above or below its budget, or empty, and a
    run may end with a rest. So run num_epochs rounds; all zeros do not end the run. Arguments as in `cero`.
    """
    family = utility_family(utility)
    check_tau(tau)

    def rule(state: AllocatorState, prompts: Prompts, budget: Array, key) -> tuple[Array, AllocatorState, Array]:
        del key
        scale = saturation(state, tau)
        most = float(num_epochs * max_group)  # KM
        cost = jnp.ones_like(prompts.alpha) if prompts.cost is None else prompts.cost
        # the utility of what one unit of budget buys: a rollout, or a token's worth of one
        v = jnp.where(prompts.valid, expected_variance(prompts.alpha, prompts.beta), 0) / cost

        def marginal(rollouts):  # U_i'(X), [P]
            return v / scale * jnp.exp(family.log_slope(jnp.asarray(rollouts, jnp.float32) / scale))

        top, bottom = marginal(0.0), marginal(most)
        even = jnp.minimum(saturation(state, None), most)  # X_i of a uniform allocation
        theta = jnp.clip(jnp.where(prompts.prompt_dual < 0, marginal(even), prompts.prompt_dual), bottom, top)
        price = jnp.where(state.budget_dual < 0, jnp.max(marginal(even)), state.budget_dual)

        # the bang-bang primal; where theta = lambda every n is a maximiser, and the one that meets the budget is taken
        above, tied = theta > price, prompts.valid & (theta == price)
        rest = budget.astype(jnp.float32) - max_group * jnp.sum(jnp.where(above, cost, 0))
        part = jnp.clip(rest / jnp.maximum(jnp.sum(jnp.where(tied, cost, 0)), 1e-6), 0, max_group)
        num_rollouts = jnp.where(above, float(max_group), jnp.where(tied, part, 0.0))

        ratio = jnp.maximum(theta * scale, LEAST_VARIANCE) / jnp.maximum(v, LEAST_VARIANCE)
        target = jnp.clip(scale * family.inverse_log_slope(jnp.log(ratio)), 0, most)  # X_i*(theta_i)
        epoch = _epochs_begun(state, num_epochs)
        size = STEP / jnp.sqrt(epoch)
        theta_step = size * top / max_group * (num_rollouts - target / num_epochs)
        largest = max_group * jnp.maximum(jnp.sum(jnp.where(prompts.valid, cost, 0)), 1e-6)  # of the next subgradient
        price_step = size * jnp.max(top) / largest * (budget.astype(jnp.float32) - jnp.sum(num_rollouts * cost))
        theta = jnp.clip(theta - theta_step, bottom, top)
        price = jnp.clip(price - price_step, 0, jnp.max(top))
        return num_rollouts, state._replace(budget_dual=price), theta

    return build(
        rule,
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
        spends_all=False,
        has_prompt_dual=True,
    )


def _epochs_begun(state: AllocatorState, num_epochs: int) -> Array:
    """[] float32 >= 1: epochs' worth of budget that is spent or reserved, plus one. Time is rollouts, not calls."""
    if state.tokens is None:
        total = state.ledger.total.astype(jnp.float32)
        used = (state.ledger.spent + state.ledger.reserved).astype(jnp.float32)
    else:
        total = state.tokens.total[0].astype(jnp.float32) * 2.0**32 + state.tokens.total[1].astype(jnp.float32)
        used = total - state.tokens.left(state.reserved)
    return 1 + used * num_epochs / jnp.maximum(total, 1)
