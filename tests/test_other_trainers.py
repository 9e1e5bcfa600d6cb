"""Use from other trainers: the examples of docs/allocator.md, run as they stand."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import cero_jax

ROOT = Path(__file__).resolve().parent.parent


def blocks(path: str, heading: str) -> list[str]:
    """The Python blocks under a heading, up to the next heading of the same or a higher level."""
    text = (ROOT / path).read_text()
    found = re.search(rf"^(#+) {re.escape(heading)}\s*$(.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{path} has no heading {heading!r}"
    return re.findall(r"```python\n(.*?)```", found.group(2), re.DOTALL)


def bits(tree) -> list[tuple]:
    """Every leaf's shape, dtype and bytes; of keys, what is in them."""
    leaves = jax.tree.leaves(tree)
    plain = (jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves)
    return [(x.shape, x.dtype, np.asarray(x).tobytes()) for x in plain]


def test_a_plain_numpy_loop_learns_where_the_variance_is():
    (code,) = blocks("docs/allocator.md", "A plain NumPy loop")
    assert "jax." not in code.replace("cero_jax.", "")  # no JAX in sight for the caller
    scope = {}
    exec(code, scope)
    drawn, success = scope["drawn"], scope["success"]
    assert drawn.sum() == 8_000
    assert drawn[success == 0].mean() < 0.6 * drawn[success > 0].mean()


def test_a_loop_shaped_as_in_tunix_or_trl(caplog):
    (code,) = blocks("docs/allocator.md", "A trainer that asks before a batch and reports after it")
    scope = {}
    exec(code, scope)
    sizes = scope["GroupSizes"](num_prompts=64, total_budget=4_000, num_epochs=4, batch_size=16)
    trained, compilations = 0, []
    for start in list(range(0, 60, 12)) * 6:  # batches of 12, shorter than batch_size: padded, compiled once
        batch = list(range(start, start + 12))
        with jax.log_compiles():
            groups = sizes.before(batch)
            assert all(g == 0 or 4 <= g <= 32 for g in groups)
            sizes.after(batch, [[float(i % 3 == 0)] * 1 + [0.0] * (g - 1) if g else [] for i, g in enumerate(groups)])
        trained += sum(groups)
        compilations.append(sum("Compiling" in record.getMessage() for record in caplog.records))
        caplog.clear()
    assert trained == int(sizes.state.ledger.spent) == int(sizes.state.cumulative_rollouts.sum())
    assert 3_500 < trained <= 4_000
    assert compilations[0] >= 2
    assert not any(compilations[1:])


def test_the_first_snippet_hands_out_one_epochs_share():
    (code,) = blocks("docs/allocator.md", "The allocator, from any trainer")
    scope = {}
    exec(code, scope)
    assert int(scope["num_rollouts"].sum()) == int(scope["state"].ledger.spent) == 25_600 // 50


@pytest.mark.parametrize("make", [cero_jax.cero, cero_jax.cero_dual, cero_jax.uniform], ids=lambda make: make.__name__)
@pytest.mark.parametrize("tokens", [None, 500], ids=["rollouts", "tokens"])
def test_a_state_comes_back_from_its_file_to_the_bit_and_goes_on_as_before(make, tokens):
    (code,) = blocks("docs/allocator.md", "Save and load")
    before, save_and_load = code.split("\nplain = state", 1)
    allocator = make(total_budget=8_000 * (tokens or 1), num_epochs=20, expected_tokens=tokens)
    scope = {}
    exec(before, scope)
    n, state = allocator.allocate(allocator.init(200, seed=5))
    state = allocator.update(state, n, n // 3)
    scope.update(allocator=allocator, state=state)
    exec("plain = state" + save_and_load, scope)
    assert jax.tree.structure(scope["loaded"]) == jax.tree.structure(state)
    for ours, theirs in zip(bits(state), bits(scope["loaded"]), strict=True):
        assert ours == theirs
    for ours, theirs in zip(bits(allocator.allocate(state)), bits(allocator.allocate(scope["loaded"])), strict=True):
        assert ours == theirs
