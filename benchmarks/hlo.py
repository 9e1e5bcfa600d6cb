"""What a compiled program does, read from its text: what chips send each other, what they multiply, how often.

The text is of one chip's program (`compiled.as_text()`). A loop's body stands there once; here its instructions count
as often as the loop runs them, which the compiler's own `cost_analysis` does not.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2}  # bytes; others end in their bits
# Attention kernels, by their place in the name of an instruction or of its target: how many products of [T, T] with
# [T, Dh] they compute for each head, some of them again for the gradient. The first that fits.
KERNELS = {"fmhaSoftmaxBackward": 5, "fmhaSoftmax": 2, "splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)(?=\s[\w\-]+\()|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]\w*?\d+\w*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of the text."""

    name: str
    shape: str  # of the result: one, or several in brackets
    kind: str  # dot, fusion, all-gather, ...
    operands: tuple[str, ...]  # names
    rest: str  # the attributes behind the operands
    computation: str  # that it stands in
    times: int  # that the program runs it


class Collective(NamedTuple):
    """Chips exchanging an array."""

    kind: str  # one of COLLECTIVES
    bytes: float  # of the whole array, as each chip has it before or after, whichever is more; once
    shapes: tuple[tuple[int, ...], ...]
    group: int  # chips that exchange
    times: int
    source: str  # the operation that asked for it


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, sizes) of each array in a result's shape."""
    return [(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in _SHAPE.findall(text)]


def size(dtype: str, sizes: tuple[int, ...]) -> float:
    """Bytes of an array."""
    return math.prod(sizes) * (SIZES[dtype] if dtype in SIZES else int(re.findall(r"\d+", dtype)[0]) / 8)


def instructions(text: str) -> list[Instruction]:
    """Every instruction that the program runs. Raises ValueError for a loop whose number of rounds is not said."""
    bodies, entry = _computations(text)
    return list(_walk(bodies, entry, 1))


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    bodies, entry, name = {}, "", ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head and "=" not in line.split("(")[0]:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif (found := _INSTRUCTION.match(line)) and name:
            inside, rest = _split(found[4])
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            if found[3] in ("constant", "parameter"):
                rest = inside
            bodies[name].append(Instruction(found[1], found[2], found[3], operands, rest, name, 1))
    return bodies, entry


def _split(rest: str) -> tuple[str, str]:
    """What stands between the brackets of an instruction, and what follows."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter in "({") - (letter in ")}")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def _walk(bodies: dict[str, list[Instruction]], name: str, times: int) -> Iterator[Instruction]:
    for each in bodies.get(name, []):
        yield each._replace(times=times)
        if each.kind == "while":
            yield from _walk(bodies, _attribute(each, "body"), times * _rounds(each, bodies))
        elif each.kind in ("fusion", "call", "async-start"):
            yield from _walk(bodies, _attribute(each, "calls") or _attribute(each, "to_apply"), times)
        elif each.kind == "conditional":
            branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", each.rest)
            branches += re.findall(r"%?([\w.\-]+)", _list(each, "branch_computations"))
            for branch in branches:
                yield from _walk(bodies, branch, times)


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.rest)
    return found[1] if found else ""


def _list(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=\{{([^}}]*)\}}", instruction.rest)
    return found[1] if found else ""


def _rounds(loop: Instruction, bodies: dict[str, list[Instruction]]) -> int:
    """How often a loop runs: as the compiler notes it, or the largest number that its condition compares with, over
    what a round adds to its counter.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = list(_walk(bodies, _attribute(loop, "condition"), 1))
    limits = [int(each.rest) for each in condition if each.kind == "constant" and re.fullmatch(r"\d+", each.rest)]
    if not limits:
        raise ValueError(f"the loop {loop.name} does not say how often it runs: {loop.rest[:200]}")
    return -(-max(limits) // _step(loop, bodies))


def _step(loop: Instruction, bodies: dict[str, list[Instruction]]) -> int:
    """What a round adds to the number that the loop's condition looks at: 1, where the text does not say."""
    looks_at = [each for each in bodies[_attribute(loop, "condition")] if each.kind == "get-tuple-element"]
    body = {each.name: each for each in bodies[_attribute(loop, "body")]}
    result = list(body.values())[-1]
    if len(looks_at) != 1 or result.kind != "tuple":
        return 1
    index = re.search(r"index=(\d+)", looks_at[0].rest)
    counter = body.get(result.operands[int(index[1])]) if index else None
    added = [body[name].rest for name in counter.operands if name in body] if counter and counter.kind == "add" else []
    return next((int(number) for number in added if re.fullmatch(r"\d+", number)), 1)


def collectives(program: list[Instruction]) -> list[Collective]:
    """What chips exchange. A pair of start and done counts once."""
    shape_of = {(each.computation, each.name): each.shape for each in program}
    found = []
    for each in program:
        kind = each.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        arrays = [shapes(shape_of.get((each.computation, name), "")) for name in each.operands]
        before = [array for operand in arrays for array in operand]
        after = shapes(each.shape)
        if each.kind.endswith("-start"):  # its result holds the operands as well
            after = after[len(before) :] or after
        most = max(before, after, key=lambda arrays: sum(size(*array) for array in arrays))
        found.append(
            Collective(
                # TPUs write a reduce-scatter as an all-reduce in a computation so named
                kind="reduce-scatter" if kind == "all-reduce" and "reduce-scatter" in each.computation else kind,
                bytes=sum(size(*array) for array in most),
                shapes=tuple(sizes for _, sizes in most),
                group=_group(each.rest),
                times=each.times,
                source=next(iter(re.findall(r'op_name="([^"]*)"', each.rest)), ""),
            )
        )
    return found


def _group(rest: str) -> int:
    """Chips of each group that exchanges."""
    if short := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(short[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?(?:\{([^}]*)\})?", rest):  # a mesh, and axes of it
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2] or named[1]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    return 2  # a permutation: from one chip to another


def sent(found: list[Collective]) -> float:
    """Bytes that each chip sends: of n chips in a ring, (n - 1) / n of the array, twice for an all-reduce."""
    return sum(
        each.times * each.bytes * (each.group - 1) / each.group * (2 if each.kind == "all-reduce" else 1)
        for each in found
    )


def by_kind(found: list[Collective]) -> dict[str, float]:
    """Bytes of each kind, all times together."""
    total: dict[str, float] = dict.fromkeys((each.kind for each in found), 0)
    for each in found:
        total[each.kind] += each.times * each.bytes
    return total


def flops(program: list[Instruction]) -> float:
    """Floating-point operations of matrix products on one chip, two for each multiplication and addition.

    Of attention kernels half of all scores, which a causal one needs: a window is not taken off.
    """
    shape_of = {(each.computation, each.name): each.shape for each in program}
    total = 0.0
    for each in program:
        if kernel := _kernel(each):
            total += each.times * KERNELS[kernel] * _scores(each)
            continue
        by_library = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', each.rest)  # as GPUs write products
        if each.kind not in ("dot", "convolution") and not by_library:
            continue
        out = math.prod(shapes(each.shape)[0][1])
        left, right = (shapes(shape_of[each.computation, name])[0][1] for name in each.operands[:2])
        if each.kind == "convolution":
            summed = _summed(each.rest, left, right, shapes(each.shape)[0][1])
        else:
            axes = by_library[1] if by_library else _list(each, "lhs_contracting_dims")
            summed = math.prod(left[int(axis)] for axis in re.findall(r"\d+", axes))
        total += 2.0 * each.times * out * summed
    return total


def _summed(rest: str, image: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Products that are summed for a value of a convolution on average: input features times places of its window.

    TPUs write matrix products so. A window that reaches into padding, or between the places of a dilated axis, stands
    for an axis that only one side has, or for a batch: there it sums nothing.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels
    summed = float(kernel[labels[2].index("i")])
    window = re.search(r"window=\{([^}]*)\}", rest)
    if not window:
        return summed
    given = {name: values.split("x") for name, values in re.findall(r"(\w+)=([\d_x\-]+)", window[1])}
    for axis in range(len(given["size"])):
        stride, dilated, apart = (
            int(given[n][axis]) if n in given else 1 for n in ("stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(given["pad"][axis].split("_")[0]) if "pad" in given else 0
        places, outs = image[labels[1].index(str(axis))], out[labels[3].index(str(axis))]
        summed *= _met(places, outs, int(given["size"][axis]), stride, before, dilated, apart)
    return summed


def _met(places: int, outs: int, window: int, stride: int, before: int, dilated: int, apart: int) -> float:
    """Of a window's places along an axis, how many meet a place of the image, on average over the results."""
    length, met = (places - 1) * dilated + 1, 0
    for first in range(-before, window * apart - before, apart):
        at = range(first, first + outs * stride, stride)
        met += sum(0 <= place < length and place % dilated == 0 for place in at)
    return met / outs


def _kernel(each: Instruction) -> str:
    """The attention kernel that an instruction calls; "" for others."""
    if each.kind != "custom-call":
        return ""
    target = re.search(r'custom_call_target="([^"]+)"', each.rest)
    return next((name for name in KERNELS if name in each.name or (target and name in target[1])), "")


def _scores(each: Instruction) -> float:
    """Multiplications and additions of one product that an attention kernel computes for all heads: causal, half."""
    operands = shapes(each.rest.split("operand_layout_constraints=")[1])
    queries = next(sizes for dtype, sizes in operands if dtype in ("bf16", "f16", "f32") and sizes[2:])
    # cuDNN: [B, T, H, Dh]; splash: [..., H, T, Dh]
    return math.prod(queries) * queries[1 if "fmha" in each.rest else -2]


def kernels(program: list[Instruction]) -> list[str]:
    """The names of the attention kernels that the program calls."""
    return sorted({name for each in program if (name := _kernel(each))})


def squares(program: list[Instruction], length: int) -> list[str]:
    """The shapes with two axes of that length, or of it filled up to a kernel's blocks: scores and masks."""
    axes = [-(-length // block) * block for block in (1, 2, 128, 256, 512)]
    found = {(dtype, sizes) for each in program for dtype, sizes in shapes(each.shape)}
    square = [array for array in found if sum(size in axes for size in array[1]) >= 2]
    return [f"{dtype}{list(sizes)}" for dtype, sizes in sorted(square, key=lambda array: -size(*array))]
