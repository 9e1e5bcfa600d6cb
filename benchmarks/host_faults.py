"""What becomes of a run's processes when one dies, hangs or cannot save, and what several cost. Real ones, on CPU.

    python benchmarks/host_faults.py                 # all
    python benchmarks/host_faults.py dead hang

The run is a small one of two processes of a device each, which ends in less than a minute where nothing goes wrong.
Each fault prints what came out; ends with status 1 where something is not as it should be.
"""

import argparse
import itertools
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hosts import Ended, address, compile_once, first_difference, made, spawn, start, steps_of

AT_MOST = {"full": 150}  # seconds, in which the others end; 60, but for writers, who wait two minutes for each other
HANGS = """
import os, time
def on_one(question, completion, answer):
    if os.environ.get("JAX_PROCESS_ID") == "1":
        time.sleep(1000)
    return float(int(completion) % 3 == 0)
"""
PROMPTS = "1000", "100000", "1000000"  # of runs whose exchanges are counted


# --- a process of a run ---


def config_of(case: str, folder: Path):
    """The config of the small run, or of one like it."""
    from cero_jax.config import AllocatorConfig
    from cero_jax.sharding import MeshConfig
    from tests.two_hosts import JudgedInAPool, hosts_config

    if case == "hang":
        (folder / "hangs.py").write_text(HANGS)
        judged = JudgedInAPool(num_prompts=24, num_heldout=8, traces=str(folder), verifier="hangs:on_one")
        budget = AllocatorConfig(total_budget=48, num_epochs=3, min_group=2, max_group=8)
        return hosts_config(folder / "run", task=judged, allocator=budget)
    changes = {"split": {"mesh": MeshConfig(fsdp=2)}, "profiled": {"profile_steps": "2:4"}}.get(case, {})
    config = hosts_config(folder / "run", **changes)
    if case in PROMPTS:
        import dataclasses

        task: Any = config.task
        task = dataclasses.replace(task, num_prompts=int(case), easy_share=0.0, wrong_share=0.0)  # quick to draw
        config = dataclasses.replace(config, task=task)
    return config


def be_a_process(case: str, folder: Path, event: str) -> int:
    """Train. event: "" or WHAT:PROCESS:POINT:COUNT, as `arm` takes it."""
    import train
    from cero_jax import hosts
    from cero_jax.checkpoint import fail_at_once

    if event:
        arm(*event.split(":"))
    try:
        hosts.join()
        if case == "exchange":
            return time_exchanges()
        counted = count_bytes()
        status = train.main(config_of(case, folder))
    except Exception:
        fail_at_once(ValueError, OSError, FloatingPointError)
    if hosts.several():
        print(f"bytes gathered a step: {json.dumps(counted)}", flush=True)
    print(f"seconds of processor: {time.process_time()}", flush=True)
    return status


def arm(what: str, process: str, point: str, count: str) -> None:
    """As PROCESS passes a point the COUNT-th time, send it a signal, or let it write no more than 8 kB a file ("full").

    Points: a row of metrics is logged ("log"), a save has begun ("save").
    """
    import jax

    from cero_jax import checkpoint, run

    owner, name = {"log": (run.Run, "log"), "save": (checkpoint.Checkpoints, "save")}[point]
    original, passed = getattr(owner, name), itertools.count(1)

    def passing(*args):
        result = original(*args)
        if next(passed) == int(count) and jax.process_index() == int(process):
            print(f"happened at {time.time()}", flush=True)
            if what == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            else:
                os.kill(os.getpid(), signal.Signals[what])
        return result

    setattr(owner, name, passing)


def count_bytes() -> list[int]:
    """A list that grows with each step by the bytes that this process gathered in it, its own and others'."""
    import numpy as np
    from jax.experimental import multihost_utils

    from cero_jax import run

    gather, log_step, gathered, each = multihost_utils.process_allgather, run.Run.log_step, [0], []

    def gathering(value, **settings):
        found = gather(value, **settings)
        gathered[0] += np.asarray(found).nbytes
        return found

    def logging(*args, **settings):
        each.append(gathered[0] - sum(each))
        return log_step(*args, **settings)

    multihost_utils.process_allgather = gathering
    run.Run.log_step = logging  # type: ignore[method-assign]
    return each


def time_exchanges(rounds: int = 200) -> int:
    """Print what exchanges of two sizes take, over so many of them."""
    from cero_jax import hosts

    said = []
    for size in (100, 1_000_000):
        taken, began = [], time.process_time()
        for _ in range(rounds + 1):
            since = time.perf_counter()
            hosts.each_has(lambda size=size: b"x" * size)
            taken.append(time.perf_counter() - since)
        busy = (time.process_time() - began) / rounds
        said.append(f"{size:,} bytes: median {1e3 * statistics.median(taken):.1f} ms, {1e3 * busy:.1f} ms of processor")
    print(f"an exchange, of each process {'; '.join(said)}", flush=True)
    return 0


