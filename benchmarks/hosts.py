"""Are several processes one run, to the bit, and what becomes of them when one dies? With real processes, on CPU.

    python benchmarks/hosts.py                            # every case with 2 and 4 processes, then every fault
    python benchmarks/hosts.py --cases fsdp --processes 2
    python benchmarks/hosts.py --faults dead hang

A case is run by N processes of one device each and by one process of N devices: metrics.jsonl, the checksums of all
saved arrays, the exported weights and the samples of an evaluation have to be the same. It is
the host's arithmetic that is compared: on CPU, where processes add over sockets (Gloo). Ends with status 1 where
something is not as it should be.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
HANGS = """
import os, time
def on_one(question, completion, answer):
    if os.environ.get("JAX_PROCESS_ID") == "1":
        time.sleep(1000)
    return float(len(completion) % 2 == 0)
"""


# --- a process of a run ---


def config_of(case: str, devices: int, folder: Path):
    """The config of a case; the folder holds its data and its runs."""
    from cero_jax.config import AllocatorConfig
    from cero_jax.evaluation import EvaluationConfig
    from cero_jax.learner import LearnerConfig
    from cero_jax.sampler import SamplerConfig
    from cero_jax.sharding import MeshConfig
    from cero_jax.tasks.dataset import Dataset
    from cero_jax.warm_start import WarmStartConfig
    from tests.tiny_run import tiny_config
    from tests.two_hosts import hosts_config

    budget = AllocatorConfig(total_budget=96, num_epochs=3, min_group=2, max_group=8)
    at_the_end = EvaluationConfig(every_rollouts=96, samples=2, rows=16)
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"question": f"{i} + 1 =", "answer": str(i + 1)}) for i in range(12)))
    own = Dataset(path=str(rows), max_prompt_tokens=12, num_heldout=4, verifier="user_verifiers:even_length")
    file = {
        "task": own,
        "model_folder": str(ROOT / "tests/fixtures/qwen2"),
        "allocator": budget,
        "sampler": SamplerConfig(max_completion_tokens=6),
        "warm_start": WarmStartConfig(),
        "evaluation": at_the_end,
    }
    half = 2 if devices > 2 else 1  # of the rows, where the other axis takes two
    by_case = {
        # from a warm start; steps of live groups only
        "data": {"dynamic_sampling": True, "allocator": budget, "evaluation": at_the_end},
        # LoRA with a KL term, two steps a batch, a verifier of one's own, weights read and exported
        "fsdp": file
        | {
            "learner": LearnerConfig(rows_per_step=16, kl_coef=0.1, steps_per_batch=2),
            "mesh": MeshConfig(fsdp=devices),
        },
        "tensor": file | {"learner": LearnerConfig(rows_per_step=16), "mesh": MeshConfig(data=half, tensor=2)},
    }
    if case == "small":  # of which the faults are made
        return hosts_config(folder / "run")
    if case == "hang":
        import dataclasses

        one = dataclasses.replace(own, verifier="hangs:on_one", verifier_seconds=1.0)
        return tiny_config(folder / "run", **(file | {"task": one}))
    config = tiny_config(folder / "run", **by_case[case])
    if case == "fsdp":
        import dataclasses

        config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora_rank=2))
    return config


def be_a_process(case: str, devices: int, folder: Path, event: str) -> int:
    """Train, and evaluate what was trained. event: "" or SIGNAL:PROCESS:ROW, sent to itself at that row of metrics."""
    import jax

    import train
    from cero_jax import evaluate, hosts, run
    from cero_jax.checkpoint import fail_at_once

    hosts.join()
    if case == "exchange":
        return time_exchanges()
    if event:
        number, process, row = map(int, event.split(":"))
        log, passed = run.Run.log, []

        def counting(*args):
            passed.append(1)
            if len(passed) == row and jax.process_index() == process:
                print(f"sent at {time.time()}", flush=True)
                os.kill(os.getpid(), number)
            log(*args)

        run.Run.log = counting  # type: ignore[method-assign]
    try:
        status = train.main(config_of(case, devices, folder))
    except Exception:
        fail_at_once(ValueError, OSError, FloatingPointError)
    if status == 0 and case != "small":
        evaluate.main([str(folder / "run"), "--samples=2", "--rows=16", f"--output={folder}/samples.jsonl"])
    return status


def time_exchanges(rounds: int = 200) -> int:
    """Print what exchanges of two sizes take, over so many of them."""
    import statistics

    from cero_jax import hosts

    said = []
    for size in (100, 1_000_000):
        taken, began = [], time.process_time()
        for _ in range(rounds + 1):
            start = time.perf_counter()
            hosts.each_has(lambda size=size: b"x" * size)
            taken.append(time.perf_counter() - start)
        busy = (time.process_time() - began) / rounds
        said.append(f"{size:,} bytes: median {1e3 * statistics.median(taken):.1f} ms, {1e3 * busy:.1f} ms of processor")
    print(f"an exchange, of each process {'; '.join(said)}", flush=True)
    return 0


# --- what starts them ---


class Ended(NamedTuple):
    """A run of several processes that has ended."""

    statuses: list[int]
    seconds: list[float]  # until each ended
    printed: list[str]
    began: float


def start(case: str, folder: Path, processes: int, devices: int, event: str = "", seconds: float = 3600) -> Ended:
    """Run a case to its end by so many processes, of so many devices in all."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)} if processes > 1 else {}
    settings = {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "8",  # fixes the size of XLA's thread pool, and with it the bits of a matrix product
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        "PYTHONPATH": f"{ROOT / 'tests'}:{folder}",
    }
    command = [sys.executable, __file__, "--child", case, str(devices), str(folder), event]
    began, outputs, started = time.time(), [], []
    for index in range(processes):
        outputs.append(open(folder / f"printed-{index}", "w+"))  # noqa: SIM115 (closed below)
        own = {"JAX_PROCESS_ID": str(index)} if several else {}
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=os.environ | settings | several | own, stdout=outputs[-1], stderr=outputs[-1]
            )
        )
    ended = [0.0] * processes
    while (running := [i for i in range(processes) if not ended[i]]) and time.time() < began + seconds:
        for index in running:
            if started[index].poll() is not None:
                ended[index] = time.time() - began
        time.sleep(0.05)
    for process in started:
        process.kill()
    printed = []
    for output in outputs:
        output.seek(0)
        printed.append(output.read())
        output.close()
    return Ended([process.wait() for process in started], ended, printed, began)


