"""`build_allocator`: whole groups, the posterior and the ledger around a rule for the shares.

Letters: N prompts of the data, P prompts of one call of `allocate`, U visits of one call of `update`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cero_jax.allocator import checks, posterior, rounding
from cero_jax.allocator import ledger as ledgers
from cero_jax.allocator.base import AllocateFn, Allocator, AllocatorState, Candidates, InitFn, Rule, UpdateFn
from cero_jax.allocator.defaults import DISCOUNT, MAX_GROUP, MIN_GROUP, MULTIPLE_OF, PRIOR


def build_allocator(
    rule: Rule,
    *,
    total_budget: ArrayLike,
    num_epochs: int,
    min_group: int = MIN_GROUP,
    max_group: int = MAX_GROUP,
    multiple_of: int = MULTIPLE_OF,
    prior: tuple[ArrayLike, ArrayLike] = PRIOR,
    discount: ArrayLike = DISCOUNT,
    expected_tokens: ArrayLike | None = None,
    spends_all: bool = True,
    init_rule: Callable[[int], Any] = lambda num_prompts: (),
) -> Allocator:
    """An allocator of your own: whole groups, the posterior and the ledger around a rule for the shares.

    Args:
        rule: (state, candidates, budget, key) -> (shares [P], state); see `Rule`.
        total_budget: rollouts of the whole run, below 2^31; tokens, below 2^63, where expected_tokens is given.
        num_epochs: calls of `allocate` that the budget is cut into.
        min_group: rollouts of the smallest group that is drawn at all, at least 1; a smaller share is drawn by chance.
        max_group: rollouts of the largest group; with min_group the same, all groups are of one size.
        multiple_of: divides every group's rollouts, and so must divide min_group and max_group.
        prior: Beta(alpha, beta) of a prompt's success probability: two numbers, or two arrays [N].
        discount: share of the evidence kept over a pass of 8 N rollouts, in (0, 1]; 1 never forgets.
        expected_tokens: a first guess at the tokens of a rollout: the budget is in tokens. None: in rollouts.
        spends_all: whether a call spends its budget to the rollout; else what the shares sum to, at most what is left.
        init_rule: num_prompts -> the rule's own state at the start, any pytree, kept as state.rule_state.

    Returns:
        The allocator: init, allocate and update.

    Raises:
        ValueError: a setting that is known now is out of its range.
    """
    sizes = min_group, max_group, multiple_of
    checks.check_settings(total_budget, num_epochs, *sizes, prior, discount, expected_tokens)
    bounds = {"min_group": min_group, "max_group": max_group, "multiple_of": multiple_of}

    def init(num_prompts: int, seed: int | Array = 0) -> AllocatorState:
        if num_prompts < 1:
            raise ValueError(f"num_prompts={num_prompts}: an allocator needs at least one prompt")
        alpha, beta = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), (num_prompts,)) for x in prior)
        zeros = jnp.zeros(num_prompts, jnp.int32)
        tokens = None
        if expected_tokens is not None:
            tokens = ledgers.open_token_ledger(total_budget, num_prompts, expected_tokens)
        return AllocatorState(
            alpha=alpha,
            beta=beta,
            cumulative_rollouts=zeros,
            reserved=zeros,
            budget_dual=jnp.zeros((), jnp.float32),
            rule_state=init_rule(num_prompts),
            ledger=ledgers.open_ledger(2**31 - 1 if tokens else total_budget),
            tokens=tokens,
            key=jax.random.key(seed),
        )

    def allocate(
        state: AllocatorState, prompt_ids: ArrayLike | None = None, budget: ArrayLike | None = None
    ) -> tuple[Array, AllocatorState]:
        return _hand_out(rule, state, prompt_ids, budget, num_epochs, spends_all, bounds)

    def update(
        state: AllocatorState,
        num_rollouts: ArrayLike,
        num_correct: ArrayLike,
        *,
        prompt_ids: ArrayLike | None = None,
        num_evidence: ArrayLike | None = None,
        num_tokens: ArrayLike | None = None,
        release: ArrayLike = True,
    ) -> AllocatorState:
        counts = num_rollouts, num_correct, num_evidence, num_tokens
        return _take_in(state, *counts, prompt_ids, release, prior=prior, discount=discount)

    init.__doc__ = InitFn.__call__.__doc__
    return Allocator(init, _compiled_allocate(allocate), _compiled_update(update))


def _compiled_allocate(allocate: AllocateFn) -> AllocateFn:
    """Compiled, so that nobody pays for tracing the loops again at every call, behind a check of what can be read."""
    compiled = jax.jit(allocate)

    @functools.wraps(allocate)
    def checked(state, prompt_ids=None, budget=None):
        if prompt_ids is not None:
            prompt_ids = checks.checked_ids(prompt_ids, state.alpha.shape[0])
        return compiled(state, prompt_ids, checks.checked_budget(budget, in_tokens=state.tokens is not None))

    checked.__doc__ = AllocateFn.__call__.__doc__  # the text stands once; help(allocator.allocate) shows it
    return checked


def _compiled_update(update: UpdateFn) -> UpdateFn:
    """The same of `update`."""
    compiled = jax.jit(update)

    @functools.wraps(update)
    def checked(
        state,
        num_rollouts,
        num_correct,
        *,
        prompt_ids=None,
        num_evidence=None,
        num_tokens=None,
        release: ArrayLike = True,
    ):
        num_prompts = state.alpha.shape[0]
        if prompt_ids is not None:
            prompt_ids = checks.checked_ids(prompt_ids, num_prompts)
        counts = {
            "num_rollouts": num_rollouts,
            "num_correct": num_correct,
            "num_evidence": num_evidence,
            "num_tokens": num_tokens,
        }
        counts = checks.checked_counts(counts, release, prompt_ids, num_prompts)
        given = {} if release is True else {"release": release}  # the default is compiled in, not sent to the device
        return compiled(state, prompt_ids=prompt_ids, **counts, **given)

    checked.__doc__ = UpdateFn.__call__.__doc__
    return checked


def _hand_out(
    rule: Rule, state: AllocatorState, prompt_ids, budget, num_epochs: int, spends_all: bool, bounds: dict[str, int]
) -> tuple[Array, AllocatorState]:
    """`allocate`: the budget of this call, the rule's shares of it, whole groups of those, and the reserve."""
    key, rule_key, draw_key = jax.random.split(state.key, 3)
    candidates = _candidates(state, prompt_ids)
    num_valid = jnp.sum(candidates.valid, dtype=jnp.int32)
    budget_of = _rollout_budget if state.tokens is None else _token_budget
    share, ceiling, ledger = budget_of(state, num_valid, prompt_ids is None, budget, num_epochs, bounds)
    candidates = candidates._replace(limit=ceiling)
    exactly = spends_all and state.tokens is None
    if exactly:
        share = rounding.feasible_budget(share, num_valid, **bounds)
    shares, state = rule(state, candidates, share, rule_key)
    if shares.shape != candidates.alpha.shape:
        raise ValueError(
            f"the rule gave shares of shape {shares.shape} to {candidates.alpha.shape[0]} prompts: give [P]"
        )
    # A share that is no number would never come to whole groups that sum to the budget.
    shares = jnp.where(candidates.valid & jnp.isfinite(shares), jnp.clip(shares, 0, bounds["max_group"]), 0)
    if exactly:
        total = share
    else:
        most = ceiling if state.tokens is None else ledgers.MOST - ledger.reserved
        shares, total = _within(shares, candidates.cost, ceiling, most)
        total = rounding.feasible_budget(total, num_valid, **bounds)
    num_rollouts = rounding.whole_groups(draw_key, shares, candidates.valid, total, **bounds)
    if prompt_ids is None:
        reserved = state.reserved + num_rollouts
    else:
        reserved = state.reserved.at[candidates.prompt_ids].add(num_rollouts, mode="drop")
    ledger = ledger._replace(reserved=ledger.reserved + jnp.sum(num_rollouts, dtype=jnp.int32))
    return num_rollouts, state._replace(reserved=reserved, ledger=ledger, key=key)


