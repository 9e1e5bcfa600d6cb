"""The ledger of the run's one budget, in exact integers, and the budget of an epoch or of a batch.

Time is rollouts, not calls: which epoch a run is in follows from what is spent and reserved, so a crash, a resume or a
batch in flight cannot lose or repeat an epoch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MOST = 2**31 - 1  # that a count of rollouts holds


class Ledger(NamedTuple):
    """Where the run's budget of rollouts is. At all times spent + reserved + left = total."""

    total: Array  # [] int32, rollouts of the whole run; 2^31 - 1 where the budget is in tokens
    spent: Array  # [] int32, rollouts drawn and settled by `update`; stays at 2^31 - 1 where more were
    reserved: Array  # [] int32, rollouts handed out by `allocate` and not settled yet
    offered: Array  # [] int32, prompts offered in batches, counted anew where their shares come out whole: N, or N unit

    @property
    def left(self) -> Array:
        """[] int32, rollouts that nobody holds; negative only where a caller drew more than it was given."""
        return self.total - self.spent - self.reserved


class TokenLedger(NamedTuple):
    """A budget in tokens: rollouts are what people count, tokens are what they pay.

    A count is two 32-bit words, high and low: half a million rollouts of 4,096 tokens pass 2^31.
    """

    total: Array  # [2] uint32, tokens of the whole run
    spent: Array  # [2] uint32, tokens really drawn
    mean_tokens: Array  # [N] float32, tokens of a rollout: running mean, from `expected_tokens` on

    def left(self, reserved: Array) -> Array:
        """[] float32, tokens left after the expected cost of `reserved` [N] int32 rollouts; negative: the overshoot."""
        return _difference(self.total, self.spent) - jnp.sum(reserved.astype(jnp.float32) * self.mean_tokens)


def add_counts(a: Array, b: Array) -> Array:
    """The sum of two int32 counts >= 0; 2^31 - 1 where that is more than an int32 holds."""
    total = a + b
    return jnp.where(total < a, MOST, total)


def open_ledger(total_budget) -> Ledger:
    """A ledger with everything left. total_budget: [] rollouts below 2^31."""
    return Ledger(jnp.asarray(total_budget, jnp.int32), *(jnp.zeros((), jnp.int32) for _ in range(3)))


def open_token_ledger(total_budget, num_prompts: int, expected_tokens) -> TokenLedger:
    """A token ledger with everything left. total_budget: tokens below 2^63, a Python integer."""
    total = jnp.asarray(np.array([total_budget >> 32, total_budget & 0xFFFFFFFF], np.uint32))
    mean = jnp.full(num_prompts, jnp.asarray(expected_tokens, jnp.float32))
    return TokenLedger(total, jnp.zeros(2, jnp.uint32), mean)


def charge_tokens(ledger: TokenLedger, num_rollouts: Array, rollouts_before: Array, num_tokens: Array) -> TokenLedger:
    """Charges tokens really drawn and moves the running means. All [N] int32; one call's tokens sum below 2^31.

    The expected cost that the mean starts from counts as one rollout.
    """
    low = ledger.spent[1] + jnp.sum(num_tokens, dtype=jnp.int32).astype(jnp.uint32)
    high = ledger.spent[0] + (low < ledger.spent[1]).astype(jnp.uint32)
    surprise = num_tokens.astype(jnp.float32) - num_rollouts.astype(jnp.float32) * ledger.mean_tokens
    seen = add_counts(add_counts(rollouts_before, num_rollouts), jnp.int32(1))
    mean = ledger.mean_tokens + surprise / seen.astype(jnp.float32)
    return ledger._replace(spent=jnp.stack([high, low]), mean_tokens=mean)


def token_budget(ledger: TokenLedger, reserved: Array, *, num_epochs: int) -> Array:
    """[] float32, tokens of the next epoch: what is left / epochs left."""
    left = jnp.maximum(ledger.left(reserved), 0)
    size = jnp.maximum(as_float(ledger.total) / num_epochs, 1)
    epoch = jnp.clip(jnp.round((as_float(ledger.total) - left) / size), 0, num_epochs - 1)
    return left / (num_epochs - epoch)


