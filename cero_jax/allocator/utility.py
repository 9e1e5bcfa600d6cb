"""Saturating utilities of a prompt's cumulative rollouts: U_i(X) = v_i h(X / tau), h concave, h(0) = 0, h <= 1.

Source: CERO, public point 3 (concave, saturating, scaled by the posterior variance). The two families are this
project's choice. Each is written through h alone; the dual works in logarithms, so that one log a prompt is all that
solving for a price costs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from cero_jax.allocator.base import AllocatorState
from cero_jax.allocator.checks import known
from cero_jax.allocator.ledger import as_float


class Utility(NamedTuple):
    """One family h. z = X / tau >= 0 is a prompt's cumulative rollouts in units of tau."""

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
    """The family called "exponential" or "rational"; ValueError for another name."""
    if name == "exponential":
        return EXPONENTIAL
    if name == "rational":
        return RATIONAL
    raise ValueError(f"utility={name!r} is neither 'exponential' nor 'rational'")


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