def _take_in(
    state: AllocatorState, num_rollouts, num_correct, num_evidence, num_tokens, prompt_ids, release, *, prior, discount
) -> AllocatorState:
    """`update`: the counts [U] laid out over all N prompts; then the posterior, the reserve and the ledger."""
    drawn = jnp.maximum(jnp.asarray(num_rollouts, jnp.int32), 0)
    evidence = drawn if num_evidence is None else jnp.clip(jnp.asarray(num_evidence, jnp.int32), 0, drawn)
    correct = jnp.clip(jnp.asarray(num_correct, jnp.int32), 0, evidence)
    paid = None if num_tokens is None else jnp.maximum(jnp.asarray(num_tokens, jnp.int32), 0)
    freed = jnp.broadcast_to(jnp.asarray(release, bool), drawn.shape)
    if prompt_ids is not None:
        ids = _places(prompt_ids, state.alpha.shape[0])
        zeros = jnp.zeros_like(state.reserved)
        drawn, evidence, correct = (zeros.at[ids].add(x, mode="drop") for x in (drawn, evidence, correct))
        paid = None if paid is None else zeros.at[ids].add(paid, mode="drop")
        freed = zeros.astype(bool).at[ids].max(freed, mode="drop")
    alpha, beta = posterior.add_evidence(
        state.alpha, state.beta, drawn, correct, evidence, prior=prior, discount=discount
    )
    reserved = jnp.where(freed, 0, jnp.maximum(state.reserved - drawn, 0))
    tokens = state.tokens
    if tokens is not None:
        if paid is None:
            paid = jnp.round(drawn.astype(jnp.float32) * tokens.mean_tokens).astype(jnp.int32)
        tokens = ledgers.charge_tokens(tokens, drawn, state.cumulative_rollouts, paid)
    spent = ledgers.add_counts(state.ledger.spent, jnp.sum(drawn, dtype=jnp.int32))
    return state._replace(
        alpha=alpha,
        beta=beta,
        cumulative_rollouts=ledgers.add_counts(state.cumulative_rollouts, drawn),
        reserved=reserved,
        ledger=state.ledger._replace(spent=spent, reserved=jnp.sum(reserved, dtype=jnp.int32)),
        tokens=tokens,
    )


