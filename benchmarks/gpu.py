"""What one GPU makes of this project: decoding, training, attention, the allocator and the embedded task, in minutes.

    python benchmarks/gpu.py --out benchmarks/gpu.jsonl                           # everything
    python benchmarks/gpu.py --sections ceilings decode --out benchmarks/gpu.jsonl
    python benchmarks/gpu.py --sections --out benchmarks/gpu.jsonl                # nothing: prints the file's table
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --tiny --out /tmp/tiny.jsonl       # the same code at tiny shapes

Each section runs in a process of its own under a time limit, the embedded task on the CPU beside the others on half the
cores. A row is a line of the file as soon as it is measured, with the card, jax's version and the command; what fails,
crashes or is stopped is a row with its error. The table is of each section's latest run on a card.

- `ceilings`: bytes a second of a large copy, read and written, and FLOPs a second of a large bfloat16 matmul.
- `decode`: tokens a second of the sampler's call (prompts read, one window, copied to the host) and of that window
  alone. Bytes: weights once a step, keys and values of the tokens so far.
- `training`: the learner's step, FLOPs as 6 x parameters x tokens (what `remat` computes again is not counted).
- `attention`: forward and backward of causal attention alone.
- `allocator`: a round of allocate and update, beside reading and writing the state once.
- `kernels`: the seconds that the device's kernels take of a window and of a learner's step, by the profiler: what is
  left is launching and waiting.
- `embedded`, `embedded_cpu`: `python train.py configs/chain_sum.py`, start to end, nothing compiled before.

Weights and inputs are random. Seconds are medians after a first call; `compile s` is the compiler's time of a row, less
where JAX_COMPILATION_CACHE_DIR has what was compiled before.
"""

import argparse
import datetime
import gc
import itertools
import json
import operator
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from compiled import H100

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DATA_SHEETS = {  # NVIDIA's, by the name of the card: bytes a second of memory; FLOPs a second, dense bfloat16
    "NVIDIA H100 80GB HBM3": (H100[2], H100[1]),
    "NVIDIA H200": (4800e9, H100[1]),
}
SECTIONS = {  # seconds after which each is stopped, tiny ones aside
    "ceilings": 40,
    "decode": 90,
    "training": 120,
    "allocator": 60,
    "attention": 60,
    "embedded": 150,
    "kernels": 60,
    "embedded_cpu": 240,
}
ENVIRONMENTS = {
    "embedded": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # leaves the memory to train.py
    "embedded_cpu": {"JAX_PLATFORMS": "cpu"},
}


# --- a section in a process of its own ---


def measure(section: str, cases: str, tiny: bool, shared: dict, out: Path) -> None:
    """Append a line to `out` for each row of the section, and for what fails. cases: in the names of those wanted."""
    import jax
    from gpu_sections import FULL, MEASURES, TINY

    compiling = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("/backend_compile_duration"):
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    shared |= {"section": section, "card": jax.devices()[0].device_kind, "jax": jax.__version__}
    for case, rows in MEASURES[section](TINY if tiny else FULL).items():
        if cases not in case:
            continue
        compiling.clear()
        try:
            for row in rows():
                write(out, shared | {"case": case} | row | {"compile_seconds": sum(compiling)})
                compiling.clear()
        except Exception as error:  # costs this case
            said = " ".join(str(error).split())[:300].replace("|", "/")
            write(out, shared | {"case": case, "error": f"{type(error).__name__}: {said}"})
        gc.collect()


def write(out: Path, row: dict) -> None:
    """Append the row and show it."""
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    said = {name: value for name, value in row.items() if name not in ("began", "command", "card", "jax", "xla_flags")}
    print(json.dumps(said), file=sys.stderr, flush=True)


