"""A step's rows laid into micro-batches, each cut to one of a few static shapes: the host's part of the gradient.

R rows of a step.
"""

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """What a micro-batch is cut to; static: a program is compiled for each."""

    width: int  # places of a row, prompt and completion together
    limit: int  # completion tokens


class Microbatch(NamedTuple):
    """Rows whose gradient is computed at once."""

    rows: np.ndarray  # [size] int32, places in the step's batch
    used: np.ndarray  # [size] bool, False: there to fill the shape
    shape: Shape  # that holds the longest of them


def shapes_for(prompt_widths: tuple[int, ...], limits: tuple[int, ...]) -> list[Shape]:
    """Each width of prompts with each limit in completion tokens behind it, the narrowest shape first."""
    return sorted({Shape(width + limit, limit) for width in prompt_widths for limit in limits})


def microbatches(
    wanted: np.ndarray, prompt_lengths: np.ndarray, lengths: np.ndarray, size: int, shapes: list[Shape]
) -> list[Microbatch]:
    """The `wanted` rows [R] bool in micro-batches of `size` rows, the shortest first.

    prompt_lengths, lengths: [R] tokens of each prompt, of each completion. shapes: rising, the last of them holds all.
    """
    order, total = np.flatnonzero(wanted), prompt_lengths + lengths
    order = order[np.argsort(total[order], kind="stable")].astype(np.int32)
    pieces = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        Microbatch(
            rows=np.pad(rows, (0, size - len(rows))),
            used=np.arange(size) < len(rows),
            shape=next(s for s in shapes if s.width >= total[rows].max() and s.limit >= lengths[rows].max()),
        )
        for rows in pieces
    ]
