"""The state and the contract that every allocator shares: what it holds, what it is asked, what a rule adds to it.

Letters: N prompts of the data, P prompts of one call of `allocate`, U visits of one call of `update`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cero_jax.allocator.checks import check_pass_rates
from cero_jax.allocator.ledger import Ledger, TokenLedger, as_float
from cero_jax.allocator.posterior import expected_variance


class AllocatorState(NamedTuple):
    """Everything an allocator knows: a few numbers a prompt. Checkpoint it whole."""

    alpha: Array  # [N] float32, prior + decayed successes
    beta: Array  # [N] float32, prior + decayed failures
    cumulative_rollouts: Array  # [N] int32, drawn and settled
    reserved: Array  # [N] int32, handed out by `allocate`, not settled yet
    budget_dual: Array  # [] float32, utility a rollout: what one more rollout of budget would add; 0: the rule has none
    rule_state: Any  # what the rule itself keeps from call to call, a pytree; () where it keeps nothing
    ledger: Ledger  # scalars: the budget of the whole run, in rollouts
    tokens: TokenLedger | None  # the budget in tokens, where that is what is fixed
    key: Array  # [] PRNG key: breaks ties and draws fractions


class InitFn(Protocol):
    """Makes the state of a run."""

    def __call__(self, num_prompts: int, seed: int | Array = 0) -> AllocatorState:
        """The state of a run before any rollout.

        Args:
            num_prompts: N, prompts of the data; static.
            seed: of the PRNG key in the state, which breaks ties; may be traced.

        Returns:
            The state, a NamedTuple of arrays: pass it to `allocate`.

        Raises:
            ValueError: num_prompts is less than 1.
        """
        ...


class AllocateFn(Protocol):
    """Hands out rollouts."""

    def __call__(
        self, state: AllocatorState, prompt_ids: ArrayLike | None = None, budget: ArrayLike | None = None
    ) -> tuple[Array, AllocatorState]:
        """How many rollouts each prompt gets now: 0, or a group in [min_group, max_group], a multiple of multiple_of.

        Reserves them.
        Compiled already; composes with jit, vmap and scan. The sum is exact where it is feasible, otherwise the closest
        feasible one below, and the rest is not lost. For all N with budget None, all zeros end the run.

        Args:
            state: as `init`, `allocate` or `update` returned it last.
            prompt_ids: [P] int, one id a prompt of this call, distinct; ids outside [0, N) are padding. None: all N.
            budget: [] int, rollouts (or tokens) of this call, clipped to what is left. None: this epoch's share.

        Returns:
            ([P] int32 rollouts of each prompt, the state that holds them in reserve). The share of an epoch is what is
            left / epochs left; a batch of P prompts gets P / N of total_budget / num_epochs.

        Raises:
            ValueError: prompt_ids, where they can be read, are no integers or name a prompt twice.
        """
        ...


class UpdateFn(Protocol):
    """Takes in what was drawn."""

    def __call__(
        self,
        state: AllocatorState,
        num_rollouts: ArrayLike,
        num_correct: ArrayLike,
        *,
        prompt_ids: ArrayLike | None = None,
        num_evidence: ArrayLike | None = None,
        num_tokens: ArrayLike | None = None,
        release: ArrayLike = True,
    ) -> AllocatorState:
        """Takes in rollouts that were drawn: the posterior, the cumulative counts and the ledger move.

        Compiled already; composes with jit, vmap and scan. What `allocate` handed out may be settled in several parts.

        Args:
            state: as `allocate` or `update` returned it last.
            num_rollouts: [U] int, one number a prompt: rollouts really drawn, and charged.
            num_correct: [U] int, successes among those rollouts that are evidence.
            prompt_ids: [U] int, distinct; ids outside [0, N) are padding and ignored. None: all N, in order.
            num_evidence: [U] int, rollouts that count for the posterior. None: all; fewer where a verifier timed out.
            num_tokens: [U] int, tokens of a prompt's rollouts in sum, for a budget in tokens. None: their running mean.
            release: bool, [] or [U]: free what these prompts still have in reserve. False keeps it for a later part.

        Returns:
            The state that has taken them in.

        Raises:
            ValueError: the counts, where they can be read, are no integers, negative, of another shape, or
                break num_correct <= num_evidence <= num_rollouts; or an id stands twice.
        """
        ...


class Allocator(NamedTuple):
    """Three pure functions on one state, as in optax."""

    init: InitFn
    allocate: AllocateFn
    update: UpdateFn


class Candidates(NamedTuple):
    """The prompts of one call of `allocate`, as a rule sees them."""

    prompt_ids: Array | None  # [P] int32, their places in the state, N for padding; None: all N prompts, in order
    alpha: Array  # [P] float32
    beta: Array  # [P] float32
    rollouts: Array  # [P] int32, cumulative and reserved
    valid: Array  # [P] bool, False for padding
    cost: Array | None  # [P] float32, expected tokens a rollout; None: the budget is in rollouts
    limit: (
        Array  # [] int32 rollouts, or float32 tokens: the most that this call may cost, where a rule may pass its share
    )

    def take(self, per_prompt: Array) -> Array:
        """[P] of an array [N] that the rule keeps. Padding reads prompt 0."""
        return per_prompt if self.prompt_ids is None else per_prompt[jnp.where(self.valid, self.prompt_ids, 0)]

    def put(self, per_prompt: Array, values: Array) -> Array:
        """The array [N] with these prompts' values [P] in it. Padding is dropped."""
        return values if self.prompt_ids is None else per_prompt.at[self.prompt_ids].set(values, mode="drop")