def run_sections(sections: list[str], cores: set[int], args: argparse.Namespace, shared: dict, begun: list) -> None:
    """One after the other, on these cores, each until its limit, or all of them until args.end (of time.monotonic).

    begun: gets their processes.
    """
    os.sched_setaffinity(0, cores)  # of this thread, and of the processes that it starts
    for section in sections:
        left = args.end - time.monotonic()
        limit = left if args.tiny else min(SECTIONS[section], left)
        if left < 5:
            write(args.out, shared | {"section": section, "error": f"not begun: --limit-s={args.limit_s} is used up"})
            continue
        given = [sys.executable, __file__, "--measure", section, "--shared", json.dumps(shared), f"--out={args.out}"]
        given.append(f"--cases={args.cases}")
        env = os.environ | ENVIRONMENTS.get(section, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"})
        process = subprocess.Popen(given + ["--tiny"] * args.tiny, env=env, start_new_session=True)
        begun.append(process)
        try:
            status, why = process.wait(limit), "ended with status"
        except subprocess.TimeoutExpired:
            kill(process)
            status, why = round(limit), "stopped at its limit, seconds:"
        if status:
            write(args.out, shared | {"section": section, "error": f"{why} {status}"})


def kill(process: subprocess.Popen) -> None:
    """A section's process, and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


# --- the table ---


def latest(rows: list[dict]) -> list[dict]:
    """Of each section on each card the rows of its last run; one that was stopped belongs to the card named before."""
    placed, where = [], {"card": "unknown", "jax": ""}
    for row in rows:
        where = {name: row.get(name, before) for name, before in where.items()}
        placed.append({"case": ""} | row | where)
    last = {(row["card"], row["section"]): row["began"] for row in placed}
    return [row for row in placed if last[row["card"], row["section"]] == row["began"]]


def table(rows: list[dict]) -> str:
    """The latest rows as Markdown, a table for each card."""
    lines = []
    card = operator.itemgetter("card")
    for name, rows_of_card in itertools.groupby(sorted(latest(rows), key=card), key=card):
        part = list(rows_of_card)
        tops = {row["case"]: row for row in part if row["section"] == "ceilings"}
        here = [tops.get(case, {}).get(unit) for case, unit in zip(("copy", "matmul"), UNITS, strict=True)]
        versions, commands = (dict.fromkeys(row[key] for row in part) for key in ("jax", "command"))
        lines += [f"\n{name}, jax {', '.join(versions)}: {' and '.join(f'`{each}`' for each in commands)}\n"]
        lines += [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
        lines += [line(row, here, DATA_SHEETS.get(name, (None, None))) for row in part]
    return "\n".join(lines)


HEAD = "| section | case | took | tokens/s | achieved | of the ceiling | of the data sheet | compile s | remarks |"
UNITS = {"bytes_per_second": "TB/s", "flops_per_second": "TFLOP/s"}


def line(row: dict, here: Any, sheet: Any) -> str:
    """A row of the table. here, sheet: bytes and FLOPs a second of the card, as measured and as published; or None."""
    name = ", ".join(filter(None, (row["case"], row.get("part"))))
    if "error" in row:
        return f"| {row['section']} | {name} | | | | | | | {row['error']} |"
    seconds, tokens = row["seconds"], row.get("tokens_per_second")
    cells = [f"{seconds:.1f} s" if seconds >= 5 else f"{1e3 * seconds:.3g} ms", f"{tokens:,.0f}" if tokens else ""]
    achieved = ["", "", ""]
    for unit, *tops in zip(UNITS, here, sheet, strict=True):
        if unit in row:
            achieved = [
                f"{row[unit] / 1e12:.3g} {UNITS[unit]}",
                *(f"{row[unit] / top:.0%}" if top else "" for top in tops),
            ]
    rest = [f"{row['compile_seconds']:.1f}", row.get("note", "").replace("|", "/")]
    return "| " + " | ".join([row["section"], name, *cells, *achieved, *rest]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, added to")
    parser.add_argument("--cases", default="", help="only those whose name holds this, such as 1.5b")
    parser.add_argument("--limit-s", type=float, default=240, help="seconds for all sections together")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the program anywhere")
    parser.add_argument("--measure", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--shared", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.cases, args.tiny, args.shared, args.out)
    shared = {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    args.end, cores, begun = time.monotonic() + args.limit_s, sorted(os.sched_getaffinity(0)), []
    lanes = [[name for name in args.sections if (name == "embedded_cpu") == on_cpu] for on_cpu in (False, True)]
    half = len(cores) // 2 if all(lanes) else 0
    threads = [
        threading.Thread(target=run_sections, args=(lane, set(part), args, shared, begun), daemon=True)
        for lane, part in zip(lanes, (cores[half:], cores[:half] or cores), strict=True)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C does not reach sections, which are sessions of their own
        for process in begun:
            kill(process)
    print(table([json.loads(line) for line in args.out.read_text().splitlines()]))
    return None


if __name__ == "__main__":
    main()
