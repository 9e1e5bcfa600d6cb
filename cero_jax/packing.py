"""An epoch's ragged groups laid into steps of R rows each, so that no shape depends on the allocation.

R is fixed. A group that does not fit what is left of a step is cut in two visits, each of at least `min_group` rows
with a baseline of its own, or else the next group that fits goes first. Places left empty are padding: masked, never
charged.

Letters: N prompts, R rows of a step, U visits in it.
"""

from typing import NamedTuple

import numpy as np

LOOK_AHEAD = 64  # groups looked at for one that fills the step; the first nearly always does

Visit = tuple[int, int, int]  # prompt id, first rollout, rows


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


class _Pending:
    """The visits that are still to be laid out: those left over from before, then whole groups in their order."""

    def __init__(self, ids: np.ndarray, sizes: np.ndarray):
        self.left_over: list[Visit] = []
        self._ids, self._sizes, self._ends, self._next = ids, sizes, np.cumsum(sizes, dtype=np.int64), 0

    def __bool__(self) -> bool:
        return bool(self.left_over) or self._next < len(self._ids)

    def near(self, number: int) -> list[Visit]:
        """The first of them, up to `number`."""
        return self.left_over[:number] + self._groups(self._next, self._next + max(number - len(self.left_over), 0))

    def remove(self, index: int) -> None:
        """Take one of the first out; those before it stay, as left over."""
        if index < len(self.left_over):
            del self.left_over[index]
            return
        last = self._next + index - len(self.left_over)
        self.left_over += self._groups(self._next, last)
        self._next = last + 1

    def remove_run(self, room: int, min_group: int) -> list[Visit]:
        """Take out the first of them, in order, as long as each leaves at least `min_group` of the room."""
        if self.left_over:
            return []
        before = self._ends[self._next - 1] if self._next else 0
        start, self._next = self._next, int(np.searchsorted(self._ends, before + room - min_group, "right"))
        return self._groups(start, self._next)

    def _groups(self, start: int, stop: int) -> list[Visit]:
        ids, sizes = (column[start:stop].tolist() for column in (self._ids, self._sizes))
        return [(prompt, 0, size) for prompt, size in zip(ids, sizes, strict=True)]


def _fill(pending: _Pending, room: int, min_group: int) -> list[Visit]:
    """Take visits out of `pending` until `room` is full or nothing fits."""
    visits = []
    while pending and room >= min_group:
        run = pending.remove_run(room, min_group)  # nearly all of a step, at once
        visits += run
        room -= sum(size for _, _, size in run)
        if not pending:
            break
        near = pending.near(1)
        takes = [_take(near[0][2], room, min_group)]
        if not any(takes):
            near = pending.near(LOOK_AHEAD)
            takes = [_take(size, room, min_group) for _, _, size in near]
        if not any(takes):
            takes = [take if take >= min_group else 0 for take in (_take_any(s, room, min_group) for _, _, s in near)]
        if not any(takes):
            break
        index = next(i for i, take in enumerate(takes) if take)
        take, (prompt, first, size) = takes[index], near[index]
        pending.remove(index)
        visits.append((prompt, first, take))
        room -= take
        if take < size:  # the rest of a cut group goes into the next step: two visits of one prompt never share one
            pending.left_over.insert(0, (prompt, first + take, size - take))
            break
    return visits


def _step_plan(visits: list[Visit], rows_per_step: int, max_visits: int) -> StepPlan:
    ids, firsts, sizes = (np.array(column, np.int32) for column in zip(*visits, strict=True))
    used = int(sizes.sum())
    within = np.arange(used, dtype=np.int32) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return StepPlan(
        prompt_ids=_padded(np.repeat(ids, sizes), rows_per_step, -1),
        group_ids=_padded(np.repeat(np.arange(len(ids)), sizes), rows_per_step, 0),
        rollout_index=_padded(np.repeat(firsts, sizes) + within, rows_per_step, 0),
        row_mask=np.arange(rows_per_step) < used,
        visit_ids=_padded(ids, max_visits, -1),
        visit_sizes=_padded(sizes, max_visits, 0),
    )


def _padded(values: np.ndarray, length: int, padding: int) -> np.ndarray:
    """[length] int32, the values and then padding."""
    padded = np.full(length, padding, np.int32)
    padded[: len(values)] = values
    return padded


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
    ids = order[num_rollouts[order] > 0]
    pending, steps = _Pending(ids, num_rollouts[ids]), []
    while pending:
        steps.append(_step_plan(_fill(pending, rows_per_step, min_group), rows_per_step, rows_per_step // min_group))
    return steps
