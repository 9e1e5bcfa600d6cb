"""The state and the contract that every allocator shares; an allocator adds only its rule for the shares."""

import numbers
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from cero_jax.allocator import ledger as ledgers
from cero_jax.allocator import posterior, rounding
from cero_jax.allocator.ledger import Ledger, TokenLedger


class AllocatorState(NamedTuple):
    """Everything an allocator knows: a few numbers a prompt. Checkpoint it whole."""

    alpha: Array  # [N] float32, prior + decayed successes
    beta: Array  # [N] float32, prior + decayed failures
    cumulative_rollouts: Array  # [N] int32, drawn and settled
    reserved: Array  # [N] int32, handed out by `allocate`, not settled yet
    prompt_dual: Array  # [N] float32, utility a rollout, in `cero_dual` (negative: not started); [0] elsewhere
    budget_dual: Array  # [] float32, utility a rollout: what one more rollout of budget would add
    ledger: Ledger  # scalars: the budget of the whole run, in rollouts
    tokens: TokenLedger | None  # the budget in tokens, where that is what is fixed
    key: Array  # [] PRNG key: breaks ties and draws fractions


class InitFn(Protocol):
    """Makes the state of a run."""

    def __call__(self, num_prompts: int, seed: int | Array = 0) -> AllocatorState:
        """The state before any rollout. num_prompts: N, static. seed: int, may be traced."""
        ...


class AllocateFn(Protocol):
    """Hands out rollouts."""

    def __call__(self, state: AllocatorState, prompt_ids=None, budget=None) -> tuple[Array, AllocatorState]:
        """Rollouts for each prompt, reserved in the ledger: n is 0 or in [min_group, max_group].

        prompt_ids: [P] int32, distinct; ids outside [0, N) are padding and get 0. None means all N, the usual call.
        budget: [] int32, rollouts of this call (tokens, where the budget is in tokens), may be traced; None means, for
          all N, what is left / rounds left, and for a batch its share of an epoch's budget. Always clipped to what is
          left. The sum is exact where it is feasible, otherwise the closest feasible one below; the rest is not lost.
        Returns ([P] int32, state). For all N with budget None, all zeros end the run.
        """
        ...


class UpdateFn(Protocol):
    """Takes in what was drawn."""

    def __call__(
        self,
        state: AllocatorState,
        prompt_ids,
        num_rollouts,
        num_correct,
        num_evidence=None,
        num_tokens=None,
        release=True,
    ) -> AllocatorState:
        """Settles rollouts that were drawn: the posterior, the cumulative counts, the ledger. May be called in parts.

        prompt_ids: [U] int32, distinct; ids outside [0, N) are padding and ignored. None means all N, in order.
        num_rollouts: [U] int32, rollouts really drawn and charged.
        num_correct: [U] int32, successes among the rows that are evidence.
        num_evidence: [U] int32, rows that count for the posterior; None means num_rollouts. Fewer where a verification
          timed out: charged, yet no evidence.
        num_tokens: [U] int32, tokens of those rollouts together, below 2^31 a call; None charges the expected ones.
          Read only where the budget is in tokens.
        release: bool, [] or [U]. True frees what these prompts still hold. False keeps it for a later part of a group
          that is cut over several steps, or for the same prompt in another batch in flight.
        """
        ...


class Allocator(NamedTuple):
    """Three pure functions on one state, as in optax."""

    init: InitFn
    allocate: AllocateFn
    update: UpdateFn


class Prompts(NamedTuple):
    """What a rule sees of the prompts considered now."""

    alpha: Array  # [P] float32
    beta: Array  # [P] float32
    rollouts: Array  # [P] int32, cumulative and reserved
    valid: Array  # [P] bool, False for padding
    cost: Array | None  # [P] float32, expected tokens a rollout; None: the budget is in rollouts
    prompt_dual: Array  # [P] float32, or [0]


# A rule: (state, prompts, budget [], key) -> (shares [P] float32 that cost the budget, state with its duals stepped,
# prompt_dual [P] of these prompts or [0]).
Rule = Callable[[AllocatorState, Prompts, Array, Array], tuple[Array, AllocatorState, Array]]


