"""The state and the contract that every allocator shares; an allocator adds only its rule for the shares."""

import numbers
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from cero_jax.allocator import ledger as ledgers
from cero_jax.allocator import posterior, rounding
from cero_jax.allocator.ledger import Ledger


class AllocatorState(NamedTuple):
    """Everything an allocator knows: a few numbers a prompt. Checkpoint it whole."""

    alpha: Array  # [N] float32, prior + decayed successes
    beta: Array  # [N] float32, prior + decayed failures
    cumulative_rollouts: Array  # [N] int32, drawn and settled
    reserved: Array  # [N] int32, handed out by `allocate`, not settled yet
    prompt_dual: Array  # [N] float32, utility a rollout, in `cero_dual`; [0] elsewhere
    budget_dual: Array  # [] float32, utility a rollout: what one more rollout of budget would add
    ledger: Ledger  # scalars: the budget of the whole run
    key: Array  # [] PRNG key: breaks ties and draws fractions


class InitFn(Protocol):
    """Makes the state of a run."""

    def __call__(self, num_prompts: int, seed=0) -> AllocatorState:
        """The state before any rollout. num_prompts: N, static. seed: int, may be traced."""
        ...


class AllocateFn(Protocol):
    """Hands out rollouts."""

    def __call__(self, state: AllocatorState, prompt_ids=None, budget=None) -> tuple[Array, AllocatorState]:
        """Rollouts for each prompt, reserved in the ledger: n is 0 or in [min_group, max_group].

        prompt_ids: [P] int32, distinct; ids outside [0, N) are padding and get 0. None means all N, the usual call.
        budget: [] int32, rollouts of this call, may be traced; None means, for all N, what is left / rounds left, and
          for a batch its share of an epoch's budget. Always clipped to what is left. The sum is exact where it is
          feasible and otherwise the closest feasible one below; the rest stays in the ledger.
        Returns ([P] int32, state). For all N with budget None, all zeros end the run.
        """
        ...


class UpdateFn(Protocol):
    """Takes in what was drawn."""

    def __call__(
        self, state: AllocatorState, prompt_ids, num_rollouts, num_correct, num_evidence=None, release=True
    ) -> AllocatorState:
        """Settles rollouts that were drawn: the posterior, the cumulative counts, the ledger. May be called in parts.

        prompt_ids: [U] int32, distinct; ids outside [0, N) are padding and ignored. None means all N, in order.
        num_rollouts: [U] int32, rollouts really drawn and charged.
        num_correct: [U] int32, successes among the rows that are evidence.
        num_evidence: [U] int32, rows that count for the posterior; None means num_rollouts. Fewer where a verification
          timed out: charged, yet no evidence.
        release: bool, [] or [U]. True frees what these prompts still hold. False keeps it for a later part of a group
          that is cut over several steps, while other batches are in flight.
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
    prompt_dual: Array  # [P] float32, or [0]


# A rule: (state, prompts, budget [], key) -> (shares [P] float32 that sum to the budget, state with its duals stepped).
Rule = Callable[[AllocatorState, Prompts, Array, Array], tuple[Array, AllocatorState]]


def build(rule: Rule, *, total_budget, num_epochs: int, min_group: int, max_group: int, prior, discount) -> Allocator:
    """The allocator that draws whole groups after a rule's shares. Raises ValueError on static misuse."""
    check_settings(total_budget, num_epochs, min_group, max_group, prior, discount)

    def init(num_prompts: int, seed=0) -> AllocatorState:
        if num_prompts < 1:
            raise ValueError(f"num_prompts={num_prompts}: an allocator needs at least one prompt")
        alpha, beta = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), (num_prompts,)) for x in prior)
        zeros = jnp.zeros(num_prompts, jnp.int32)
        dual = jnp.zeros((), jnp.float32)
        none = jnp.zeros(0, jnp.float32)
        ledger = ledgers.open_ledger(total_budget)
        return AllocatorState(alpha, beta, zeros, zeros, none, dual, ledger, jax.random.key(seed))

    def allocate(state: AllocatorState, prompt_ids=None, budget=None) -> tuple[Array, AllocatorState]:
        key, rule_key, draw_key = jax.random.split(state.key, 3)
        ledger = state.ledger
        prompts = _gather(state, prompt_ids)
        num_valid = jnp.sum(prompts.valid, dtype=jnp.int32)
        if budget is not None:
            budget = jnp.clip(jnp.asarray(budget, jnp.int32), 0, jnp.maximum(ledger.left, 0))
        elif prompt_ids is None:
            budget = ledgers.round_budget(ledger, num_epochs=num_epochs, min_group=min_group)
        else:
            num_prompts = state.alpha.shape[0]
            budget, ledger = ledgers.batch_budget(ledger, num_valid, num_epochs=num_epochs, num_prompts=num_prompts)
        bounds = {"min_group": min_group, "max_group": max_group}
        budget = rounding.feasible_budget(budget, num_valid, **bounds)
        shares, state = rule(state, prompts, budget, rule_key)
        num_rollouts = rounding.whole_groups(draw_key, shares, prompts.valid, budget, **bounds)
        if prompt_ids is None:
            reserved = state.reserved + num_rollouts
        else:
            reserved = state.reserved.at[_scatter_ids(prompt_ids, state)].add(num_rollouts, mode="drop")
        ledger = ledger._replace(reserved=ledger.reserved + jnp.sum(num_rollouts, dtype=jnp.int32))
        return num_rollouts, state._replace(reserved=reserved, ledger=ledger, key=key)

    def update(
        state: AllocatorState, prompt_ids, num_rollouts, num_correct, num_evidence=None, release=True
    ) -> AllocatorState:
        drawn = jnp.maximum(jnp.asarray(num_rollouts, jnp.int32), 0)
        evidence = drawn if num_evidence is None else jnp.clip(jnp.asarray(num_evidence, jnp.int32), 0, drawn)
        correct = jnp.clip(jnp.asarray(num_correct, jnp.int32), 0, evidence)
        freed = jnp.broadcast_to(jnp.asarray(release, bool), drawn.shape)
        if prompt_ids is not None:
            ids = _scatter_ids(prompt_ids, state)
            zeros = jnp.zeros_like(state.reserved)
            drawn, evidence, correct = (zeros.at[ids].add(x, mode="drop") for x in (drawn, evidence, correct))
            freed = zeros.astype(bool).at[ids].max(freed, mode="drop")
        num_spent = jnp.sum(drawn, dtype=jnp.int32)
        keep = posterior.retention(num_spent, discount=discount, num_prompts=state.alpha.shape[0])
        reserved = jnp.where(freed, 0, jnp.maximum(state.reserved - drawn, 0))
        return state._replace(
            alpha=posterior.forget(state.alpha, prior[0], keep) + correct.astype(jnp.float32),
            beta=posterior.forget(state.beta, prior[1], keep) + (evidence - correct).astype(jnp.float32),
            cumulative_rollouts=state.cumulative_rollouts + drawn,
            reserved=reserved,
            ledger=state.ledger._replace(
                spent=state.ledger.spent + num_spent, reserved=jnp.sum(reserved, dtype=jnp.int32)
            ),
        )

    return Allocator(init, allocate, update)