def made(folder: Path) -> dict[str, str]:
    """What a run left, by its parts: a hash of each."""
    newest = max((folder / "run/checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    parts = {
        "metrics": (folder / "run/metrics.jsonl").read_bytes(),
        "state": json.dumps(json.loads((newest / "cursor/metadata").read_text())["arrays"]).encode(),
    }
    if (folder / "samples.jsonl").exists():
        parts["evaluation"] = (folder / "samples.jsonl").read_bytes()
    for weights in folder.glob("run/export-*/model.safetensors"):
        parts["export"] = weights.read_bytes()
    return {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}


def steps_of(folder: Path) -> list[dict]:
    """The rows of a run's steps."""
    rows = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "step"]


def first_difference(one: Path, other: Path) -> str:
    """Where two runs part, in words."""
    for mine, theirs in zip(steps_of(one), steps_of(other), strict=False):
        names = [name for name in mine if mine[name] != theirs.get(name)]
        if names:
            return f"from step {mine['step']} on: {', '.join(names)}"
    return "in no step's metrics"


def compare(case: str, processes: int, folder: Path) -> bool:
    """Run a case by several processes and by one, and print a row of a table: whether they end alike."""
    several, one = folder / f"{case}-{processes}", folder / f"{case}-{processes}-by-one"
    ends = [start(case, several, processes, processes), start(case, one, 1, processes)]
    if any(status for end in ends for status in end.statuses):
        print(f"| {case} | {processes} | FAILED: {[end.statuses for end in ends]}, {several}/printed-* | |", flush=True)
        return False
    first, second = made(several), made(one)
    differ = [name for name in first if first[name] != second.get(name)]
    said = "identical: " + ", ".join(first) if not differ else f"{', '.join(differ)} differ, "
    said += first_difference(several, one) if differ else ""
    print(f"| {case} | {processes} | {said} | {max(ends[0].seconds):.0f} s, {max(ends[1].seconds):.0f} s |", flush=True)
    return not differ


# --- faults ---


def never_stopped(folder: Path) -> Path:
    """The folder of a small run by two processes, which is made once."""
    whole = folder.parent / "whole"
    if not whole.exists():
        end = start("small", whole, 2, 2)
        assert end.statuses == [0, 0], end.printed
    return whole


