"""`cero_dual`: CERO exactly as published, Algorithm 1 of arXiv 2610.09679; equation numbers are that paper's.

M prompts (N elsewhere here), K rounds (epochs here, num_epochs). One *unit* is g rollouts, and a chosen prompt gets
Nmax units at once, so all groups have Nmax g rollouts. N_ik units of prompt i in round k, z_i = sum_k N_ik. Maximise

    sum_i U(q_i, z_i)    under   sum_ik N_ik <= B,   sum_i N_ik <= C in every round,   0 <= N_ik <= Nmax

with the value-capture utility U(q, z) = 1 - exp(-c z), c = 4 lambda q / R, R = B / M; q in [0, 1/4] is the posterior's
E[p (1 - p)] (eq. 6). The Fenchel dual has a slope theta_i for each prompt and a price for the budget, both kept in
units of the largest slope there is, cbar = lambda / R: vartheta_i in [0, 1] and nu in [0, 1]. A round takes the prompts
whose slope is above the price, highest first, while its capacity lasts (eq. 8); then

    vartheta_i <- clip(vartheta_i - gamma (Ntilde_i - z*(cbar vartheta_i; c_i) / K) / Nmax, 0, 1)               (eq. 10)
    nu         <- clip(nu - gamma (b - sum_i Ntilde_i) / GB, 0, 1),      b = B / K,   GB = max(b, C - b)

with Ntilde the *virtual* allocation, which does not look at what is left of B, and c_i from the q *after* the round's
verdicts. Those are known when the next round is allocated, so that is where a round's step of the slopes is taken.

How it lies under the shared contract: the algorithm chooses, and never sorts: the order of the slopes is the order of
their bits, and the last one admitted is found by bisection, 62 reads of M numbers (at 10^6 a fifteenth of a sort's time
on a CPU); ties go by one fixed random order. A batch of P prompts (prompt_ids) is a round in small: b is the batch's
budget, C in the same proportion. A budget named for all prompts only cuts the executed allocation. A budget in tokens
is what it buys at the mean cost of a rollout.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cero_jax.allocator.base import Allocator, AllocatorState, Candidates
from cero_jax.allocator.build import build_allocator
from cero_jax.allocator.checks import check_settings, known
from cero_jax.allocator.defaults import GROUP_SIZE, MAX_GROUP, MIN_GROUP, MULTIPLE_OF
from cero_jax.allocator.posterior import expected_variance
from cero_jax.allocator.selection import GREATEST, first_in_order, scattered
from cero_jax.allocator.utility import saturation

FIRST_PRICE = 0.5  # nu_1
HEADROOM = 1.03  # the paper's C over its b: 132 units of 128
MOST_GROUPS = 2**30  # of a round, so that a count of them is an int32; far more than there are prompts


class Duals(NamedTuple):
    """What the rule keeps from round to round."""

    slope: Array  # [M] float32 in [0, 1], vartheta: as the last virtual allocation used it
    virtual: Array  # [M] float32, Ntilde of that allocation, in units; -1 before a prompt's first
    price: Array  # [] float32 in [0, 1], nu: for the next allocation; -1 before the first
    order: Array  # [] uint32, the seed of the fixed random order


def _no_duals(num_prompts: int) -> Duals:
    nothing = jnp.full(num_prompts, -1.0, jnp.float32)
    return Duals(jnp.zeros_like(nothing), nothing, jnp.float32(-1), jnp.uint32(0))


def cero_dual(
    *,
    total_budget: ArrayLike,
    num_epochs: int,
    group_size: int = GROUP_SIZE,
    units_per_group: int = 2,
    capacity: int | None = None,
    lam: ArrayLike = 1.0,
    gamma: ArrayLike | None = None,
    prior: tuple[ArrayLike, ArrayLike] = (1.0, 1.0),
    discount: ArrayLike = 1.0,
    min_group: int = MIN_GROUP,
    max_group: int = MAX_GROUP,
    multiple_of: int = MULTIPLE_OF,
    expected_tokens: ArrayLike | None = None,
) -> Allocator:
    """CERO as published, with its constants, readable beside its mathematics. For short runs use `cero`.

    It chooses which prompts get a group, all of one size, and how many do: an epoch may come out above or below its
    share, or empty, and a run may end with a rest. So run num_epochs epochs; all zeros do not end the run.
    Source: CERO (arXiv 2610.09679), Algorithm 1, equations 5 to 10.

    The paper forgets by a factor rho each round, `discount` by rollouts: discount = rho ** (8 N num_epochs /
    total_budget) is rho for a round that spends its mean. The paper's rho is 1, and so is the default here.

    Args:
        total_budget: rollouts of the whole run, below 2^31, may be traced; tokens where expected_tokens is given.
        num_epochs: K, the rounds, calls of `allocate`: each may be a pass over the data, or a few steps.
        group_size: rollouts of every group, Nmax units of g rollouts; within [min_group, max_group].
        units_per_group: Nmax, units of the budget in a group; divides group_size.
        capacity: C, units that a round can hold, a multiple of units_per_group; None: 3 % above the mean, rounded up.
        lam: lambda of the utility, how fast it saturates; may be traced.
        gamma: step size of the dual variables, may be traced; None: 1 / sqrt(num_epochs).
        prior: Beta(alpha, beta) of a prompt's success probability: two numbers, or two arrays [N].
        discount: share of the evidence kept over a pass of 8 N rollouts, in (0, 1]; may be traced.
        min_group: rollouts below which no group may be; here only a bound on group_size.
        max_group: rollouts above which no group may be; here only a bound on group_size.
        multiple_of: divides group_size, min_group and max_group.
        expected_tokens: a first guess at the tokens of a rollout: the budget is in tokens, below 2^63. None: rollouts.

    Returns:
        The allocator: init, allocate and update, three pure functions on one state.

    Raises:
        ValueError: a setting that is known now is out of its range.
    """
    sizes = min_group, max_group, multiple_of
    check_settings(total_budget, num_epochs, *sizes, prior, discount, expected_tokens)
    _check(group_size, units_per_group, capacity, lam, gamma, *sizes)
    nmax, g, rounds = float(units_per_group), group_size // units_per_group, float(num_epochs)
    lam, step = (jnp.asarray(x, jnp.float32) for x in (lam, rounds**-0.5 if gamma is None else gamma))

    def rule(state: AllocatorState, candidates: Candidates, budget: Array, key) -> tuple[Array, AllocatorState]:
        duals: Duals = state.rule_state
        started = duals.price >= 0
        order = jnp.where(started, duals.order, jax.random.bits(key, dtype=jnp.uint32))
        nu = jnp.where(started, duals.price, jnp.float32(FIRST_PRICE))

        exposure = saturation(state, None) / g  # R = B / M
        b = exposure * state.alpha.shape[0] / rounds  # b = B / K
        capacity_ratio = None if capacity is None else capacity / b
        if candidates.prompt_ids is not None:  # a round in small
            mean_cost = 1.0 if state.tokens is None else jnp.mean(state.tokens.mean_tokens)
            b = budget.astype(jnp.float32) / mean_cost / g
        room = groups_of_a_round(b, nmax, capacity_ratio)

        # the step that the last round left over: eq. 10 with the q of now, which has that round's verdicts in it
        q = expected_variance(candidates.alpha, candidates.beta)  # eq. 6
        before, virtual = candidates.take(duals.slope), candidates.take(duals.virtual)
        stepped = step_slope(before, virtual, 4 * lam * q / exposure, lam / exposure, step, nmax, rounds)
        vartheta = jnp.where(virtual < 0, 4 * q, stepped)

        # the virtual allocation, eq. 8, and what is executed of it: the same order, while the budget lasts
        ids = jnp.arange(len(q), dtype=jnp.int32) if candidates.prompt_ids is None else candidates.prompt_ids
        ties, admitted = scattered(ids, order), candidates.valid & (vartheta > nu)
        chosen = highest_first(vartheta, ties, admitted, room)
        limit = candidates.limit if state.tokens is None else candidates.limit / jnp.mean(state.tokens.mean_tokens)
        paid = jnp.minimum(jnp.minimum(limit // group_size, MOST_GROUPS).astype(jnp.int32), room)
        executed = jax.lax.cond(paid < room, lambda: highest_first(vartheta, ties, admitted, paid), lambda: chosen)

        virtual = jnp.where(chosen, jnp.float32(nmax), 0)
        duals = Duals(
            slope=candidates.put(duals.slope, vartheta),
            virtual=candidates.put(duals.virtual, virtual),
            price=step_price(nu, virtual, b, nmax * room.astype(jnp.float32), step),  # no q in it: taken at once
            order=order,
        )
        price = lam / exposure * nu / g  # utility a rollout
        return jnp.where(executed, float(group_size), 0.0), state._replace(rule_state=duals, budget_dual=price)

    return build_allocator(
        rule,
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=group_size,
        max_group=group_size,
        multiple_of=multiple_of,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
        spends_all=False,
        init_rule=_no_duals,
    )


def groups_of_a_round(b: Array, nmax: float, capacity_ratio: Array | None) -> Array:
    """[] int32, C / Nmax. b: [] units of a round on average. capacity_ratio: [] C / b; None: HEADROOM, rounded up."""
    if capacity_ratio is not None:
        return jnp.minimum(jnp.round(capacity_ratio * b / nmax), MOST_GROUPS).astype(jnp.int32)
    groups = jnp.ceil(HEADROOM * b / nmax - 1e-4)  # 1e-4: what float32 may be above the whole
    return jnp.minimum(groups, MOST_GROUPS).astype(jnp.int32)


def highest_first(vartheta: Array, ties: Array, admitted: Array, count: Array) -> Array:
    """[P] bool, eq. 8: the admitted prompts in falling order of their margins vartheta_i - nu, at most `count`.

    One price stands for all, so margins fall as slopes do, and floats >= 0 are ordered as their bits are.
    """
    bits = jax.lax.bitcast_convert_type(vartheta, jnp.int32)
    return first_in_order(GREATEST - jnp.maximum(bits, 0), ties, admitted, count)


def step_slope(vartheta: Array, virtual: Array, c: Array, cbar, gamma, nmax: float, rounds: float) -> Array:
    """[P] vartheta after eq. 10. virtual: [P] Ntilde. c: [P] curvatures with the new q. cbar: [] the largest slope."""
    target = minimiser(cbar * vartheta, c, rounds * nmax) / rounds
    return jnp.clip(vartheta - gamma * (virtual - target) / nmax, 0, 1)


def step_price(nu: Array, virtual: Array, b: Array, capacity: Array, gamma) -> Array:
    """[] nu after a round. virtual: [P] Ntilde. b: [] units of a round on average. capacity: [] C, units."""
    largest = jnp.maximum(jnp.maximum(b, capacity - b), 1e-6)  # GB
    return jnp.clip(nu - gamma * (b - jnp.sum(virtual)) / largest, 0, 1)


def minimiser(theta: Array, c: Array, most: float) -> Array:
    """z*(theta; c), eq. 9: the z in [0, Z] that minimises theta z - (1 - exp(-c z)). most: Z = K Nmax."""
    inner = jnp.log(c / theta) / c
    return jnp.where(theta >= c, 0.0, jnp.where(theta <= c * jnp.exp(-c * most), most, jnp.clip(inner, 0.0, most)))


def conjugate(theta: Array, c: Array, most: float) -> Array:
    """U*(theta) = inf over z in [0, Z] of theta z - (1 - exp(-c z)), Lemma 1."""
    z = minimiser(theta, c, most)
    return theta * z + jnp.expm1(-c * z)


def _check(group_size, units_per_group, capacity, lam, gamma, min_group, max_group, multiple_of) -> None:
    """Raises ValueError, naming the values, on settings that are known to be wrong and that no other allocator has."""
    if not min_group <= group_size <= max_group:
        raise ValueError(f"group_size={group_size} must lie in min_group={min_group}..max_group={max_group}")
    if group_size % multiple_of:
        raise ValueError(f"multiple_of={multiple_of} must divide group_size={group_size}")
    if units_per_group < 1 or group_size % units_per_group:
        raise ValueError(f"units_per_group={units_per_group} must divide group_size={group_size}")
    if capacity is not None and (capacity < units_per_group or capacity % units_per_group):
        raise ValueError(
            f"capacity={capacity} units a round must be a positive multiple of units_per_group={units_per_group}"
        )
    if not all(x > 0 for x in known(lam)):
        raise ValueError(f"lam={lam} must be positive")
    if not all(x > 0 for x in known(gamma)):
        raise ValueError(f"gamma={gamma} must be positive, or None for 1 / sqrt(num_epochs)")
