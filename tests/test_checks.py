"""Misuse of `allocate` and `update`: refused where it can be read, and let through where it is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cero_jax

pytestmark = pytest.mark.usefixtures("strict_dtypes")
N = 6
ALLOCATOR = cero_jax.cero(total_budget=100, num_epochs=2)
STATE = ALLOCATOR.init(N)

WRONG = [
    ({"num_rollouts": [4.0, 4.0], "num_correct": [1, 1]}, "num_rollouts has dtype float64: give integers"),
    ({"num_rollouts": [4, 4], "num_correct": [0.5, 1]}, "num_correct has dtype float64"),
    ({"num_rollouts": [4, 4], "num_correct": [True, False]}, "num_correct has dtype bool"),
    ({"num_rollouts": [4, 4], "num_correct": [1, 1], "num_evidence": [4.0, 4.0]}, "num_evidence has dtype float64"),
    ({"num_rollouts": [4, 4], "num_correct": [1, 1], "num_tokens": [9.0, 9.0]}, "num_tokens has dtype float64"),
    (
        {"num_rollouts": [4, 4], "num_correct": [1, 5]},
        "num_correct holds 5 where num_rollouts holds 4: give 0 <= num_c",
    ),
    ({"num_rollouts": [4, 4], "num_correct": [1, 3], "num_evidence": [4, 2]}, "num_correct holds 3 where num_evidence"),
    (
        {"num_rollouts": [4, 4], "num_correct": [1, 3], "num_evidence": [5, 4]},
        "num_evidence holds 5 where num_rollouts",
    ),
    ({"num_rollouts": [4, -4], "num_correct": [1, 0]}, "num_correct holds 0 where num_rollouts holds -4"),
    ({"num_rollouts": [4, 4], "num_correct": [-1, 0]}, "num_correct holds -1: a count is not negative"),
    ({"num_rollouts": [4, 4], "num_correct": [0, 0], "num_tokens": [9, -9]}, "num_tokens holds -9: a count"),
    ({"num_rollouts": [4, 4], "num_correct": [0, 0], "num_tokens": [2**30, 2**30]}, "num_tokens sums to 2147483648"),
    (
        {"num_rollouts": [4, 4, 4], "num_correct": [0, 0]},
        r"num_rollouts has shape \(3,\), not \(2,\): .* for 2 prompt_ids",
    ),
    ({"num_rollouts": [4, 4], "num_correct": 0}, r"num_correct has shape \(\), not \(2,\)"),
    ({"num_rollouts": [4, 4], "num_correct": [0, 0], "release": [True] * 3}, r"release has shape \(3,\), not \(\) or"),
    ({"num_rollouts": [4, 4], "num_correct": [0, 0], "prompt_ids": [3, 3]}, "prompt_ids names prompt 3 twice"),
    ({"num_rollouts": [4, 4], "num_correct": [0, 0], "prompt_ids": [3.0, 4.0]}, "prompt_ids has dtype float64"),
    ({"num_rollouts": [4, 4], "num_correct": [0, 0], "prompt_ids": [[3, 4]]}, r"prompt_ids has shape \(1, 2\)"),
    (
        {"num_rollouts": [4, 4], "num_correct": [0, 0], "prompt_ids": None},
        r"num_rollouts has shape .* for all 6 prompts",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda case: case[:40] if isinstance(case, str) else "")
@pytest.mark.parametrize("kind", [list, np.asarray, jnp.asarray], ids=["list", "numpy", "jax"])
def test_what_cannot_be_is_refused_in_one_line(arguments, message, kind):
    arguments = {"prompt_ids": [1, 4], **arguments}
    given = {
        name: kind(x) if isinstance(x, list) and not (kind is jnp.asarray and name == "release") else x
        for name, x in arguments.items()
    }
    if kind is jnp.asarray:
        message = message.replace("float64", "float32")
    with pytest.raises(ValueError, match=message) as caught:
        ALLOCATOR.update(STATE, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [list, np.asarray, jnp.asarray], ids=["list", "numpy", "jax"])
def test_allocate_refuses_a_prompt_twice_and_lets_padding_repeat(kind):
    with pytest.raises(ValueError, match="prompt_ids names prompt 5 twice: ids of one call are distinct"):
        ALLOCATOR.allocate(STATE, kind([5, 0, 5]))
    with pytest.raises(ValueError, match=r"prompt_ids has dtype float"):
        ALLOCATOR.allocate(STATE, kind([5.0, 0.0]))
    n, _ = ALLOCATOR.allocate(STATE, kind([5, -1, -1, N, N, 0]), budget=16)
    assert int(n.sum()) == 16
    assert not np.asarray(n)[1:5].any()


def test_counts_of_padding_may_be_anything_and_lists_are_as_good_as_arrays():
    ids, drawn, correct = [2, -1, N, 4], [8, 3, -7, 4], [3, 9, 0, 4]
    settled = ALLOCATOR.update(STATE, drawn, correct, prompt_ids=ids)
    arrays = ALLOCATOR.update(STATE, np.array(drawn), jnp.array(correct), prompt_ids=np.array(ids, np.int64))
    for state in (settled, arrays):
        np.testing.assert_array_equal(state.cumulative_rollouts, [0, 0, 8, 0, 4, 0])


def test_what_is_traced_passes_and_is_clipped():
    def settle(ids, drawn, correct):
        return ALLOCATOR.update(STATE, [*drawn], correct, prompt_ids=ids)

    arguments = jnp.array([2, 3]), jnp.array([4, -4]), jnp.array([9, 1])
    state = jax.jit(settle)(*arguments)
    np.testing.assert_array_equal(state.cumulative_rollouts, [0, 0, 4, 0, 0, 0])
    assert float(state.alpha[2]) > float(state.beta[2])
    many = jax.vmap(settle)(*(jnp.stack([x, x]) for x in arguments))
    np.testing.assert_array_equal(many.alpha[1], state.alpha)


def test_arrays_spread_over_devices_are_not_gathered_to_be_checked():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), P("data"))
    drawn, wrong = (jax.device_put(jnp.array(x), sharding) for x in ([4] * N, [9] * N))
    state = ALLOCATOR.update(STATE, drawn, wrong)
    assert int(state.ledger.spent) == 4 * N
