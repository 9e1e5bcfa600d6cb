"""Real shares to whole groups: exact integers, no sort over the prompts, fair whatever a prompt's place in the file."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

_CHUNKS = 256  # of the file, whose running sums a CPU takes side by side


def feasible_budget(
    budget: Array, num_prompts: Array, *, min_group: int, max_group: int, multiple_of: int = 1
) -> Array:
    """The largest sum <= budget of group sizes that are 0 or in [min_group, max_group], over num_prompts prompts.

    With G groups every sum in [min_group G, max_group G] can be had, and the largest G that the budget pays for reaches
    furthest. Sizes are multiples of multiple_of, which divides both bounds. budget, num_prompts: [] int32. Returns []
    int32.
    """
    if multiple_of > 1:
        bounds = {"min_group": min_group // multiple_of, "max_group": max_group // multiple_of}
        return multiple_of * feasible_budget(budget // multiple_of, num_prompts, **bounds)
    groups = jnp.minimum(budget // min_group, num_prompts)
    enough = groups > budget // max_group  # max_group * groups may pass 2^31
    return jnp.where(enough, budget, groups * max_group)


def whole_groups(
    key, shares: Array, valid: Array, budget: Array, *, min_group: int, max_group: int, multiple_of: int = 1
) -> Array:
    """Integers n in {0} or [min_group, max_group] that sum to the budget, n_i equal to the share in expectation.

    A share under min_group becomes a group of min_group with the matching probability; a larger one is rounded up with
    the probability of its fraction; both by systematic sampling, whose sum is fixed. What the small groups' rounding
    leaves over (a few rollouts) is spread over those fractions, and what they cannot take over groups drawn by the key.

    key: PRNG key, consumed. shares: [P] float32 in [0, max_group], summing to about the budget. valid: [P] bool.
    budget: [] int32, a feasible one. multiple_of: divides every size, and both bounds. Returns [P] int32.
    """
    if multiple_of > 1:  # rollouts come in blocks
        bounds = {"min_group": min_group // multiple_of, "max_group": max_group // multiple_of}
        return multiple_of * whole_groups(key, shares / multiple_of, valid, budget // multiple_of, **bounds)
    keys = jax.random.split(key, 5)
    fewest, most = -(-budget // max_group), jnp.minimum(budget // min_group, jnp.sum(valid, dtype=jnp.int32))
    large = valid & (shares >= min_group)
    chance = jnp.where(valid & ~large, shares / min_group, 0.0)
    num_large, expected = jnp.sum(large, dtype=jnp.int32), jnp.sum(chance)
    num_small = jnp.floor(expected + jax.random.uniform(keys[0])).astype(jnp.int32)
    num_small = jnp.clip(num_small, fewest - num_large, most - num_large)
    chance = chance * (jnp.maximum(num_small, 0).astype(jnp.float32) / jnp.maximum(expected, 1e-30))
    chosen = large | _systematic(keys[1], chance)
    chosen = _exactly(keys[2], chosen, valid, shares > 0, large, num_large + num_small)

    size = jnp.clip(shares, min_group, max_group)
    floor = jnp.floor(size)
    whole = jnp.where(chosen, floor.astype(jnp.int32), 0)
    missing = (budget - jnp.sum(whole)).astype(jnp.float32)
    extra = _systematic(keys[3], _tilted(jnp.where(chosen, size - floor, 0.0), chosen & (whole < max_group), missing))
    num_rollouts = whole + extra.astype(jnp.int32)
    return _balance(keys[4], num_rollouts, budget, min_group=min_group, max_group=max_group)


def choose(key, eligible: Array, count: Array) -> Array:
    """[P] bool, `count` of the eligible ones (all, if there are fewer): a run of neighbours from a keyed start."""
    total = jnp.sum(eligible, dtype=jnp.int32)
    start = jax.random.randint(key, (), 0, jnp.maximum(total, 1))

    def within(place, one):  # from the start on, and around the end
        return (one > 0) & (jnp.where(place < 0, place + total, place) < count)

    return _by_running_sum(eligible.astype(jnp.int32), -1 - start, within)


def _systematic(key, chance: Array) -> Array:
    """[P] bool with P(hit) = chance in [0, 1] and the number of hits within one of the sum of the chances.

    Chances are 32-bit fractions and their running sum wraps around, so it is exact at any length; a float32 running sum
    is not. An element is hit where the sum, from a keyed start, passes a whole number.
    """
    fraction = (jnp.minimum(chance, 1 - 2**-24) * 2.0**32).astype(jnp.uint32)
    return _by_running_sum(fraction, jax.random.bits(key, dtype=jnp.uint32), lambda position, x: position < x)


def _by_running_sum(x: Array, start: Array, test: Callable[[Array, Array], Array]) -> Array:
    """[P] bool, test(start + inclusive running sum, x) of integers x [P]; the sum wraps around."""
    # by chunks a CPU is nearly twice as fast; elsewhere thousands of steps in a row would be slow
    return jax.lax.platform_dependent(
        x,
        start,
        cpu=partial(_by_chunks, test=test),
        default=lambda x, start: test(jnp.cumsum(x, dtype=x.dtype) + start, x),
    )


def _by_chunks(x: Array, start: Array, test: Callable[[Array, Array], Array]) -> Array:
    """The same, with the sums of all chunks a step further at once, and tested where they arise."""
    length = -(-x.shape[0] // _CHUNKS)
    chunks = jnp.pad(x, (0, length * _CHUNKS - x.shape[0])).reshape(_CHUNKS, length)
    whole = jnp.sum(chunks, axis=1, dtype=x.dtype)
    before = jnp.cumsum(whole, dtype=x.dtype) - whole + start

    def add(above, each):
        here = above + each
        return here, test(here, each)

    return jax.lax.scan(add, before, chunks.T)[1].T.reshape(-1)[: x.shape[0]]


def _tilted(fraction: Array, room: Array, total: Array) -> Array:
    """The fractions [P] in [0, 1) of the prompts with `room`, all scaled towards 0 or towards 1 to sum to the total."""
    rest = jnp.where(room, 1 - fraction, 0.0)
    above, below = jnp.sum(fraction), jnp.sum(rest)
    down = fraction * (jnp.maximum(total, 0) / jnp.maximum(above, 1e-30))
    up = fraction + rest * jnp.minimum((total - above) / jnp.maximum(below, 1e-30), 1)
    return jnp.where(total < above, down, up)


def _exactly(key, chosen: Array, valid: Array, wanted: Array, kept: Array, count: Array) -> Array:
    """Opens or closes groups until exactly `count` are open: wanted ones are opened first, kept ones closed last.

    The systematic draw is within one of the count, so this is mostly no step at all.
    """

    def unequal(carry):
        return jnp.sum(carry[1], dtype=jnp.int32) != count

    def step(carry):
        key, chosen = carry
        key, draw = jax.random.split(key)
        short = count - jnp.sum(chosen, dtype=jnp.int32)
        eligible = jnp.where(short > 0, valid & ~chosen, chosen)
        preferred = eligible & jnp.where(short > 0, wanted, ~kept)
        eligible = jnp.where(jnp.any(preferred), preferred, eligible)
        return key, chosen ^ choose(draw, eligible, jnp.abs(short))

    return jax.lax.while_loop(unequal, step, (key, chosen))[1]


def _balance(key, num_rollouts: Array, budget: Array, *, min_group: int, max_group: int) -> Array:
    """Adds or takes rollouts, within the bounds of the groups at hand, until they sum to the budget.

    Every group takes as many as all can have, and then some, drawn by the key, one more: mostly that alone.
    """

    def unequal(carry):
        return jnp.sum(carry[1], dtype=jnp.int32) != budget

    def step(carry):
        key, n = carry
        key, draw = jax.random.split(key)
        short = budget - jnp.sum(n, dtype=jnp.int32)
        room = jnp.where(n > 0, jnp.where(short > 0, max_group - n, n - min_group), 0)
        each = jnp.abs(short) // jnp.maximum(jnp.sum(room > 0, dtype=jnp.int32), 1)
        single = choose(draw, room > 0, jnp.abs(short)).astype(jnp.int32)
        return key, n + jnp.sign(short) * jnp.where(each > 0, jnp.minimum(each, room), single)

    return jax.lax.while_loop(unequal, step, (key, num_rollouts))[1]