# --- what starts them ---


def started(case: str, folder: Path, processes: int = 2, devices: int = 2, event: str = "", **settings) -> Ended:
    """Run a case, as `start` of hosts.py does."""
    return start(__file__, case, folder, processes, devices, event, **settings)


def never_stopped(folder: Path, case: str = "small") -> Path:
    """The folder of a run by two processes to which nothing happens, which is made once."""
    whole = folder.parent / f"whole-{case}"
    if not whole.exists():
        end = started(case, whole)
        assert end.statuses == [0, 0], end.printed
    return whole


def happened(end: Ended) -> float:
    """When a process said that it happened."""
    lines = itertools.chain(*(text.splitlines() for text in end.printed))
    return float(next(line for line in lines if line.startswith("happened at ")).split()[-1])


def last_words(printed: str) -> list[str]:
    """What a process said of its end: our line, and JAX's with the line behind it."""
    lines = printed.splitlines()
    fatal = next((i for i, line in enumerate(lines) if "Terminating process" in line), len(lines))
    said = [line for line in lines if line.startswith(("error: ", "warning: ")) or "stopped and saved" in line]
    return said + lines[fatal : fatal + 2]


def gone(folder: Path, what: str, process: int, point: str = "log", count: int = 10, case: str = "small") -> bool:
    """One process is killed, stopped or can save no more: the other ends, and the same command goes on as if not."""
    before = never_stopped(folder, case)
    end = started(case, folder, event=f"{what}:{process}:{point}:{count}")
    since, other = happened(end), 1 - process
    took, its_own = end.at[other] - since, end.at[process] - end.at[other]
    there = sorted(path.name for path in (folder / "run/checkpoints").glob("[0-9]*"))
    again = started(case, folder)
    alike = again.statuses == [0, 0] and made(folder) == made(before)
    print(
        f"{what} to process {process} at {point} {count}: the other ended {took:.0f} s later with status "
        f"{end.statuses[other]}, itself {its_own:+.0f} s after it with {end.statuses[process]}; checkpoints then: "
        f"{' '.join(there) or 'none'}; the same command ends "
        f"{'as the run never stopped, to the bit' if alike else f'OTHERWISE {again.statuses}'}"
    )
    for index, text in enumerate(end.printed):
        print("\n".join(f"    process {index}: {line[:600]}" for line in last_words(text)), flush=True)
    return 0 < took < AT_MOST.get(what, 60) and 0 not in end.statuses and end.at[process] > 0 and alike


def restarted(folder: Path, most: int = 10) -> bool:
    """Each process is started again two seconds after it fails, as Kubernetes does; one is killed in its first life."""
    before, where = never_stopped(folder), address()
    folder.mkdir(parents=True)
    command = [sys.executable, __file__, "--child", "small", "2", str(folder)]
    events, began, lives = ["", "SIGKILL:1:log:10"], time.time(), [1, 1]
    processes = [spawn([*command, events[index]], folder, where, index, 2, 2) for index in range(2)]
    while any((status := process.poll()) is None or status for process in processes) and max(lives) <= most:
        for index, process in enumerate(processes):
            if process.poll():  # it has failed
                time.sleep(2)
                processes[index] = spawn([*command, ""], folder, where, index, 2, 2)
                lives[index] += 1
        time.sleep(0.1)
    for process in processes:
        process.kill()
    alike = [process.wait() for process in processes] == [0, 0] and made(folder) == made(before)
    print(
        f"process 1 killed, and each started again as it fails: {lives} lives, {time.time() - began:.0f} s, the end is "
        f"{'that of the run never stopped, to the bit' if alike else 'ANOTHER'}",
        flush=True,
    )
    return alike


def profiled(folder: Path) -> bool:
    """A trace of steps 2 and 3, by each process."""
    end = started("profiled", folder)
    sizes = {str(path.relative_to(folder / "run")): path.stat().st_size for path in folder.rglob("*.xplane.pb")}
    print(f"traces: statuses {end.statuses}, bytes {sizes}", flush=True)
    return end.statuses == [0, 0] and len(sizes) == 2


def absent(folder: Path, process: int) -> bool:
    """One process is never started: the other says so, and ends."""
    end = started("small", folder, absent=process)
    print(f"process {process} is not started: the other ended after {end.at[0] - end.began:.0f} s with "
          f"status {end.statuses}")  # fmt: skip
    print("\n".join(f"    {line[:600]}" for line in end.printed[0].splitlines()), flush=True)
    return end.statuses[0] not in (0, -9)


def hang(folder: Path) -> bool:
    """A verifier that never answers, on one host: its answers time out there, and the run goes on to its end."""
    end = started("hang", folder)
    status = [row["status"] for row in steps_of(folder)] if end.statuses == [0, 0] else []
    timed_out, judged = (sum(each[name] for each in status) for name in ("timed out", "right"))
    print(
        f"a verifier hangs on one host: statuses {end.statuses}, {timed_out} answers timed out, {judged} were right, "
        f"{max(end.at) - end.began:.0f} s",
        flush=True,
    )
    return end.statuses == [0, 0] and timed_out > 0 < judged


