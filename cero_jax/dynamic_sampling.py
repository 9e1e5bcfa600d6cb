"""DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476): optimiser steps of live groups only.

Live groups are collected until they fill an optimiser step; the others are paid for and not learned from. What is
collected is a batch of R rows, a part of the run's state: it is saved with the rest, and never grows.
"""

import jax
import numpy as np

from cero_jax.learner import Batch, live_rows


def nothing_held(num_rows: int, prompt_tokens: int, max_tokens: int) -> Batch:
    """R = num_rows rows of padding, for prompts of up to prompt_tokens and completions of up to max_tokens tokens."""
    per_row, numbers = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.float32)
    return Batch(
        prompt_tokens=np.zeros((num_rows, prompt_tokens), np.int32),
        prompt_lengths=per_row,
        tokens=np.zeros((num_rows, max_tokens), np.int32),
        lengths=per_row,
        log_probs=np.zeros((num_rows, max_tokens), np.float32),
        reward=numbers,
        group_ids=per_row,
        row_mask=np.zeros(num_rows, bool),
        row_weight=numbers,
        judged=np.zeros(num_rows, bool),
    )


def collect(held: Batch, batch: Batch, min_group: int) -> tuple[Batch, Batch | None]:
    """Take a batch's live groups, whole and in order, behind those that are held: R rows, then padding.

    Returns what is held from now on, and a full step of live groups, or None where they fill none yet. A step is full
    where no group of `min_group` rows would fit any more, or where a live group did not; that group is left out.
    """
    packed, full = pack_live([held, batch], min_group)
    if not full:
        return packed, None
    return jax.tree.map(np.zeros_like, held), packed


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
