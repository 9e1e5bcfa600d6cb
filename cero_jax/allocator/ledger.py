"""The ledger of the run's one budget, in exact integers, and the budget of a round or of a batch.

Time is rollouts, not calls: which round a run is in follows from what is spent and reserved, so a crash, a resume or a
batch in flight cannot lose or repeat a round.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Ledger(NamedTuple):
    """Where the run's budget is. At all times spent + reserved + left = total."""

    total: Array  # [] int32, rollouts of the whole run
    spent: Array  # [] int32, rollouts drawn and settled by `update`
    reserved: Array  # [] int32, rollouts handed out by `allocate` and not settled yet
    offered: Array  # [] int32 in [0, N), prompts offered in batches since the stream's pass began

    @property
    def left(self) -> Array:
        """[] int32, rollouts that nobody holds; negative only where a caller drew more than it was given."""
        return self.total - self.spent - self.reserved


def open_ledger(total_budget) -> Ledger:
    """A ledger with everything left. total_budget: [] rollouts below 2^31."""
    return Ledger(jnp.asarray(total_budget, jnp.int32), *(jnp.zeros((), jnp.int32) for _ in range(3)))


def round_budget(ledger: Ledger, *, num_epochs: int, min_group: int) -> Array:
    """[] int32: what is left / rounds left, the remainder to the first rounds; at least one group.

    The whole run is num_epochs rounds of total // num_epochs, the first total % num_epochs of them one larger. The
    round is the one whose beginning lies nearest to what is spent and reserved: a few rollouts that were not drawn do
    not make a round begin again.
    """
    small, larger = ledger.total // num_epochs, ledger.total % num_epochs
    committed = jnp.maximum(ledger.spent + ledger.reserved, 0)
    after = committed - larger * (small + 1)  # beyond the larger rounds
    epoch = jnp.where(after < 0, _nearest(committed, small + 1), larger + _nearest(jnp.maximum(after, 0), small))
    rounds_left = num_epochs - jnp.clip(epoch, 0, num_epochs - 1)
    left = jnp.maximum(ledger.left, 0)
    share = left // rounds_left + (left % rounds_left > 0).astype(jnp.int32)
    return jnp.minimum(jnp.maximum(share, min_group), left)


def _nearest(x: Array, size: Array) -> Array:
    """The integer nearest to x / size."""
    whole, rest = x // jnp.maximum(size, 1), x % jnp.maximum(size, 1)
    return whole + (rest >= size - rest).astype(jnp.int32)


def batch_budget(ledger: Ledger, num_offered: Array, *, num_epochs: int, num_prompts: int) -> tuple[Array, Ledger]:
    """[] int32: epoch_budget * P / N for the next P prompts of a stream, and the ledger that has counted them.

    Rounded cumulatively: the shares of a pass over all N prompts sum to total // num_epochs exactly.
    """
    epoch_budget = ledger.total // num_epochs
    before = ledger.offered
    after = before + num_offered
    share = _scaled(epoch_budget, after, num_prompts) - _scaled(epoch_budget, before, num_prompts)
    share = jnp.minimum(share, jnp.maximum(ledger.left, 0))
    return share, ledger._replace(offered=after % num_prompts)


def _scaled(a: Array, b: Array, n: int) -> Array:
    """floor(a b / n) in exact integers although a b passes 2^32: long multiplication, one bit of b at a time."""
    whole, rest = (a // n).astype(jnp.uint32), (a % n).astype(jnp.uint32)
    b = b.astype(jnp.uint32)

    def bit(i, carry):
        quotient, remainder = carry
        remainder = 2 * remainder + ((b >> (31 - i)) & 1) * rest  # below 3 n, and n < 2^30
        return 2 * quotient + remainder // n, remainder % n

    quotient, _ = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), bit, (jnp.uint32(0), jnp.uint32(0)))
    return (whole * b + quotient).astype(jnp.int32)
