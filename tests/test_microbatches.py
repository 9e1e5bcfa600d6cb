"""A step's rows in micro-batches: each once, sorted, and cut to the narrowest shape that holds them."""

import numpy as np

from cero_jax.learner import token_limits
from cero_jax.microbatches import Shape, microbatches, shapes_for


def test_shapes_are_every_width_with_every_limit():
    assert shapes_for((10, 60), (4, 8)) == [Shape(14, 4), Shape(18, 8), Shape(64, 4), Shape(68, 8)]


def test_microbatches_hold_each_wanted_row_once_and_are_cut_to_their_longest():
    rng = np.random.default_rng(0)
    for _ in range(200):
        num_rows, size, longest = rng.integers(1, 40), rng.integers(1, 12), rng.integers(1, 50)
        wanted, lengths = rng.random(num_rows) < 0.6, rng.integers(1, longest + 1, num_rows)
        widths = tuple(sorted({30, *rng.integers(1, 31, rng.integers(0, 3)).tolist()}))
        prompts, shapes = rng.integers(1, 31, num_rows), shapes_for(widths, token_limits(int(longest)))
        parts = microbatches(wanted, prompts, lengths, int(size), shapes)
        rows = np.concatenate([np.zeros(0, int), *(part.rows[part.used] for part in parts)])
        np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(wanted))
        assert len(parts) == -(-wanted.sum() // size)
        assert np.all(np.diff((prompts + lengths)[rows]) >= 0)
        for part in parts:
            here = part.rows[part.used]
            assert part.rows.shape == (size,)
            fits = [s for s in shapes if s.width >= (prompts + lengths)[here].max() and s.limit >= lengths[here].max()]
            assert part.shape == min(fits)


def test_a_long_prompt_and_a_long_completion_share_a_shape_that_holds_neither_both():
    """Rows are packed: 60 + 4 and 10 + 40 tokens need 64 places, not 60 + 40."""
    (part,) = microbatches(np.ones(2, bool), np.array([60, 10]), np.array([4, 40]), 2, shapes_for((20, 60), (10, 44)))
    assert part.shape == Shape(64, 44)