class Rule(Protocol):
    """How the budget of one call is shared among its prompts: all that makes one allocator differ from another."""

    def __call__(
        self, state: AllocatorState, candidates: Candidates, budget: Array, key: Array, /
    ) -> tuple[Array, AllocatorState]:
        """Real shares; `build_allocator` makes whole groups of them, and an exact sum. Must be traceable.

        Args:
            state: of the whole run.
            candidates: the P prompts to share among.
            budget: [] int32 rollouts, or [] float32 tokens where candidates.cost is given.
            key: [] PRNG key of this call, for a rule that draws.

        Returns:
            ([P] float32 shares in rollouts, 0 for padding, whose sum, or cost, is the budget; the state, with another
            rule_state and budget_dual where the rule keeps anything or has a price).
        """
        ...


def with_pass_rates(state: AllocatorState, pass_rates: ArrayLike, num_rollouts: ArrayLike) -> AllocatorState:
    """The state of a run that is about to begin, knowing how often another model was right on each prompt.

    A pass rate counts like so many rollouts that were drawn before and are not charged: it fades as rollouts are spent,
    as other evidence does, and the prior fitted to the population sees it.

    Args:
        state: as `init` returned it.
        pass_rates: [N] float, share of the other model's rollouts that was right, in [0, 1]; NaN where it is not known.
        num_rollouts: [] or [N] float, what a rate is worth in rollouts of the policy that is trained: at most as many
            as it was measured with, fewer where the other model is another.

    Returns:
        The state with the rates in its posterior.

    Raises:
        ValueError: what can be read is out of its range, or pass_rates has another shape than [N].
    """
    check_pass_rates(pass_rates, num_rollouts, state.alpha.shape[0])
    rates = jnp.asarray(pass_rates, jnp.float32)
    worth = jnp.where(jnp.isnan(rates), 0.0, jnp.asarray(num_rollouts, jnp.float32))
    successes = worth * jnp.nan_to_num(rates)
    return state._replace(alpha=state.alpha + successes, beta=state.beta + (worth - successes))


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
        "expected_variance": jnp.mean(expected_variance(state.alpha, state.beta)),
        "visited_share": jnp.mean((state.cumulative_rollouts > 0).astype(jnp.float32)),
        "max_cumulative_rollouts": jnp.max(state.cumulative_rollouts),
    }
    if state.tokens is not None:
        left = state.tokens.left(state.reserved)
        scalars["tokens_total"] = as_float(state.tokens.total)
        scalars["tokens_spent"] = as_float(state.tokens.spent)
        scalars["tokens_left"] = jnp.maximum(left, 0)
        scalars["tokens_overshoot"] = jnp.maximum(-left, 0)
    return scalars