def dead(folder: Path, process: int) -> bool:
    """One process is killed; the other ends soon, says which is dead, and the same command ends as if nothing was."""
    before = never_stopped(folder)
    after = start("small", folder / "cut", 2, 2, f"{int(signal.SIGKILL)}:{process}:10")
    other = 1 - process
    took = after.seconds[other] - after.seconds[process]
    lines = after.printed[other].splitlines()
    fatal = next((i for i, line in enumerate(lines) if "Terminating process" in line), len(lines))
    words = [line for line in lines if line.startswith("error: ")] + lines[fatal : fatal + 2]
    again = start("small", folder / "cut", 2, 2)
    alike = again.statuses == [0, 0] and made(folder / "cut") == made(before)
    print(
        f"process {process} killed: the other ended after {took:.0f} s with status {after.statuses[other]}; the same "
        f"command ends {'as the run never stopped, to the bit' if alike else f'OTHERWISE {again.statuses}'}; it said:"
    )
    print("\n".join(f"    {line[-400:]}" for line in words), flush=True)
    return took < 60 and after.statuses[other] != 0 and alike


def hang(folder: Path) -> bool:
    """A verifier that never answers, on one host: its answers time out there, and the run goes on to its end."""
    folder.mkdir(parents=True)
    (folder / "hangs.py").write_text(HANGS)
    end = start("hang", folder, 2, 2)
    status = [row["status"] for row in steps_of(folder)] if end.statuses == [0, 0] else []
    timed_out, judged = (sum(each[name] for each in status) for name in ("timed out", "right"))
    print(
        f"a verifier hangs on one host: statuses {end.statuses}, {timed_out} answers timed out, {judged} were right, "
        f"{max(end.seconds):.0f} s",
        flush=True,
    )
    return end.statuses == [0, 0] and timed_out > 0 < judged


def damaged(folder: Path) -> bool:
    """The newest checkpoint has other bytes than were saved: both put it aside and go on from the one before."""
    whole = never_stopped(folder)
    first = start("small", folder / "cut", 2, 2, f"{int(signal.SIGTERM)}:1:14")
    newest = max((folder / "cut/run/checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for arrays in (path for path in newest.rglob("d/*") if path.is_file()):
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 4
        arrays.write_bytes(content)
    again = start("small", folder / "cut", 2, 2)
    said = sum("put aside" in printed for printed in again.printed)
    alike = again.statuses == [0, 0] and made(folder / "cut") == made(whole)
    print(
        f"a damaged checkpoint: statuses {again.statuses}, said by {said} of 2 processes; the end is "
        f"{'that of the run never damaged, to the bit' if alike else 'ANOTHER'}, {max(again.seconds):.0f} s",
        flush=True,
    )
    return alike and said == 1 and first.statuses == [143, 143]


def exchange(folder: Path) -> bool:
    """What an exchange between two processes costs."""
    end = start("exchange", folder, 2, 2)
    print(end.printed[0].splitlines()[-1] if end.statuses == [0, 0] else f"FAILED: {end.printed}", flush=True)
    return end.statuses == [0, 0]


def elastic(folder: Path) -> bool:
    """Two processes, then one with one device, then one with four: each stopped by SIGTERM but the last."""
    whole = never_stopped(folder)
    first = start("small", folder / "cut", 2, 2, f"{int(signal.SIGTERM)}:1:6")
    second = start("small", folder / "cut", 1, 1, f"{int(signal.SIGTERM)}:0:8")
    third = start("small", folder / "cut", 1, 4)
    ends = [first.statuses, second.statuses, third.statuses]
    rows, expected = steps_of(folder / "cut"), steps_of(whole)
    drawn = sum(sum(row["num_rollouts"]) for row in rows)
    same = [row["prompt_ids"] + row["num_rollouts"] for row in rows] == [
        row["prompt_ids"] + row["num_rollouts"] for row in expected
    ]
    bits = "all metrics, too" if rows == expected else f"other bits {first_difference(folder / 'cut', whole)}"
    print(
        f"2 processes, then 1 device, then 4: statuses {ends}; {drawn} rollouts drawn, {rows[-1]['spent']} spent of "
        f"240; who got them is {'the same' if same else 'OTHERWISE'} as with 2 processes throughout; {bits}",
        flush=True,
    )
    return ends == [[143, 143], [143], [0]] and drawn == rows[-1]["spent"] == 240


FAULTS = {
    "dead": lambda folder: dead(folder, 1),
    "dead_first": lambda folder: dead(folder, 0),
    "damaged": damaged,
    "hang": hang,
    "exchange": exchange,
    "elastic": elastic,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["data", "fsdp", "tensor"])
    parser.add_argument("--processes", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=FAULTS)
    args, folder = parser.parse_args(), Path(tempfile.mkdtemp())
    if args.cases:
        print("| case | processes | beside one process with as many devices | seconds, both |\n|---|---|---|---|")
    good = [compare(case, number, folder) for case in args.cases for number in args.processes]
    good += [FAULTS[name](folder / name) for name in args.faults]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(be_a_process(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]))
    main()