def build(
    rule: Rule,
    *,
    total_budget,
    num_epochs: int,
    min_group: int,
    max_group: int,
    prior,
    discount,
    expected_tokens=None,
    spends_all: bool = True,
    has_prompt_dual: bool = False,
) -> Allocator:
    """The allocator that draws whole groups after a rule's shares. Raises ValueError on static misuse.

    spends_all: whether a call spends its budget to the rollout; else what the rule's shares sum to, at most what is
    left. The other arguments as in `cero`.
    """
    _check_settings(total_budget, num_epochs, min_group, max_group, prior, discount, expected_tokens)
    bounds = {"min_group": min_group, "max_group": max_group}

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
            prompt_dual=jnp.full(num_prompts if has_prompt_dual else 0, -1.0, jnp.float32),
            budget_dual=jnp.full((), -1.0 if has_prompt_dual else 0.0, jnp.float32),
            ledger=ledgers.open_ledger(2**31 - 1 if tokens else total_budget),
            tokens=tokens,
            key=jax.random.key(seed),
        )

    def allocate(state: AllocatorState, prompt_ids=None, budget=None) -> tuple[Array, AllocatorState]:
        key, rule_key, draw_key = jax.random.split(state.key, 3)
        prompts = _gather(state, prompt_ids)
        num_valid = jnp.sum(prompts.valid, dtype=jnp.int32)
        if state.tokens is None:
            share, ceiling, ledger = _rollout_budget(
                state, num_valid, prompt_ids is None, budget, num_epochs, min_group
            )
        else:
            share, ceiling, ledger = _token_budget(state, num_valid, prompt_ids is None, budget, num_epochs, min_group)
        if spends_all and state.tokens is None:
            share = rounding.feasible_budget(share, num_valid, **bounds)
        shares, state, prompt_dual = rule(state, prompts, share, rule_key)
        if spends_all and state.tokens is None:
            total = share
        else:
            shares, total = _within(shares, prompts.cost, ceiling)
            total = rounding.feasible_budget(total, num_valid, **bounds)
        num_rollouts = rounding.whole_groups(draw_key, shares, prompts.valid, total, **bounds)
        if prompt_ids is None:
            reserved = state.reserved + num_rollouts
        else:
            ids = _scatter_ids(prompt_ids, state)
            reserved = state.reserved.at[ids].add(num_rollouts, mode="drop")
            if has_prompt_dual:
                prompt_dual = state.prompt_dual.at[ids].set(prompt_dual, mode="drop")
        ledger = ledger._replace(reserved=ledger.reserved + jnp.sum(num_rollouts, dtype=jnp.int32))
        return num_rollouts, state._replace(reserved=reserved, prompt_dual=prompt_dual, ledger=ledger, key=key)

    def update(
        state: AllocatorState,
        prompt_ids,
        num_rollouts,
        num_correct,
        num_evidence=None,
        num_tokens=None,
        release=True,
    ) -> AllocatorState:
        drawn = jnp.maximum(jnp.asarray(num_rollouts, jnp.int32), 0)
        evidence = drawn if num_evidence is None else jnp.clip(jnp.asarray(num_evidence, jnp.int32), 0, drawn)
        correct = jnp.clip(jnp.asarray(num_correct, jnp.int32), 0, evidence)
        paid = None if num_tokens is None else jnp.maximum(jnp.asarray(num_tokens, jnp.int32), 0)
        freed = jnp.broadcast_to(jnp.asarray(release, bool), drawn.shape)
        if prompt_ids is not None:
            ids = _scatter_ids(prompt_ids, state)
            zeros = jnp.zeros_like(state.reserved)
            drawn, evidence, correct = (zeros.at[ids].add(x, mode="drop") for x in (drawn, evidence, correct))
            paid = None if paid is None else zeros.at[ids].add(paid, mode="drop")
            freed = zeros.astype(bool).at[ids].max(freed, mode="drop")
        num_spent = jnp.sum(drawn, dtype=jnp.int32)
        keep = posterior.retention(num_spent, discount=discount, num_prompts=state.alpha.shape[0])
        reserved = jnp.where(freed, 0, jnp.maximum(state.reserved - drawn, 0))
        tokens = state.tokens
        if tokens is not None:
            if paid is None:
                paid = jnp.round(drawn.astype(jnp.float32) * tokens.mean_tokens).astype(jnp.int32)
            tokens = ledgers.charge_tokens(tokens, drawn, state.cumulative_rollouts, paid)
        spent = state.ledger.spent + num_spent
        return state._replace(
            alpha=posterior.forget(state.alpha, prior[0], keep) + correct.astype(jnp.float32),
            beta=posterior.forget(state.beta, prior[1], keep) + (evidence - correct).astype(jnp.float32),
            cumulative_rollouts=state.cumulative_rollouts + drawn,
            reserved=reserved,
            ledger=state.ledger._replace(spent=spent, reserved=jnp.sum(reserved, dtype=jnp.int32)),
            tokens=tokens,
        )

    # compiled here, so that a caller who knows nothing of jit does not pay for tracing the loops again at every call
    return Allocator(init, jax.jit(allocate), jax.jit(update))


def _gather(state: AllocatorState, prompt_ids) -> Prompts:
    """The rows of the prompts considered now; padding reads prompt 0 and is masked."""
    rollouts = state.cumulative_rollouts + state.reserved
    cost = None if state.tokens is None else state.tokens.mean_tokens
    if prompt_ids is None:
        return Prompts(state.alpha, state.beta, rollouts, jnp.ones(rollouts.shape, bool), cost, state.prompt_dual)
    ids = jnp.asarray(prompt_ids, jnp.int32)
    valid = (ids >= 0) & (ids < rollouts.shape[0])
    ids = jnp.where(valid, ids, 0)
    dual = state.prompt_dual[ids] if state.prompt_dual.shape[0] else state.prompt_dual
    return Prompts(state.alpha[ids], state.beta[ids], rollouts[ids], valid, None if cost is None else cost[ids], dual)


