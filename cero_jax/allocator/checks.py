"""Misuse refused with one clear ValueError: wrong settings where an allocator is made, wrong counts where it is called.

What is traced is not known yet. It passes here, and is made unable to go wrong where it is used.
"""

import math
import numbers
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

MOST_OF_A_GROUP = 2**24  # rollouts


def known(*values) -> list[float]:
    """Those values that are plain numbers now, and not traced."""
    return [float(x) for x in values if isinstance(x, numbers.Real)]


def check_settings(total_budget, num_epochs, min_group, max_group, multiple_of, prior, discount, expected_tokens):
    """Raises ValueError, naming the values, on settings of an allocator that are known to be wrong."""
    if not 1 <= min_group <= max_group:
        raise ValueError(f"min_group={min_group} must lie in 1..max_group={max_group}: lower it, or raise the other")
    if multiple_of < 1 or min_group % multiple_of or max_group % multiple_of:
        raise ValueError(
            f"multiple_of={multiple_of} must divide min_group={min_group} and max_group={max_group}: groups are its "
            "multiples within them"
        )
    if max_group > MOST_OF_A_GROUP:
        raise ValueError(f"max_group={max_group} must be at most 2^24: a float32 holds no larger share exactly")
    if num_epochs < 1:
        raise ValueError(f"num_epochs={num_epochs} must be at least 1")
    if num_epochs >= 2**31:
        raise ValueError(f"num_epochs={num_epochs} must be below 2^31, as the rollouts are")
    if expected_tokens is not None and not (isinstance(total_budget, int) and 0 <= total_budget < 2**63):
        raise ValueError(f"total_budget={total_budget} tokens must be a Python integer in 0..2^63 - 1")
    if expected_tokens is None and not all(0 <= x < 2**31 for x in known(total_budget)):
        raise ValueError(f"total_budget={total_budget} rollouts must lie in 0..2^31 - 1")
    if not all(x > 0 for x in known(expected_tokens)):
        raise ValueError(f"expected_tokens={expected_tokens} a rollout must be positive")
    arrays = [np.asarray(x) for x in prior if isinstance(x, np.ndarray | list | tuple)]
    if len(prior) != 2 or not all(x > 0 for x in known(*prior)) or not all((x > 0).all() for x in arrays):
        raise ValueError(f"prior={prior} must be two positive numbers or arrays [N] of them, Beta(alpha, beta)")
    if not all(0 < x <= 1 for x in known(discount)):
        raise ValueError(f"discount={discount} must lie in (0, 1]; 1 never forgets")


def checked_budget(budget, in_tokens: bool):
    """The budget of one call as an array []: rollouts, at most 2^31 - 1, or float32 tokens. None, or traced: as it is.

    Raises ValueError where it is no finite number.
    """
    if not isinstance(budget, numbers.Real | np.ndarray):
        return budget
    value = math.nan if isinstance(budget, np.ndarray) and budget.ndim else float(budget)
    if not math.isfinite(value):
        raise ValueError(f"budget={budget} of a call must be one finite number, or None for its share")
    return np.float32(value) if in_tokens else np.int32(min(max(int(value), 0), 2**31 - 1))


def checked_ids(prompt_ids, num_prompts: int):
    """Prompt ids as an array [P]. Raises ValueError where they are no integers, or name a prompt twice."""
    ids = _integers("prompt_ids", prompt_ids)
    if ids.ndim != 1:
        raise ValueError(f"prompt_ids has shape {ids.shape}: give a list of ids, or None for all prompts")
    values = _readable(ids)
    if values is not None:
        values = np.sort(values)
        twice = values[1:][values[1:] == values[:-1]]
        twice = twice[_within(twice, num_prompts)]  # padding may repeat
        if len(twice):
            raise ValueError(f"prompt_ids names prompt {twice[0]} twice: ids of one call are distinct")
    return ids