def _places(prompt_ids: ArrayLike, num_prompts: int) -> Array:
    """Ids with every padding id at N, which a scatter drops; a negative one would count from the end."""
    ids = jnp.asarray(prompt_ids, jnp.int32)
    return jnp.where((ids >= 0) & (ids < num_prompts), ids, num_prompts)


def _candidates(state: AllocatorState, prompt_ids: ArrayLike | None) -> Candidates:
    """What the state says of the prompts considered now."""
    num_prompts = state.alpha.shape[0]
    rollouts = state.cumulative_rollouts + state.reserved
    cost = None if state.tokens is None else state.tokens.mean_tokens
    valid, limit = jnp.ones(num_prompts, bool), jnp.zeros((), jnp.int32)  # the limit is not known yet
    everything = Candidates(None, state.alpha, state.beta, rollouts, valid, cost, limit)
    if prompt_ids is None:
        return everything
    ids = _places(prompt_ids, num_prompts)
    some = everything._replace(prompt_ids=ids, valid=ids < num_prompts)
    return some._replace(
        alpha=some.take(state.alpha),
        beta=some.take(state.beta),
        rollouts=some.take(rollouts),
        cost=None if cost is None else some.take(cost),
    )


def _rollout_budget(
    state: AllocatorState, num_valid: Array, all_prompts: bool, budget, num_epochs: int, bounds: dict[str, int]
):
    """Of this call: its budget and the most it may spend, [] int32 rollouts; and the ledger that has counted it."""
    ledger, left = state.ledger, jnp.maximum(state.ledger.left, 0)
    if budget is not None:
        share = jnp.clip(jnp.asarray(budget, jnp.int32), 0, left)
        return share, share, ledger
    least, one_size = bounds["min_group"], bounds["min_group"] == bounds["max_group"]
    unit = least if one_size else bounds["multiple_of"]
    if all_prompts:
        return ledgers.epoch_budget(ledger, num_epochs=num_epochs, min_group=least, unit=unit), left, ledger
    sizes = {"num_epochs": num_epochs, "num_prompts": state.alpha.shape[0], "unit": unit}
    share, ledger = ledgers.batch_budget(ledger, num_valid, **sizes)
    return share, left, ledger


def _token_budget(
    state: AllocatorState, num_valid: Array, all_prompts: bool, budget, num_epochs: int, bounds: dict[str, int]
):
    """The same in [] float32 tokens. An epoch pays for at least one group of the average cost."""
    assert state.tokens is not None
    left = jnp.maximum(state.tokens.left(state.reserved), 0)
    if budget is not None:
        share = jnp.clip(jnp.asarray(budget, jnp.float32), 0, left)
    else:
        share = ledgers.token_budget(state.tokens, state.reserved, num_epochs=num_epochs)
        if not all_prompts:
            share = share * num_valid.astype(jnp.float32) / state.alpha.shape[0]
        share = jnp.minimum(jnp.maximum(share, bounds["min_group"] * jnp.mean(state.tokens.mean_tokens)), left)
    return share, share, state.ledger


def _within(shares: Array, cost: Array | None, ceiling: Array, most: Array) -> tuple[Array, Array]:
    """Shares scaled down to cost at most the ceiling, and the rollouts they sum to: [] int32, at most `most`."""
    wanted, limit = jnp.sum(shares if cost is None else shares * cost), ceiling.astype(jnp.float32)
    scaled = shares * jnp.minimum(1, limit / jnp.maximum(wanted, 1e-6))
    whole, rest = _whole_and_rest(scaled if cost is not None else shares)
    total = jnp.minimum(ledgers.add_counts(whole, jnp.floor(rest + 1e-3).astype(jnp.int32)), most)
    if cost is not None:
        return scaled, total
    # Both are rollouts, and compared as integers: beyond 2^24 the sum that is wanted is rough.
    over = (whole - ceiling).astype(jnp.float32) + rest > 0
    return jnp.where(over, scaled, shares), jnp.where(over, ceiling, total)


def _whole_and_rest(shares: Array) -> tuple[Array, Array]:
    """Sums of the whole parts of shares [P] and of what those leave: [] int32, [] float32; 2^31 - 1 and 1 where larger.

    The first is exact, as a float32 sum beyond 2^24 is not, unless it wraps around.
    """
    whole = jnp.floor(shares)
    total = jnp.sum(whole, dtype=jnp.int32)
    wrapped = (total < 0) | (jnp.sum(whole) > 1.5 * 2.0**31)
    return jnp.where(wrapped, ledgers.MOST, total), jnp.where(wrapped, 1.0, jnp.sum(shares - whole))
