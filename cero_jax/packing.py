"""An epoch's ragged groups laid into steps of R rows each, so that no shape depends on the allocation.

R is fixed. A group that does not fit what is left of a step is cut in two visits, each of at least `min_group` rows
with a baseline of its own, or else the next group that fits goes first. Places left empty are padding: masked, never
charged.

Letters: N prompts, R rows of a step, U visits in it.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LOOK_AHEAD = 64  # groups looked at for one that fills the step; the first nearly always does


class StepPlan(NamedTuple):
    """Who is drawn in one step. U = R // min_group visits at most; unused ones hold prompt id -1 and 0 rows."""

    prompt_ids: np.ndarray  # [R] int32, -1 on padding
    group_ids: np.ndarray  # [R] int32 in 0..U-1, the row's visit; 0 on padding
    rollout_index: np.ndarray  # [R] int32, place of the rollout in its prompt's group of this epoch
    row_mask: np.ndarray  # [R] bool
    visit_ids: np.ndarray  # [U] int32, the prompt of each visit
    visit_sizes: np.ndarray  # [U] int32, its rows


def _take(size: int, room: int, min_group: int) -> int:
    """How many rows of a group of `size` to put into `room` so that no place is wasted; 0 where that cannot be."""
    if size == room or size <= room - min_group:
        return size
    return room if size - room >= min_group and room >= min_group else 0


def _take_any(size: int, room: int, min_group: int) -> int:
    """The same, where a few places may stay empty; 0 where nothing fits."""
    return size if size <= room else max(0, min(room, size - min_group) if size >= 2 * min_group else 0)


Take = Callable[[int, int, int], int]  # (rows of a group, room, min_group) -> how many of them to take


def _first(pending: deque, take: Take, room: int, min_group: int, at_least: int) -> tuple[int, int] | None:
    """The first near group of which `take` gives `at_least` rows, and how many; those behind it are not looked at."""
    for i in range(min(LOOK_AHEAD, len(pending))):
        if (rows := take(pending[i][2], room, min_group)) >= at_least:
            return i, rows
    return None


def _fill(pending: deque[tuple[int, int, int]], room: int, min_group: int) -> list[tuple[int, int, int]]:
    """Take visits (prompt id, first rollout, rows) out of `pending` until `room` is full or nothing fits."""
    visits = []
    while pending and room >= min_group:
        found = _first(pending, _take, room, min_group, at_least=1)
        found = found or _first(pending, _take_any, room, min_group, at_least=min_group)
        if found is None:
            break
        index, take = found
        prompt, first, size = pending[index]
        del pending[index]
        if take < size:
            pending.appendleft((prompt, first + take, size - take))
        visits.append((prompt, first, take))
        room -= take
        if take < size:  # the rest of a cut group goes into the next step: two visits of one prompt never share one
            break
    return visits


def _step_plan(visits: list[tuple[int, int, int]], rows_per_step: int, max_visits: int) -> StepPlan:
    ids, firsts, sizes = (np.array(column, np.int32) for column in zip(*visits, strict=True))
    used = int(sizes.sum())
    padding = rows_per_step - used
    within = np.arange(used, dtype=np.int32) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return StepPlan(
        prompt_ids=np.pad(np.repeat(ids, sizes), (0, padding), constant_values=-1).astype(np.int32),
        group_ids=np.pad(np.repeat(np.arange(len(ids)), sizes), (0, padding)).astype(np.int32),
        rollout_index=np.pad(np.repeat(firsts, sizes) + within, (0, padding)).astype(np.int32),
        row_mask=np.arange(rows_per_step) < used,
        visit_ids=np.pad(ids, (0, max_visits - len(ids)), constant_values=-1).astype(np.int32),
        visit_sizes=np.pad(sizes, (0, max_visits - len(ids))).astype(np.int32),
    )


def plan(num_rollouts: np.ndarray, order: np.ndarray, *, rows_per_step: int, min_group: int) -> list[StepPlan]:
    """Lay every group of an epoch into steps.

    Args:
      num_rollouts: [N] int, each prompt's group of this epoch: 0, or at least min_group.
      order: [N] int permutation of the prompts, keyed by (seed, epoch).
      rows_per_step: R.
      min_group: fewest rows of a visit.

    Returns:
      The steps, in order; their rows hold each prompt exactly `num_rollouts` times.

    Raises:
      ValueError where a group is larger than a step or smaller than min_group.
    """
    num_rollouts = np.asarray(num_rollouts)
    sizes = num_rollouts[num_rollouts > 0]
    if sizes.size and (sizes.max() > rows_per_step or sizes.min() < min_group):
        raise ValueError(
            f"groups of {sizes.min()} to {sizes.max()} rows: each must lie in min_group={min_group}.."
            f"rows_per_step={rows_per_step}; set max_group <= rows_per_step"
        )
    order = np.asarray(order)
    order = order[num_rollouts[order] > 0]
    pending = deque(zip(order.tolist(), [0] * len(order), num_rollouts[order].tolist(), strict=True))
    steps = []
    while pending:
        steps.append(_step_plan(_fill(pending, rows_per_step, min_group), rows_per_step, rows_per_step // min_group))
    return steps
