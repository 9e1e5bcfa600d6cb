"""What others do with a budget, under the same contract, so that a user compares by changing one word.

Written from their mathematics. They know no budget across epochs: where an epoch's budget is under P group_size it goes
to the floor(budget / group_size) prompts with the fewest cumulative rollouts, ties by the key, and their rule divides
it among those.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from cero_jax.allocator.base import Allocator, AllocatorState, Candidates
from cero_jax.allocator.build import build_allocator
from cero_jax.allocator.defaults import ADVANTAGE, DISCOUNT, GROUP_SIZE, MAX_GROUP, MIN_GROUP, MULTIPLE_OF, PRIOR
from cero_jax.allocator.dual import shares_at_budget
from cero_jax.allocator.posterior import expected_variance
from cero_jax.allocator.selection import GREATEST, first_in_order


def uniform(
    *,
    total_budget: ArrayLike,
    num_epochs: int,
    min_group: int = MIN_GROUP,
    max_group: int = MAX_GROUP,
    multiple_of: int = MULTIPLE_OF,
    group_size: int = GROUP_SIZE,
    prior: tuple[ArrayLike, ArrayLike] = PRIOR,
    discount: ArrayLike = DISCOUNT,
    expected_tokens: ArrayLike | None = None,
) -> Allocator:
    """GRPO's fixed group size: every prompt alike, in turn.

    An epoch's budget under P group_size goes to the floor(budget / group_size) prompts with the fewest rollouts so far.
    Source: GRPO (arXiv 2402.03300), which draws one group size throughout.

    Args:
        total_budget: rollouts of the whole run, below 2^31, may be traced; tokens where expected_tokens is given.
        num_epochs: calls of `allocate` that the budget is cut into: each may be a pass over the data, or a few steps.
        min_group: rollouts of the smallest group that is drawn at all, at least 1.
        max_group: rollouts of the largest group.
        multiple_of: divides every group's rollouts, and so must divide min_group and max_group.
        group_size: rollouts of a group, within [min_group, max_group]; groups grow alike where the budget allows.
        prior: Beta(alpha, beta) of a prompt's success probability for diagnostics: two numbers, or two arrays [N].
        discount: share of the evidence kept over a pass of 8 N rollouts, in (0, 1]; may be traced.
        expected_tokens: a first guess at the tokens of a rollout: the budget is in tokens, below 2^63. None: rollouts.

    Returns:
        The allocator: init, allocate and update, three pure functions on one state.

    Raises:
        ValueError: a setting that is known now is out of its range.
    """

    def divide(candidates: Candidates, chosen: Array, budget: Array) -> Array:
        paid = jnp.where(chosen, 1.0, 0.0) if candidates.cost is None else jnp.where(chosen, candidates.cost, 0.0)
        return jnp.where(chosen, budget.astype(jnp.float32) / jnp.maximum(jnp.sum(paid), 1e-6), 0.0)

    return _in_turn(
        divide,
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        multiple_of=multiple_of,
        group_size=group_size,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
    )


def variance(
    *,
    total_budget: ArrayLike,
    num_epochs: int,
    min_group: int = MIN_GROUP,
    max_group: int = MAX_GROUP,
    multiple_of: int = MULTIPLE_OF,
    group_size: int = GROUP_SIZE,
    advantage: str = ADVANTAGE,
    prior: tuple[ArrayLike, ArrayLike] = PRIOR,
    discount: ArrayLike = DISCOUNT,
    expected_tokens: ArrayLike | None = None,
) -> Allocator:
    """VIP: minimise the sum over prompts of the gradient's variance.

    With a = E[p(1 - p)], a prompt's variance at n rollouts is a / (n - 1) for advantage "rloo" and a (n - 1) / n^2 for
    "dr_grpo". Both gains of one more rollout fall in n, so a threshold on the gain is exact in integers (for "dr_grpo"
    from min_group 3 on: its gain of 2 -> 3 is under that of 3 -> 4). Source: VIP (arXiv 2602.01601), its objective.

    An epoch's budget under P group_size goes to the floor(budget / group_size) prompts with the fewest rollouts so far.

    Args:
        total_budget: rollouts of the whole run, below 2^31, may be traced; tokens where expected_tokens is given.
        num_epochs: calls of `allocate` that the budget is cut into: each may be a pass over the data, or a few steps.
        min_group: rollouts of the smallest group that is drawn at all, at least 2.
        max_group: rollouts of the largest group.
        multiple_of: divides every group's rollouts, and so must divide min_group and max_group.
        group_size: rollouts of a group on average, within [min_group, max_group].
        advantage: whose gradient: "rloo" (less the mean of the others) or "dr_grpo" (less the group's mean).
        prior: Beta(alpha, beta) of a prompt's success probability: two numbers, or two arrays [N].
        discount: share of the evidence kept over a pass of 8 N rollouts, in (0, 1]; may be traced.
        expected_tokens: a first guess at the tokens of a rollout: the budget is in tokens, below 2^63. None: rollouts.

    Returns:
        The allocator: init, allocate and update, three pure functions on one state.

    Raises:
        ValueError: a setting that is known now is out of its range.
    """
    if advantage not in ("rloo", "dr_grpo"):
        raise ValueError(f"advantage={advantage!r} is neither 'rloo' nor 'dr_grpo'")
    if min_group < 2:
        raise ValueError(
            f"min_group={min_group} must be at least 2: a group of one has no baseline, so no variance here"
        )
    sizes = np.arange(min_group, max_group, dtype=np.float64)  # n, of a gain n -> n + 1
    gains = (sizes - 1) / sizes**2 - sizes / (sizes + 1) ** 2
    rising = jnp.asarray(np.sort(-gains), jnp.float32)

    def size_at(candidates: Candidates, price: Array) -> Array:
        ratio = price / expected_variance(candidates.alpha, candidates.beta)
        if advantage == "rloo":  # the gain of n - 1 -> n is a / ((n - 1)(n - 2))
            return jnp.floor(1.5 + jnp.sqrt(0.25 + 1 / ratio))
        return min_group + jnp.searchsorted(rising, -ratio, side="right").astype(jnp.float32)

    return _in_turn(
        _by_threshold(size_at, min_group, max_group),
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        multiple_of=multiple_of,
        group_size=group_size,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
    )


def knapsack(
    *,
    total_budget: ArrayLike,
    num_epochs: int,
    min_group: int = MIN_GROUP,
    max_group: int = MAX_GROUP,
    multiple_of: int = MULTIPLE_OF,
    group_size: int = GROUP_SIZE,
    prior: tuple[ArrayLike, ArrayLike] = PRIOR,
    discount: ArrayLike = DISCOUNT,
    expected_tokens: ArrayLike | None = None,
) -> Allocator:
    """Knapsack RL: maximise the chance of a group with a gradient, weighed by what it teaches.

    With p the posterior mean, maximise the sum of (1 - p^n - (1 - p)^n) p (1 - p)^2. The gain of n -> n + 1 is
    p (1 - p)^2 (p^n (1 - p) + (1 - p)^n p), which falls in n, so a threshold is exact.
    Source: Knapsack RL (arXiv 2509.25849), its objective.

    An epoch's budget under P group_size goes to the floor(budget / group_size) prompts with the fewest rollouts so far.

    Args:
        total_budget: rollouts of the whole run, below 2^31, may be traced; tokens where expected_tokens is given.
        num_epochs: calls of `allocate` that the budget is cut into: each may be a pass over the data, or a few steps.
        min_group: rollouts of the smallest group that is drawn at all, at least 1.
        max_group: rollouts of the largest group.
        multiple_of: divides every group's rollouts, and so must divide min_group and max_group.
        group_size: rollouts of a group on average, within [min_group, max_group].
        prior: Beta(alpha, beta) of a prompt's success probability: two numbers, or two arrays [N].
        discount: share of the evidence kept over a pass of 8 N rollouts, in (0, 1]; may be traced.
        expected_tokens: a first guess at the tokens of a rollout: the budget is in tokens, below 2^63. None: rollouts.

    Returns:
        The allocator: init, allocate and update, three pure functions on one state.

    Raises:
        ValueError: a setting that is known now is out of its range.
    """
    steps = int(max_group - min_group).bit_length()

    def size_at(candidates: Candidates, price: Array) -> Array:
        p = candidates.alpha / (candidates.alpha + candidates.beta)
        q = candidates.beta / (candidates.alpha + candidates.beta)
        log_p, log_q = jnp.log(p), jnp.log(q)

        def gain(n):
            return p * q * q * (jnp.exp(n * log_p) * q + jnp.exp(n * log_q) * p)

        def halve(_, bracket):  # the largest n whose gain of n - 1 -> n is at least the price
            low, high = bracket
            middle = jnp.ceil((low + high) / 2)
            enough = gain(middle - 1) >= price
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

        bracket = jnp.full_like(p, min_group), jnp.full_like(p, max_group)
        return jax.lax.fori_loop(0, steps, halve, bracket)[0]

    return _in_turn(
        _by_threshold(size_at, min_group, max_group),
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=min_group,
        max_group=max_group,
        multiple_of=multiple_of,
        group_size=group_size,
        prior=prior,
        discount=discount,
        expected_tokens=expected_tokens,
    )


def fewest_first(key, candidates: Candidates, count: Array) -> Array:
    """[P] bool: the `count` valid prompts with the fewest cumulative rollouts, ties drawn by the key."""
    drawn = jax.random.randint(key, candidates.rollouts.shape, 0, GREATEST, jnp.int32)
    return first_in_order(candidates.rollouts, drawn, candidates.valid, count)


def _in_turn(
    divide: Callable[[Candidates, Array, Array], Array], *, group_size: int, min_group: int, max_group: int, **settings
) -> Allocator:
    """The allocator that chooses whose turn it is and lets `divide` share the budget among them."""
    if not min_group <= group_size <= max_group:
        raise ValueError(f"group_size={group_size} must lie in min_group={min_group}..max_group={max_group}")

    def rule(state: AllocatorState, candidates: Candidates, budget: Array, key) -> tuple[Array, AllocatorState]:
        mean_cost = 1 if state.tokens is None else jnp.mean(state.tokens.mean_tokens)
        num_groups = jnp.minimum(budget // (group_size * mean_cost), 2**30).astype(jnp.int32)
        chosen = fewest_first(key, candidates, jnp.maximum(num_groups, 1))
        return divide(candidates, chosen, budget), state

    return build_allocator(rule, min_group=min_group, max_group=max_group, **settings)


def _by_threshold(size_at: Callable[[Candidates, Array], Array], min_group: int, max_group: int):
    """A `divide` that gives every chosen prompt the size at which its gain of one more falls under one price.

    size_at: (candidates, price []) -> [P] float32, the size before it is cut to [min_group, max_group].
    """

    def divide(candidates: Candidates, chosen: Array, budget: Array) -> Array:
        def shares_at(log_price):
            size = jnp.clip(size_at(candidates, jnp.exp(log_price)), min_group, max_group)
            return jnp.where(chosen, size, 0.0)

        return shares_at_budget(shares_at, jnp.float32(-80.0), jnp.float32(1.0), budget, candidates.cost)[0]

    return divide
