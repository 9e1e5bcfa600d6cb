"""The budget's price: where shares that fall with a price sum to the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cero_jax.allocator.defaults import MAX_GROUP, UTILITY
from cero_jax.allocator.utility import Utility, first_slope_and_scale, utility_family

MOST_STEPS = 144  # every fourth one halves the bracket: from about 100 down to the resolution of a float32
TOLERANCE = 1e-6  # of the budget: closer than a float32 sum can tell


class _Bracket(NamedTuple):
    """Two levels, and how far their shares' cost is from the budget."""

    step: Array
    low: Array
    high: Array
    over: Array  # of the budget, at low
    under: Array  # at high
    pull_low: Array  # the same, halved where that end has stayed for two steps
    pull_high: Array
    last: Array  # 1: low has moved last; -1: high


def shares_at_budget(
    shares_at: Callable[[Array], Array], low: Array, high: Array, budget: Array, cost: Array | None = None
) -> tuple[Array, Array]:
    """Shares that cost the budget, and their level (the logarithm of a price, or another falling order).

    shares_at: level [] -> shares [P], none rising in the level. low, high: [] float32, levels at which the shares cost
    at least and at most the budget. cost: [P] float32, tokens a rollout; None: the budget is in rollouts. Where the
    cost jumps across the budget (ties, integer shares, a huge tau), the two sides of the jump are mixed in the
    proportion that meets it, so ties share alike. The search is false position by the Illinois rule (Dowell and Jarratt
    1971), which is fast where the sum is smooth, and at every fourth step bisection, which is sure.
    Returns ([P] float32, [] float32). Where even `low` costs less, its shares are returned.
    """
    budget = jnp.asarray(budget).astype(jnp.float32)

    def total(shares):
        return jnp.sum(shares if cost is None else shares * cost)

    def apart(bracket: _Bracket):
        close = jnp.minimum(bracket.over, bracket.under) <= TOLERANCE * budget
        return (bracket.step < MOST_STEPS) & (jnp.nextafter(bracket.low, bracket.high) < bracket.high) & ~close

    def narrow(bracket: _Bracket):
        step, low, high, over, under, pull_low, pull_high, last = bracket
        false_position = pull_low / jnp.maximum(pull_low + pull_high, 1e-30)
        middle = jnp.clip(low + (high - low) * jnp.where(step % 4 == 3, 0.5, false_position), low, high)
        excess = total(shares_at(middle)) - budget
        enough = excess >= 0
        return _Bracket(
            step + 1,
            low=jnp.where(enough, middle, low),
            high=jnp.where(enough, high, middle),
            over=jnp.where(enough, excess, over),
            under=jnp.where(enough, under, -excess),
            pull_low=jnp.where(enough, excess, jnp.where(last < 0, pull_low / 2, pull_low)),
            pull_high=jnp.where(enough, jnp.where(last > 0, pull_high / 2, pull_high), -excess),
            last=jnp.where(enough, 1, -1),
        )

    ends = total(shares_at(low)) - budget, budget - total(shares_at(high))
    found = jax.lax.while_loop(apart, narrow, _Bracket(jnp.int32(0), low, high, *ends, *ends, jnp.int32(0)))
    low, high, over, under = found.low, found.high, found.over, found.under
    more, fewer = shares_at(low), shares_at(high)
    part = jnp.clip((budget - total(fewer)) / jnp.maximum(total(more) - total(fewer), 1e-6), 0, 1)
    return fewer + part * (more - fewer), jnp.where(under < over, high, low)


def water_fill(
    log_value: Array,
    rollouts: Array,
    budget: Array,
    *,
    tau: Array,
    cap,
    family: Utility,
    least: Array | None = None,
    valid: Array | None = None,
    cost: Array | None = None,
) -> tuple[Array, Array]:
    """Shares n that maximise sum_i s_i tau_i h((X_i + n_i) / tau_i) under the budget and least_i <= n_i <= cap.

    The optimum has one price lambda: n_i = clip(X_i*(lambda) - X_i, least_i, cap), with X_i* the inverse marginal.
    log_value: [P] float32, log of the slope s_i at X = 0, in any one unit, less log cost_i where rollouts cost tokens.
    rollouts: [P] float32, X_i. tau: [] or [P] float32, rollouts. Returns ([P] float32 shares, [] float32 log lambda, in
    the unit of log_value).
    """

    def shares_at(log_price):
        target = tau * family.inverse_log_slope(log_price - log_value)
        shares = jnp.clip(target - rollouts, 0, cap)
        shares = shares if least is None else jnp.maximum(shares, least)
        return shares if valid is None else jnp.where(valid, shares, 0)

    low = jnp.min(log_value + family.log_slope((rollouts + cap) / tau))
    high = jnp.max(log_value + family.log_slope(rollouts / tau))
    low, high = low - 1e-5 * (1 + jnp.abs(low)), high + 1e-5 * (1 + jnp.abs(high))  # apart, however large tau is
    return shares_at_budget(shares_at, low, high, budget, cost)


def offline_optimum(
    expected_variance: ArrayLike,
    *,
    total_budget: ArrayLike,
    num_epochs: int,
    max_group: int = MAX_GROUP,
    tau: ArrayLike,
    utility: str = UTILITY,
) -> tuple[Array, Array]:
    """The best that any allocation could do with utilities known from the start: the benchmark for regret.

    Maximises sum_i U_i(X_i) under sum_i X_i <= total_budget and 0 <= X_i <= num_epochs max_group, in real numbers.
    Source: CERO (arXiv 2610.09679), its problem, less the capacity of a round.

    Args:
        expected_variance: [N] v_i, the true p (1 - p) of each prompt.
        total_budget: [] rollouts of the whole run.
        num_epochs: epochs of the run: with max_group, it bounds what one prompt can get.
        max_group: rollouts that a prompt can get in one epoch.
        tau: [] rollouts at which a prompt's utility saturates.
        utility: "exponential", v (1 - exp(-z)), "rational", v z / (1 + z), or "capture", 1 - exp(-4 v z); z = X / tau.

    Returns:
        ([N] float32 rollouts X of each prompt, [] float32 utility of them all).

    Raises:
        ValueError: utility is none of the three.
    """
    family = utility_family(utility)
    v = jnp.asarray(expected_variance, jnp.float32)
    tau, cap = jnp.asarray(tau, jnp.float32), float(num_epochs * max_group)
    budget = jnp.minimum(jnp.asarray(total_budget, jnp.float32), cap * v.shape[0])
    log_value, scale = first_slope_and_scale(utility, v, tau)
    rollouts, _ = water_fill(log_value, jnp.zeros_like(v), budget, tau=scale, cap=cap, family=family)
    height = jnp.ones_like(v) if utility == "capture" else v
    return rollouts, jnp.sum(height * family.value(rollouts / scale))
