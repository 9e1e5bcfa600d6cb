"""Ragged groups laid into steps: every rollout once, no visit too small, no prompt twice in a step, little padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cero_jax.packing import LOOK_AHEAD, StepPlan, _take, _take_any, plan


@st.composite
def epochs(draw):
    """num_rollouts [N], order [N], rows_per_step, min_group."""
    min_group = draw(st.integers(2, 8))
    rows_per_step = draw(st.integers(min_group, 48))
    size = st.one_of(st.just(0), st.integers(min_group, rows_per_step))
    num_rollouts = np.array(draw(st.lists(size, min_size=1, max_size=40)), np.int32)
    order = np.array(draw(st.permutations(range(len(num_rollouts)))))
    return num_rollouts, order, rows_per_step, min_group


@given(epochs())
@settings(max_examples=400, deadline=None)
def test_every_rollout_is_laid_once_in_visits_that_stand_alone(epoch):
    num_rollouts, order, rows_per_step, min_group = epoch
    steps = plan(num_rollouts, order, rows_per_step=rows_per_step, min_group=min_group)
    laid = [[] for _ in num_rollouts]
    for step in steps:
        used = np.flatnonzero(step.visit_sizes)
        visited = step.visit_ids[used].tolist()
        assert step.visit_ids.shape == step.visit_sizes.shape == (rows_per_step // min_group,)
        assert len(set(visited)) == len(visited) > 0
        assert (step.visit_sizes[used] >= min_group).all()
        assert (np.delete(step.visit_ids, used) == -1).all()
        assert step.row_mask.sum() == step.visit_sizes.sum() <= rows_per_step
        for row in range(rows_per_step):
            if step.row_mask[row]:
                assert step.prompt_ids[row] == step.visit_ids[step.group_ids[row]]
                laid[step.prompt_ids[row]].append(int(step.rollout_index[row]))
            else:
                assert (step.prompt_ids[row], step.group_ids[row]) == (-1, 0)
        for visit in used:
            assert (step.row_mask & (step.group_ids == visit)).sum() == step.visit_sizes[visit]
    for prompt, indices in enumerate(laid):
        assert indices == list(range(num_rollouts[prompt]))  # each once, and in order: an earlier step holds the first


def laid_one_by_one(num_rollouts, order, rows_per_step, min_group):
    """The same rule a visit at a time: (prompt, first rollout, rows) of each, by steps."""
    pending, steps = [(int(i), 0, int(num_rollouts[i])) for i in order if num_rollouts[i] > 0], []
    while pending:
        room, visits = rows_per_step, []
        while pending and room >= min_group:
            near = pending[:LOOK_AHEAD]
            takes = [_take(size, room, min_group) for _, _, size in near]
            if not any(takes):
                takes = [t if t >= min_group else 0 for t in (_take_any(size, room, min_group) for _, _, size in near)]
            if not any(takes):
                break
            index = next(i for i, take in enumerate(takes) if take)
            take, (prompt, first, size) = takes[index], pending.pop(index)
            visits.append((prompt, first, take))
            room -= take
            if take < size:
                pending.insert(0, (prompt, first + take, size - take))
                break
        steps.append(visits)
    return steps


@given(epochs())
@settings(max_examples=200, deadline=None)
def test_many_at_once_are_laid_as_one_by_one(epoch):
    num_rollouts, order, rows_per_step, min_group = epoch
    steps = plan(num_rollouts, order, rows_per_step=rows_per_step, min_group=min_group)
    expected = laid_one_by_one(num_rollouts, order, rows_per_step, min_group)
    assert len(steps) == len(expected)
    for step, visits in zip(steps, expected, strict=True):
        firsts = [int(step.rollout_index[step.group_ids == place][0]) for place in range(len(visits))]
        found = zip(step.visit_ids.tolist(), firsts, step.visit_sizes.tolist(), strict=False)
        assert list(found)[: len(visits)] == visits


@given(epochs())
@settings(max_examples=50, deadline=None)
def test_shapes_and_types_do_not_depend_on_the_allocation(epoch):
    num_rollouts, order, rows_per_step, min_group = epoch
    for step in plan(num_rollouts, order, rows_per_step=rows_per_step, min_group=min_group):
        assert isinstance(step, StepPlan)
        for name, column in step._asdict().items():
            visits = rows_per_step // min_group
            assert column.shape == ((visits,) if name.startswith("visit") else (rows_per_step,))
            assert column.dtype == (bool if name == "row_mask" else np.int32)


def realistic(rng, kind, budget=512, rows_per_step=32, min_group=4):
    """Groups that sum to the budget. cero draws about four in five of the smallest size, and a long tail."""
    sizes, left = [], budget
    while left >= min_group:
        size = {
            "any": rng.integers(min_group, rows_per_step + 1),
            "as cero draws": min_group + (rng.geometric(0.2) if rng.random() < 0.2 else 0),
            "two kinds": rng.choice([min_group, rows_per_step]),
            "large": rng.integers(rows_per_step // 2, rows_per_step + 1),
        }[kind]
        size = int(min(size, left, rows_per_step))
        size = left if left - size < min_group and left <= rows_per_step else size
        sizes.append(size)
        left -= size
    return np.array(sizes, np.int32)


@pytest.mark.parametrize("kind", ["any", "as cero draws", "two kinds", "large"])
def test_steps_are_nearly_full(kind):
    rng, fill = np.random.default_rng(0), []
    for _ in range(100):
        num_rollouts = np.pad(realistic(rng, kind), (0, 100))
        steps = plan(num_rollouts, rng.permutation(len(num_rollouts)), rows_per_step=32, min_group=4)
        fill.append(num_rollouts.sum() / (32 * len(steps)))
    assert np.mean(fill) >= 0.97


def test_by_hand():
    # 5, 4, 3 into steps of 8 with visits of at least 2: 5 leaves 3, which the first group that fits without waste fills
    (first, second) = plan(np.array([5, 4, 3]), np.array([0, 1, 2]), rows_per_step=8, min_group=2)
    assert first.visit_ids.tolist() == [0, 2, -1, -1]
    assert first.visit_sizes.tolist() == [5, 3, 0, 0]
    assert first.prompt_ids.tolist() == [0] * 5 + [2] * 3
    assert first.rollout_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert second.prompt_ids.tolist() == [1] * 4 + [-1] * 4
    assert second.row_mask.tolist() == [True] * 4 + [False] * 4
    # 6, 6 into steps of 8: the second is cut in 2 and 4, and its rollouts go on counting
    (first, second) = plan(np.array([6, 6]), np.array([1, 0]), rows_per_step=8, min_group=2)
    assert first.visit_ids.tolist() == [1, 0, -1, -1]
    assert first.visit_sizes.tolist() == [6, 2, 0, 0]
    assert second.prompt_ids.tolist() == [0] * 4 + [-1] * 4
    assert second.rollout_index.tolist()[:4] == [2, 3, 4, 5]


def test_the_order_decides_who_goes_first_and_nothing_else_does():
    num_rollouts = np.random.default_rng(0).integers(4, 20, 30)
    order = np.random.default_rng(1).permutation(30)
    steps = plan(num_rollouts, order, rows_per_step=32, min_group=4)
    assert steps[0].visit_ids[0] == order[0]
    for same in (order, order.tolist(), tuple(order), order.astype(np.int64)):
        again = plan(num_rollouts.astype(np.int64), same, rows_per_step=32, min_group=4)
        for step, other in zip(steps, again, strict=True):
            for column, twin in zip(step, other, strict=True):
                np.testing.assert_array_equal(column, twin)
    other = plan(num_rollouts, order[::-1], rows_per_step=32, min_group=4)
    assert other[0].visit_ids[0] == order[-1]


def test_no_rollouts_no_steps():
    assert plan(np.zeros(5, np.int32), np.arange(5), rows_per_step=8, min_group=2) == []


@pytest.mark.parametrize("sizes", [[4, 9], [0, 1, 4]])
def test_a_group_larger_than_a_step_or_smaller_than_a_visit_is_refused(sizes):
    low, high = min(s for s in sizes if s), max(sizes)
    with pytest.raises(ValueError, match=rf"groups of {low} to {high} rows.*min_group=2\.\.rows_per_step=8"):
        plan(np.array(sizes), np.arange(len(sizes)), rows_per_step=8, min_group=2)