def checked_counts(counts: dict, release, prompt_ids, num_prompts: int) -> dict:
    """The counts of `update` by name, each as an array [U], None where there is none.

    Raises ValueError where a count is no integer, negative, not one a prompt, or larger than what it is part of.
    Counts of padding are not looked at.
    """
    arrays = {name: _integers(name, count) for name, count in counts.items() if count is not None}
    shape = (num_prompts,) if prompt_ids is None else prompt_ids.shape
    for name, array in arrays.items():
        if array.shape != shape:
            whose = f"all {num_prompts} prompts" if prompt_ids is None else f"{shape[0]} prompt_ids"
            raise ValueError(f"{name} has shape {array.shape}, not {shape}: give one count a prompt, for {whose}")
    if np.shape(release) not in ((), shape):
        raise ValueError(f"release has shape {np.shape(release)}, not () or {shape}: give one bool, or one a prompt")
    ids = None if prompt_ids is None else _readable(prompt_ids)
    if prompt_ids is None or ids is not None:
        values = {name: _readable(array) for name, array in arrays.items()}
        real = slice(None) if ids is None else _within(ids, num_prompts)
        _check_values({name: x[real] for name, x in values.items() if x is not None})
    return {**counts, **arrays}


def check_pass_rates(pass_rates, num_rollouts, num_prompts: int) -> None:
    """Raises ValueError where these are not a share for each prompt, or NaN, and what the shares are worth."""
    rates, worth = (jnp.asarray(x) if isinstance(x, Tracer) else np.asarray(x) for x in (pass_rates, num_rollouts))
    for name, array, shapes in (("pass_rates", rates, [(num_prompts,)]), ("num_rollouts", worth, [(), (num_prompts,)])):
        if array.shape not in shapes:
            raise ValueError(f"{name} has shape {array.shape}, not {shapes[-1]}: give one number a prompt")
    wrong = np.array([]) if isinstance(rates, Tracer) else rates[(rates < 0) | (rates > 1)]
    if len(wrong):
        raise ValueError(f"pass_rates holds {wrong[0]:g}: give shares in [0, 1], and NaN where one is not known")
    if not isinstance(worth, Tracer) and not ((worth >= 0) & (worth < np.inf)).all():
        raise ValueError(f"num_rollouts={num_rollouts} that a pass rate is worth must be finite and not negative")


def _check_values(counts: dict[str, np.ndarray]) -> None:
    """Raises ValueError on values of counts [U], without padding, that cannot be. A few reads over them, no more."""
    ordered = [name for name in ("num_correct", "num_evidence", "num_rollouts") if name in counts]
    for name in (*ordered[:1], *(name for name in counts if name not in ordered)):
        if counts[name].min(initial=0) < 0:
            raise ValueError(f"{name} holds {counts[name].min()}: a count is not negative")
    for part, whole in pairwise(ordered):  # so that none of them is negative either
        wrong = counts[part] > counts[whole]
        if wrong.any():
            found = f"{part} holds {counts[part][wrong][0]} where {whole} holds {counts[whole][wrong][0]}"
            raise ValueError(f"{found}: give 0 <= num_correct <= num_evidence <= num_rollouts")
    for name in ("num_rollouts", "num_tokens"):
        total = counts[name].sum(dtype=np.int64) if name in counts else 0
        if total >= 2**31:
            raise ValueError(f"{name} sums to {total}: a call takes in less than 2^31; settle in several calls")


def _integers(name: str, x):
    """A sequence or an array as an array. Raises ValueError where it holds anything but integers."""
    if not isinstance(x, np.ndarray | jax.Array):
        try:
            x = np.asarray(x)
        except jax.errors.TracerArrayConversionError:  # a list of traced numbers
            x = jnp.asarray(x)
    if x.dtype.kind not in "iu" and x.size:
        raise ValueError(f"{name} has dtype {x.dtype}: give integers, as from .astype(int)")
    return x


def _readable(x) -> np.ndarray | None:
    """The values of an array where reading them costs nothing, else None.

    Reading an array on an accelerator waits for it, and one spread over devices has to be gathered: those pass
    unchecked, as traced ones do. An array on the one CPU device is read where it lies.
    """
    if isinstance(x, np.ndarray):
        return x
    if isinstance(x, Tracer) or len(x.devices()) > 1 or next(iter(x.devices())).platform != "cpu":
        return None
    return np.asarray(x)


def _within(ids: np.ndarray, num_prompts: int) -> np.ndarray:
    """[P] bool, which ids are prompts and not padding."""
    return (ids >= 0) & (ids < num_prompts)
