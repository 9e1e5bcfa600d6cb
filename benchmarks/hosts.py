"""Are several processes one run, to the bit? With real processes, on CPU.

    python benchmarks/hosts.py                            # every case with 2 and 4 processes
    python benchmarks/hosts.py --cases fsdp --processes 2

A case is run by N processes of one device each and by one process of N devices: metrics.jsonl, the checksums of all
saved arrays, the exported weights and the samples of an evaluation have to be the same. It is the host's arithmetic
that is compared: on CPU, where processes add over sockets (Gloo). Ends with status 1 where something is not as it
should be. What becomes of processes when one dies: host_faults.py.
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
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


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
    config = tiny_config(folder / "run", **by_case[case])
    if case == "fsdp":
        import dataclasses

        config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora_rank=2))
    return config


def be_a_process(case: str, devices: int, folder: Path) -> int:
    """Train, and evaluate what was trained."""
    import train
    from cero_jax import evaluate, hosts
    from cero_jax.checkpoint import fail_at_once

    hosts.join()
    try:
        status = train.main(config_of(case, devices, folder))
    except Exception:
        fail_at_once(ValueError, OSError, FloatingPointError)
    if status == 0:
        evaluate.main([str(folder / "run"), "--samples=2", "--rows=16", f"--output={folder}/samples.jsonl"])
    return status


# --- what starts them ---


class Ended(NamedTuple):
    """A run of several processes that has ended."""

    statuses: list[int]
    at: list[float]  # time at which each ended, 0 where it had to be killed
    printed: list[str]
    began: float


def address() -> str:
    """Where processes may come together: a port that is free."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


def spawn(command: list[str], folder: Path, where: str, index: int, processes: int, devices: int) -> subprocess.Popen:
    """Start one of so many processes, of so many devices in all. What it prints is added to printed-INDEX."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "8",  # fixes the size of XLA's thread pool, and with it the bits of a matrix product
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        "PYTHONPATH": f"{ROOT / 'tests'}:{folder}",
    }
    if processes > 1:
        settings |= dict(zip(BY_HAND, (where, str(processes), str(index)), strict=True))
    with open(folder / f"printed-{index}", "a") as output:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=output, stderr=output)


def start(
    program: str | Path, case: str, folder: Path, processes: int, devices: int, *more: str, absent: int | None = None
) -> Ended:
    """Run a case to its end by so many processes of a program, of so many devices in all.

    more: what else each is told. absent: one that is not started. Once one has ended, another that was stopped goes on,
    and all have two minutes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    began, where, here = time.time(), address(), [index for index in range(processes) if index != absent]
    for index in here:
        (folder / f"printed-{index}").unlink(missing_ok=True)
    command = [sys.executable, str(program), "--child", case, str(devices), str(folder), *more]
    started = [spawn(command, folder, where, index, processes, devices) for index in here]
    ended, until = [0.0] * len(here), began + 3600
    while (running := [i for i in range(len(here)) if not ended[i]]) and time.time() < until:
        for index in running:
            if started[index].poll() is not None:
                ended[index] = time.time()
                until = min(until, time.time() + 120)
            elif any(ended):
                started[index].send_signal(signal.SIGCONT)
        time.sleep(0.05)
    for process in started:
        process.kill()
    statuses = [process.wait() for process in started]
    return Ended(statuses, ended, [(folder / f"printed-{index}").read_text() for index in here], began)


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
    ends = [start(__file__, case, several, processes, processes), start(__file__, case, one, 1, processes)]
    took = [max(end.at) - end.began for end in ends]
    if any(status for end in ends for status in end.statuses):
        print(f"| {case} | {processes} | FAILED: {[end.statuses for end in ends]}, {several}/printed-* | |", flush=True)
        return False
    first, second = made(several), made(one)
    differ = [name for name in first if first[name] != second.get(name)]
    said = "identical: " + ", ".join(first) if not differ else f"{', '.join(differ)} differ, "
    said += first_difference(several, one) if differ else ""
    print(f"| {case} | {processes} | {said} | {took[0]:.0f} s, {took[1]:.0f} s |", flush=True)
    return not differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["data", "fsdp", "tensor"])
    parser.add_argument("--processes", nargs="*", type=int, default=[2, 4])
    args, folder = parser.parse_args(), Path(tempfile.mkdtemp())
    print(
        "| case | processes | beside one process with as many devices | seconds, both |\n|---|---|---|---|", flush=True
    )
    good = [compare(case, number, folder) for case in args.cases for number in args.processes]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(be_a_process(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
    main()