def as_float(words: Array) -> Array:
    """[] float32, the count that two 32-bit words hold, rounded."""
    return words[0].astype(jnp.float32) * 2.0**32 + words[1].astype(jnp.float32)


def _difference(a: Array, b: Array) -> Array:
    """[] float32, a - b: subtracted in integers and rounded once, so that a small rest of a large budget is right."""
    low, high = a[1] - b[1], a[0] - b[0] - (a[1] < b[1]).astype(jnp.uint32)
    negative = high >> 31 == 1
    flipped = jnp.stack([~high + (low == 0).astype(jnp.uint32), ~low + 1])
    return jnp.where(negative, -as_float(flipped), as_float(jnp.stack([high, low])))


def epoch_budget(ledger: Ledger, *, num_epochs: int, min_group: int, unit: int = 1) -> Array:
    """[] int32: what is left / epochs left, the remainder to the first epochs; at least one group.

    The whole run is num_epochs epochs of total // num_epochs, the first total % num_epochs of them one larger. The
    epoch is the one whose beginning lies nearest to what is spent and reserved: a few rollouts that were not drawn do
    not make an epoch begin again. All of it is counted in units of `unit` rollouts where groups have no other sizes, so
    that every epoch's budget can be handed out and num_epochs epochs are enough; less than one unit stays at the end.
    """
    left, total = jnp.maximum(ledger.left, 0) // unit, ledger.total // unit
    small, larger = total // num_epochs, total % num_epochs
    committed = total - jnp.minimum(left, total)
    after = committed - larger * (small + 1)  # beyond the larger epochs
    epoch = jnp.where(after < 0, _nearest(committed, small + 1), larger + _nearest(jnp.maximum(after, 0), small))
    epochs_left = num_epochs - jnp.clip(epoch, 0, num_epochs - 1)
    share = left // epochs_left + (left % epochs_left > 0).astype(jnp.int32)
    return unit * jnp.minimum(jnp.maximum(share, min_group // unit), left)


def _nearest(x: Array, size: Array) -> Array:
    """The integer nearest to x / size."""
    whole, rest = x // jnp.maximum(size, 1), x % jnp.maximum(size, 1)
    return whole + (rest >= size - rest).astype(jnp.int32)


def batch_budget(
    ledger: Ledger, num_offered: Array, *, num_epochs: int, num_prompts: int, unit: int = 1
) -> tuple[Array, Ledger]:
    """[] int32: total / num_epochs * P / N for the next P prompts of a stream, and the ledger that has counted them.

    Rounded cumulatively to multiples of `unit`, so nothing is lost: the shares of all N prompts, offered `unit` times,
    sum to unit (total // num_epochs) exactly. Raises ValueError where unit num_prompts is not below 2^30.
    """
    of_epoch, span = ledger.total // num_epochs, unit * num_prompts
    if span >= 2**30:
        raise ValueError(
            f"batches of {num_prompts:,} prompts whose groups are multiples of {unit}: the product must be below 2^30; "
            "take smaller groups, or name the budget of each call"
        )
    before = ledger.offered
    after = before + num_offered
    units, left = _scaled(of_epoch, after, span) - _scaled(of_epoch, before, span), jnp.maximum(ledger.left, 0)
    share = jnp.where(units > left // unit, left, unit * units)  # their product may pass 2^31
    return share, ledger._replace(offered=after % span)


def _scaled(a: Array, b: Array, n: int) -> Array:
    """floor(a b / n) in exact integers although a b passes 2^32: long multiplication, one bit of b at a time."""
    whole, rest = (a // n).astype(jnp.uint32), (a % n).astype(jnp.uint32)
    b = b.astype(jnp.uint32)

    def bit(i, carry):
        quotient, remainder = carry
        remainder = 2 * remainder + ((b >> (31 - i)) & 1) * rest  # below 3 n, and n < 2^30, as N unit is
        return 2 * quotient + remainder // n, remainder % n

    quotient, _ = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), bit, (jnp.uint32(0), jnp.uint32(0)))
    return (whole * b + quotient).astype(jnp.int32)
