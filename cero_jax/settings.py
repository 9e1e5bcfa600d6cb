"""Settings of a wrong type or size, refused where they are made: a user's file or a saved run may hold anything."""

import dataclasses
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST = 3e38  # of a setting that is no integer: what it meets is float32
PLAIN = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text", NoneType: "None"}


def check(settings: Any, **ranges: tuple[float, float]) -> None:
    """Raise ValueError, naming the field, where a value of a dataclass is not of the field's type or out of its range.

    A float is finite in float32, too, and may be written as an integer; True is no number. Types other than these,
    None, text, tuples, Literal, unions of them and dataclasses are the user's own, and are not looked at.

    ranges: the least and the largest value of a field that is not None.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _fits(value, kind):
            raise ValueError(f"{type(settings).__name__}: {name}={value!r:.80} must be {_words(kind)}")
    for name, (least, most) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{type(settings).__name__}: {name}={value} must be >= {least:.10g} and <= {most:.10g}")


def _fits(value: Any, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    if kind in PLAIN or (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return isinstance(value, kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        kinds = inner[:1] * len(value) if inner[-1] is ... and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    return True


def _words(kind: Any) -> str:
    """A type for a person to read."""
    if kind in PLAIN:
        return PLAIN[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_words, inner))
    if origin is tuple:
        return (
            f"a tuple, each of it {_words(inner[0])}"
            if inner[-1] is ...
            else f"a tuple of {', '.join(map(_words, inner))}"
        )
    return f"a {kind.__name__}"
