"""The log of a run, of whatever trainer: how often each prompt was right at each of its visits."""

import math
from pathlib import Path

import numpy as np

from cero_jax import read_files

SUCCESS_THRESHOLD = 0.5  # a reward from here on counts as a success


def read_log(path: str | Path, fields: tuple[str, str, str] = ("prompt", "epoch", "reward")) -> tuple[np.ndarray, ...]:
    """(successes, rollouts), both [N, visits] int: of each prompt at its visits, in order; 0 rollouts beyond them.

    path: a file, or a glob of files. Raises FileNotFoundError where there is none, and ValueError naming the file, the
    row and the field that is wrong.
    """
    visits: dict = {}
    for file in read_files.find_files(str(path)):
        for source, row in read_files.read_rows(file):
            if {"num_correct", "group_size"} <= row.keys() and (row["num_correct"], row["group_size"]) != (None, None):
                visits[source] = _counts(source, row["num_correct"], row["group_size"])
            else:
                prompt, epoch, successes = _rollouts(source, row, fields)
                of_prompt = visits.setdefault(prompt, {})
                correct, drawn = of_prompt.get(epoch, (0, 0))
                of_prompt[epoch] = correct + sum(successes), drawn + len(successes)
    if not visits:
        raise ValueError(f"{path}: no row in it: expected one row a rollout, or one a prompt")
    total = sum(drawn for of_prompt in visits.values() for _, drawn in of_prompt.values())
    if not 0 < total < 2**31:
        raise ValueError(f"{path}: {total} rollouts in it: give a log of one or more, and fewer than 2^31")
    counts = np.zeros((2, len(visits), max(map(len, visits.values()))), np.int64)
    for i, of_prompt in enumerate(visits.values()):
        for k, epoch in enumerate(sorted(of_prompt)):
            counts[:, i, k] = of_prompt[epoch]
    return counts[0], counts[1]


def _rollouts(source: str, row: dict, fields: tuple[str, str, str]) -> tuple[str, float, list[bool]]:
    """(prompt, epoch, successes) of a row of one rollout, or of as many as it has rewards."""
    try:
        prompt, epoch, reward = (read_files.pick(source, row, field) for field in fields)
    except ValueError as error:
        raise ValueError(f"{error}, with --fields") from None
    rewards = [_reward(source, fields[2], each) for each in (reward if isinstance(reward, list) else [reward])]
    if not rewards:
        raise ValueError(f"{source}: field {fields[2]!r} is an empty list: give the rewards, or drop the row")
    prompt = read_files.name(source, fields[0], prompt)
    return prompt, _number(source, fields[1], epoch), [each >= SUCCESS_THRESHOLD for each in rewards]


def _counts(source: str, num_correct, group_size) -> dict[int, tuple[int, int]]:
    """{visit: (successes, rollouts)} of a row of one prompt."""
    size = _number(source, "group_size", group_size)
    if not isinstance(num_correct, list):
        raise ValueError(f"{source}: field 'num_correct' is {num_correct!r:.40}: give a list, one count a visit")
    found = [_number(source, "num_correct", each) for each in num_correct]
    if size < 1 or not all(each.is_integer() for each in (size, *found)):
        raise ValueError(
            f"{source}: group_size={size:g} and the counts in 'num_correct' must be whole, and it positive"
        )
    if not all(0 <= each <= size for each in found):
        raise ValueError(f"{source}: field 'num_correct' holds a count outside 0..group_size={size:g}: mend it")
    return {visit: (int(each), int(size)) for visit, each in enumerate(found)}


def _reward(source: str, field: str, value) -> float:
    """A finite number; true is 1, in whatever case."""
    truth = {"true": 1.0, "false": 0.0}.get(str(value).strip().lower())
    return _number(source, field, value) if truth is None else truth


def _number(source: str, field: str, value) -> float:
    """A field's value as a finite number; JSON and CSV hold it as text."""
    try:
        number = math.nan if "_" in str(value) else float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{source}: field {field!r} is {value!r:.40}, no number: mend it, or name another with --fields"
        )
    return number
