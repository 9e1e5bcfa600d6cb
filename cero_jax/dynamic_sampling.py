"""DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476): optimiser steps of live groups only.

Live groups are collected until they fill an optimiser step; the others are paid for and not learned from.
"""

import sys

import jax
import numpy as np
from tqdm import tqdm

from cero_jax.learner import Batch, live_rows


class Collector:
    """Holds drawn batches until their live groups fill an optimiser step. min_group: rows of the smallest visit."""

    def __init__(self, min_group: int):
        self._min_group = min_group
        self.held: list[Batch] = []

    def add(self, batch: Batch) -> Batch | None:
        """Hold another batch of R rows. Returns a full step of live groups, and then holds none; None: not full yet."""
        self.held.append(batch)
        packed, full = pack_live(self.held, self._min_group)
        if not full:
            return None
        self.held.clear()
        return packed

    def close(self) -> None:
        """Say what is lost where the run ends before the step is full."""
        if self.held:
            lost = f"the run ends with the live groups of {len(self.held)} steps held, which fill no optimiser step"
            tqdm.write(lost, file=sys.stderr)


def pack_live(batches: list[Batch], min_group: int) -> tuple[Batch, bool]:
    """One step's rows from several batches of R rows: their live groups, whole and in order, then padding.

    Also returns whether the step is full: no group of `min_group` rows would fit any more, or a live group did not.
    """
    num_rows = len(batches[0].reward)
    groups, full = [], False  # (batch, rows) of each live group
    room = num_rows
    for batch in batches:
        live = live_rows(batch)
        for group in np.unique(batch.group_ids[live]):
            members = np.flatnonzero(live & (batch.group_ids == group))
            if len(members) <= room:
                groups.append((batch, members))
                room -= len(members)
            else:
                full = True
    chosen = [jax.tree.map(lambda column, members=members: column[members], batch) for batch, members in groups]
    packed = jax.tree.map(lambda column, *parts: np.concatenate([column[:0], *parts]), batches[0], *chosen)
    sizes = [len(members) for _, members in groups]
    packed = packed._replace(group_ids=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    padded = jax.tree.map(lambda column: np.pad(column, [(0, room)] + [(0, 0)] * (column.ndim - 1)), packed)
    return padded, full or room < min_group