def _gather(state: AllocatorState, prompt_ids) -> Prompts:
    """The rows of the prompts considered now; padding reads prompt 0 and is masked."""
    rollouts = state.cumulative_rollouts + state.reserved
    if prompt_ids is None:
        return Prompts(state.alpha, state.beta, rollouts, jnp.ones(rollouts.shape, bool), state.prompt_dual)
    ids = jnp.asarray(prompt_ids, jnp.int32)
    valid = (ids >= 0) & (ids < rollouts.shape[0])
    ids = jnp.where(valid, ids, 0)
    dual = state.prompt_dual[ids] if state.prompt_dual.shape[0] else state.prompt_dual
    return Prompts(state.alpha[ids], state.beta[ids], rollouts[ids], valid, dual)


def _scatter_ids(prompt_ids, state: AllocatorState) -> Array:
    """Ids with every padding id at N, which a scatter drops; a negative one would count from the end."""
    ids = jnp.asarray(prompt_ids, jnp.int32)
    return jnp.where(ids < 0, state.alpha.shape[0], ids)


def check_settings(total_budget, num_epochs, min_group, max_group, prior, discount) -> None:
    """Raises ValueError, naming the values, on settings known to be wrong before tracing."""
    if not 2 <= min_group <= max_group:
        raise ValueError(f"min_group={min_group} must lie in 2..max_group={max_group}: a group of one has no advantage")
    if num_epochs < 1:
        raise ValueError(f"num_epochs={num_epochs} must be at least 1")
    if not all(0 <= x < 2**31 for x in known(total_budget)):
        raise ValueError(f"total_budget={total_budget} rollouts must lie in 0..2^31 - 1")
    if len(prior) != 2 or not all(x > 0 for x in known(*prior)):
        raise ValueError(f"prior={prior} must be two positive numbers, Beta(alpha, beta)")
    if not all(0 < x <= 1 for x in known(discount)):
        raise ValueError(f"discount={discount} must lie in (0, 1]; 1 never forgets")


def known(*values) -> list[float]:
    """Those values that are plain numbers now, and not traced."""
    return [float(x) for x in values if isinstance(x, numbers.Real)]


def diagnostics(state: AllocatorState) -> dict[str, Array]:
    """Scalars for logging: the ledger in rollouts, the price, and what the posterior says of the prompts."""
    mean = state.alpha / (state.alpha + state.beta)
    visited = state.cumulative_rollouts > 0
    return {
        "total": state.ledger.total,
        "spent": state.ledger.spent,
        "reserved": state.ledger.reserved,
        "left": state.ledger.left,
        "budget_dual": state.budget_dual,
        "success_rate": jnp.mean(mean),
        "expected_variance": jnp.mean(posterior.expected_variance(state.alpha, state.beta)),
        "visited_share": jnp.mean(visited.astype(jnp.float32)),
        "max_cumulative_rollouts": jnp.max(state.cumulative_rollouts),
    }
