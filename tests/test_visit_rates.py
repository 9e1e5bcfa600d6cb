"""Rows divided by their prompt's rate of rollouts."""

import jax
import numpy as np
import pytest
from test_rollout import ROWS, make_rows

import cero_jax
from cero_jax.packing import plan
from cero_jax.rollout import visit_rate_weights


def allocation(cumulative, reserved=0):
    state = cero_jax.uniform(total_budget=100, num_epochs=1).init(len(cumulative))
    cumulative = np.array(cumulative, np.int32)
    return state._replace(
        cumulative_rollouts=jax.numpy.asarray(cumulative), reserved=jax.numpy.full(len(cumulative), reserved, "int32")
    )


def test_visit_rate_weights_undo_the_rate():
    # rollouts 4, 6, 8 of which 2 each are reserved: rates 2/3, 1, 4/3; prompt 2 in four rows, 0 in three
    weight, clipped = visit_rate_weights(make_rows(), allocation([2, 4, 6], reserved=2), clip=10)
    raw = np.array([3 / 4] * 4 + [3 / 2] * 3)
    np.testing.assert_allclose(weight[:7], raw / raw.mean(), rtol=1e-6)
    assert weight[7] == 0
    assert clipped == 0
    assert weight.dtype == np.float32
    # prompts with rows in proportion to their rollouts weigh alike, together
    (rows,) = plan(np.array([3, 0, 5]), np.array([2, 0, 1]), rows_per_step=ROWS, min_group=3)
    weight, _ = visit_rate_weights(rows, allocation([30, 0, 50]), clip=10)
    assert weight[rows.prompt_ids == 0].sum() == pytest.approx(weight[rows.prompt_ids == 2].sum())


def test_visit_rates_are_clipped():
    weight, clipped = visit_rate_weights(make_rows(), allocation([1, 1, 1000]), clip=2)  # rates 1/334, 2.99
    assert weight[4] / weight[0] == pytest.approx(4)
    assert clipped == 1
    assert weight[:7].mean() == pytest.approx(1)