def _scatter_ids(prompt_ids, state: AllocatorState) -> Array:
    """Ids with every padding id at N, which a scatter drops; a negative one would count from the end."""
    ids = jnp.asarray(prompt_ids, jnp.int32)
    return jnp.where(ids < 0, state.alpha.shape[0], ids)


def _rollout_budget(state: AllocatorState, num_valid: Array, all_prompts: bool, budget, num_epochs: int, least: int):
    """Of this call: its budget and the most it may spend, [] int32 rollouts; and the ledger that has counted it."""
    ledger, left = state.ledger, jnp.maximum(state.ledger.left, 0)
    if budget is not None:
        share = jnp.clip(jnp.asarray(budget, jnp.int32), 0, left)
        return share, share, ledger
    if all_prompts:
        return ledgers.round_budget(ledger, num_epochs=num_epochs, min_group=least), left, ledger
    num_prompts = state.alpha.shape[0]
    share, ledger = ledgers.batch_budget(ledger, num_valid, num_epochs=num_epochs, num_prompts=num_prompts)
    return share, left, ledger


def _token_budget(state: AllocatorState, num_valid: Array, all_prompts: bool, budget, num_epochs: int, least: int):
    """The same in [] float32 tokens. A round pays for at least one group of the average cost."""
    assert state.tokens is not None
    left = jnp.maximum(state.tokens.left(state.reserved), 0)
    if budget is not None:
        share = jnp.clip(jnp.asarray(budget, jnp.float32), 0, left)
    else:
        share = ledgers.token_budget(state.tokens, state.reserved, num_epochs=num_epochs)
        if not all_prompts:
            share = share * num_valid.astype(jnp.float32) / state.alpha.shape[0]
        share = jnp.minimum(jnp.maximum(share, least * jnp.mean(state.tokens.mean_tokens)), left)
    return share, share, state.ledger


def _within(shares: Array, cost: Array | None, ceiling: Array) -> tuple[Array, Array]:
    """Shares scaled down to cost at most the ceiling, and the [] int32 rollouts they sum to."""
    wanted = jnp.sum(shares if cost is None else shares * cost)
    ceiling = ceiling.astype(jnp.float32)
    shares = shares * jnp.minimum(1, ceiling / jnp.maximum(wanted, 1e-6))
    whole = jnp.floor(shares)  # the whole parts are summed as integers: a float32 sum is rough beyond 2^24
    rest = jnp.sum(shares - whole)
    return shares, jnp.sum(whole.astype(jnp.int32)) + jnp.floor(rest + 1e-3).astype(jnp.int32)


def _check_settings(total_budget, num_epochs, min_group, max_group, prior, discount, expected_tokens) -> None:
    """Raises ValueError, naming the values, on settings known to be wrong before tracing."""
    if not 2 <= min_group <= max_group:
        raise ValueError(f"min_group={min_group} must lie in 2..max_group={max_group}: a group of one has no advantage")
    if num_epochs < 1:
        raise ValueError(f"num_epochs={num_epochs} must be at least 1")
    if expected_tokens is not None and not (isinstance(total_budget, int) and 0 <= total_budget < 2**63):
        raise ValueError(f"total_budget={total_budget} tokens must be a Python integer in 0..2^63 - 1")
    if expected_tokens is None and not all(0 <= x < 2**31 for x in known(total_budget)):
        raise ValueError(f"total_budget={total_budget} rollouts must lie in 0..2^31 - 1")
    if not all(x > 0 for x in known(expected_tokens)):
        raise ValueError(f"expected_tokens={expected_tokens} a rollout must be positive")
    if len(prior) != 2 or not all(x > 0 for x in known(*prior)):
        raise ValueError(f"prior={prior} must be two positive numbers, Beta(alpha, beta)")
    if not all(0 < x <= 1 for x in known(discount)):
        raise ValueError(f"discount={discount} must lie in (0, 1]; 1 never forgets")


def known(*values) -> list[float]:
    """Those values that are plain numbers now, and not traced."""
    return [float(x) for x in values if isinstance(x, numbers.Real)]


def diagnostics(state: AllocatorState) -> dict[str, Array]:
    """Scalars for logging: the ledger in rollouts (and in tokens), the price, and what the posterior says."""
    mean = state.alpha / (state.alpha + state.beta)
    scalars = {
        "total": state.ledger.total,
        "spent": state.ledger.spent,
        "reserved": state.ledger.reserved,
        "left": state.ledger.left,
        "budget_dual": state.budget_dual,
        "success_rate": jnp.mean(mean),
        "expected_variance": jnp.mean(posterior.expected_variance(state.alpha, state.beta)),
        "visited_share": jnp.mean((state.cumulative_rollouts > 0).astype(jnp.float32)),
        "max_cumulative_rollouts": jnp.max(state.cumulative_rollouts),
    }
    if state.tokens is not None:
        left = state.tokens.left(state.reserved)
        scalars["tokens_total"] = ledgers.as_float(state.tokens.total)
        scalars["tokens_spent"] = ledgers.as_float(state.tokens.spent)
        scalars["tokens_left"] = jnp.maximum(left, 0)
        scalars["tokens_overshoot"] = jnp.maximum(-left, 0)
    return scalars
