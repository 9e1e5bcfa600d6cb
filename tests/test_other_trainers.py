"""Use from other trainers: the examples of docs/allocator.md, run as they stand, and README's snippet."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def blocks(path: str, heading: str) -> list[str]:
    """The Python blocks under a heading, up to the next heading of the same or a higher level."""
    text = (ROOT / path).read_text() if (ROOT / path).is_file() else ""
    found = re.search(rf"^(#+) {re.escape(heading)}\s*$(.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"```python\n(.*?)```", found.group(2), re.DOTALL) if found else []


def test_a_plain_numpy_loop_learns_where_the_variance_is():
    (code,) = blocks("docs/allocator.md", "A plain NumPy loop")
    assert "jax." not in code.replace("cero_jax.", "")  # no JAX in sight for the caller
    scope = {}
    exec(code, scope)
    drawn, success = scope["drawn"], scope["success"]
    assert drawn.sum() == 8_000
    assert drawn[success == 0].mean() < 0.6 * drawn[success > 0].mean()


def test_a_loop_shaped_as_in_tunix_or_trl():
    (code,) = blocks("docs/allocator.md", "A trainer that asks before a batch and reports after it")
    scope = {}
    exec(code, scope)
    sizes = scope["GroupSizes"](num_prompts=64, total_budget=4_000, num_epochs=4, batch_size=16)
    trained = 0
    for start in list(range(0, 60, 12)) * 6:  # batches of 12, shorter than batch_size: padded, compiled once
        batch = list(range(start, start + 12))
        groups = sizes.before(batch)
        assert all(g == 0 or 4 <= g <= 32 for g in groups)
        sizes.after(batch, [[float(i % 3 == 0)] * 1 + [0.0] * (g - 1) if g else [] for i, g in enumerate(groups)])
        trained += sum(groups)
    assert trained == int(sizes.state.ledger.spent) == int(sizes.state.cumulative_rollouts.sum())
    assert 3_500 < trained <= 4_000
    assert sizes.allocator.allocate._cache_size() == sizes.allocator.update._cache_size() == 1


def test_readmes_snippet_runs():
    found = blocks("README.md", "Use only the allocator")
    if not found:
        pytest.skip("README.md has no section 'Use only the allocator'")
    for code in found:
        exec(code, {})
