"""Saturating utilities of a prompt's cumulative rollouts X, concave, 0 at X = 0 and bounded.

Two families scale one curve, U_i(X) = v_i h(X / tau): all prompts saturate at the same X. They are this project's
choice. The third, "capture", is the value-capture utility of CERO (arXiv 2610.09679, section 2.2): in rollouts,
U_i(X) = 1 - exp(-4 v_i X / tau), with tau = R / lambda. There v_i stands inside the exponent, so a prompt of high
variance gains fast and saturates early. Each is U_i(X) = U_i'(0) tau_i h(X / tau_i), and the dual works in logarithms,
so that one log a prompt is all that solving for a price costs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from cero_jax.allocator.base import AllocatorState
from cero_jax.allocator.checks import known
from cero_jax.allocator.ledger import as_float

LEAST_VARIANCE = 1e-30  # keeps a logarithm finite; where every v is 0 the shares are equal


class Utility(NamedTuple):
    """One curve h. z = X / tau_i >= 0 is a prompt's cumulative rollouts in units of where it saturates."""

    value: Callable[[Array], Array]  # h(z)
    log_slope: Callable[[Array], Array]  # log h'(z), falling in z, 0 at z = 0
    inverse_log_slope: Callable[[Array], Array]  # the z with log h'(z) = r; negative where r > 0
    conjugate: Callable[[Array], Array]  # max over z >= 0 of h(z) - s z, for slopes s in (0, 1]


EXPONENTIAL = Utility(  # h(z) = 1 - exp(-z)
    value=lambda z: -jnp.expm1(-z),
    log_slope=lambda z: -z,
    inverse_log_slope=lambda r: -r,
    conjugate=lambda s: 1 - s + s * jnp.log(s),
)

RATIONAL = Utility(  # h(z) = z / (1 + z)
    value=lambda z: z / (1 + z),
    log_slope=lambda z: -2 * jnp.log1p(z),
    inverse_log_slope=lambda r: jnp.expm1(-r / 2),
    conjugate=lambda s: (1 - jnp.sqrt(s)) ** 2,
)


def utility_family(name: str) -> Utility:
    """The curve h of the utility "exponential", "rational" or "capture"; ValueError for another name."""
    if name in ("exponential", "capture"):
        return EXPONENTIAL
    if name == "rational":
        return RATIONAL
    raise ValueError(f"utility={name!r} is neither 'exponential' nor 'rational' nor 'capture'")


def first_slope_and_scale(name: str, v: Array, tau: Array) -> tuple[Array, Array]:
    """([P] log of tau U_i'(0), [] or [P] rollouts tau_i) of U_i(X) = U_i'(0) tau_i h(X / tau_i). v: [P]; tau: []."""
    v = jnp.maximum(v, LEAST_VARIANCE)
    if name == "capture":
        return jnp.log(4 * v), jnp.minimum(tau / (4 * v), 1e30)
    return jnp.log(v), tau


def saturation(state: AllocatorState, tau) -> Array:
    """[] float32 > 0, rollouts: tau, or the whole run's rollouts a prompt where it is None."""
    if tau is None and state.tokens is not None:
        tau = as_float(state.tokens.total) / jnp.sum(state.tokens.mean_tokens)
    elif tau is None:
        tau = state.ledger.total.astype(jnp.float32) / state.alpha.shape[0]
    return jnp.maximum(jnp.asarray(tau, jnp.float32), 1e-6)


def check_tau(tau) -> None:
    """Raises ValueError on a tau known to be wrong."""
    if not all(x > 0 for x in known(tau)):
        raise ValueError(f"tau={tau} rollouts must be positive, or None for total_budget / N")