def damaged(folder: Path) -> bool:
    """The newest checkpoint has other bytes than were saved: both put it aside and go on from the one before."""
    whole = never_stopped(folder)
    first = started("small", folder, event="SIGTERM:1:log:14")
    newest = max((folder / "run/checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for arrays in (path for path in newest.rglob("d/*") if path.is_file()):
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 4
        arrays.write_bytes(content)
    again = started("small", folder)
    said = sum("put aside" in printed for printed in again.printed)
    alike = again.statuses == [0, 0] and made(folder) == made(whole)
    print(
        f"a damaged checkpoint: statuses {again.statuses}, said by {said} of 2 processes; the end is "
        f"{'that of the run never damaged, to the bit' if alike else 'ANOTHER'}",
        flush=True,
    )
    return alike and said == 1 and first.statuses == [143, 143]


def exchange(folder: Path) -> bool:
    """What an exchange between two processes costs."""
    end = started("exchange", folder)
    print(end.printed[0].splitlines()[-1] if end.statuses == [0, 0] else f"FAILED: {end.printed}", flush=True)
    return end.statuses == [0, 0]


def overhead(folder: Path) -> bool:
    """What a second process costs a step, and whether what is gathered grows with prompts or with steps."""
    ends = {"one process": started("small", folder / "one process", 1, 2)}
    ends |= {case: started(case, folder / case) for case in ("small", *PROMPTS)}
    most = []
    for name, end in ends.items():
        lines = (folder / name / "run/timings.jsonl").read_text().splitlines()
        seconds = statistics.median(row["batch_seconds"] for row in map(json.loads, lines) if "batch_seconds" in row)
        said = [line.partition(": ")[2] for line in end.printed[0].splitlines()]
        words = f"a step {1e3 * seconds:.0f} ms (median); processor {float(said[-1]):.0f} s a process"
        if name != "one process":
            gathered = json.loads(said[-2])
            half = len(gathered) // 2
            most.append(max(gathered))
            words += f"; gathered a step {statistics.median(gathered):,.0f} bytes, at most {max(gathered[:half]):,} in "
            words += f"the first half of {len(gathered)} steps and {max(gathered[half:]):,} in the second"
            name = f"two processes, {24 if name == 'small' else int(name):,} prompts"
        print(f"{name}: {words}", flush=True)
    return all(not any(end.statuses) for end in ends.values()) and max(most) < 1.2 * min(most)


def elastic(folder: Path) -> bool:
    """Two processes, then one with one device, then one with four: each stopped by SIGTERM but the last."""
    whole = never_stopped(folder)
    ends = [
        started("small", folder, event="SIGTERM:1:log:6"),
        started("small", folder, 1, 1, event="SIGTERM:0:log:8"),
        started("small", folder, 1, 4),
    ]
    statuses = [end.statuses for end in ends]
    rows, expected = steps_of(folder), steps_of(whole)
    drawn = sum(sum(row["num_rollouts"]) for row in rows)
    same = [row["prompt_ids"] + row["num_rollouts"] for row in rows] == [
        row["prompt_ids"] + row["num_rollouts"] for row in expected
    ]
    bits = "all metrics, too" if rows == expected else f"other bits {first_difference(folder, whole)}"
    print(
        f"2 processes, then 1 device, then 4: statuses {statuses}; {drawn} rollouts drawn, {rows[-1]['spent']} spent "
        f"of 240; who got them is {'the same' if same else 'OTHERWISE'} as with 2 processes throughout; {bits}",
        flush=True,
    )
    return statuses == [[143, 143], [143], [0]] and drawn == rows[-1]["spent"] == 240 and same


FAULTS = {
    "dead": lambda folder: gone(folder, "SIGKILL", 1),
    "dead_first": lambda folder: gone(folder, "SIGKILL", 0),
    "dead_in_save": lambda folder: gone(folder, "SIGKILL", 0, "save", 2),
    "stopped": lambda folder: gone(folder, "SIGSTOP", 1),
    "stopped_first": lambda folder: gone(folder, "SIGSTOP", 0),
    "full": lambda folder: gone(folder, "full", 1, "save", 1, "split"),
    "restarted": restarted,
    "absent": lambda folder: absent(folder, 1),
    "absent_first": lambda folder: absent(folder, 0),
    "damaged": damaged,
    "hang": hang,
    "elastic": elastic,
    "profiled": profiled,
    "exchange": exchange,
    "overhead": overhead,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=list(FAULTS), help=", ".join(FAULTS))
    folder = Path(tempfile.mkdtemp())
    compile_once(folder)
    good = [FAULTS[name](folder / name) for name in parser.parse_args().faults]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(be_a_process(sys.argv[2], Path(sys.argv[4]), sys.argv[5]))
    main()
