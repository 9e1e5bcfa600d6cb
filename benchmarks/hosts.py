"""Are several processes one run, to the bit? With real processes, on CPU.

    python benchmarks/hosts.py                            # every case with 2 and 4 processes
    python benchmarks/hosts.py --cases fsdp --processes 2

A case is run by N processes of one device each, and twice by one process of N devices. On CPU processes add over
sockets, by Gloo, whose ring adds each part of an array from another device on: a1 + (a2 + (a3 + a0)). One process adds
in the order of its devices: ((a0 + a1) + a2) + a3. So

- one process that adds by Gloo, too, has to be the same to the bit: metrics.jsonl, the checksums of all saved arrays,
  the exported weights, the samples of an evaluation;
- one process as it is anywhere has to decide the same (who gets rollouts, tokens, rewards, the samples), and what is a
  sum over devices may be other by its rounding. Two terms have one sum: with two processes nothing may differ.

Ends with status 1 where something is not as it should be. What becomes of processes when one dies: host_faults.py.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
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
ROUNDING = 1e-5  # how far a metric may be apart; one sum of four in another order: 2 (4 - 1) 2**-24 = 4e-7 of its terms


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
    model = shutil.copytree(ROOT / "tests/fixtures/qwen2", folder / "qwen2", dirs_exist_ok=True)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 320, 2))}))  # half end it
    own = Dataset(path=str(rows), max_prompt_tokens=12, num_heldout=4, verifier="user_verifiers:even_length")
    file = {
        "task": own,
        "model_folder": str(model),
        "allocator": budget,
        "sampler": SamplerConfig(max_completion_tokens=2),
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


def be_a_process(case: str, devices: int, folder: Path, sums: str = "") -> int:
    """Train, and evaluate what was trained. sums="gloo": a single process lets its devices add as processes do."""
    import jax

    import train
    from cero_jax import evaluate, hosts
    from cero_jax.checkpoint import fail_at_once
    from tests.tiny_run import one_length

    one_length()  # less to compile
    if sums == "gloo":
        jax.distributed.initialize(address(), num_processes=1, process_id=0)
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


def compile_once(folder: Path) -> None:
    """Let what one process compiles serve those after it, in this folder, and be compiled quickly."""
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


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


def apart(one: Path, other: Path) -> dict[str, tuple[int, float]]:
    """Of each metric that differs between two runs: from which step on, and how far at most; inf if it is no float.

    How far: of its size, or of 1 where it is smaller.
    """
    found: dict[str, tuple[int, float]] = {}
    rows = ((folder / "run/metrics.jsonl").read_text().splitlines() for folder in (one, other))
    for mine, theirs in zip(*(map(json.loads, each) for each in rows), strict=True):
        for name in sorted(mine.keys() | theirs.keys()):
            values = mine.get(name), theirs.get(name)
            if values[0] != values[1]:
                floats = all(isinstance(each, float) for each in values)
                far = abs(values[0] - values[1]) / max(1.0, abs(values[0])) if floats else math.inf
                since, most = found.get(name, (mine["step"], 0.0))
                found[name] = since, max(most, far)
    return found


def beside(several: Path, one: Path, processes: int) -> tuple[bool, str]:
    """Whether a run by several processes is the other's, but for rounding where more than two were added; in words."""
    first, second = made(several), made(one)
    differ = [name for name in first if first[name] != second.get(name)]
    if not differ:
        return True, "identical: " + ", ".join(first)
    figures = apart(several, one)
    said = "; ".join(f"{name} from step {since} on, by {most:.1e} at most" for name, (since, most) in figures.items())
    most = max((most for _, most in figures.values()), default=0.0)
    rounded = processes > 2 and most < ROUNDING and "evaluation" not in differ
    return rounded, f"{', '.join(differ)} differ: {said or 'in no metric'}"


def compare(case: str, processes: int, folder: Path) -> bool:
    """Run a case by several processes and by one, and print a row of a table: whether they end alike."""
    runs = {"several": (processes, ""), "gloo": (1, "gloo"), "one": (1, "")}
    folders = {name: folder / f"{case}-{processes}-{name}" for name in runs}
    ends = {name: start(__file__, case, folders[name], n, processes, sums) for name, (n, sums) in runs.items()}
    took = ", ".join(f"{max(end.at) - end.began:.0f}" for end in ends.values())
    if any(status for end in ends.values() for status in end.statuses):
        statuses = {name: end.statuses for name, end in ends.items()}
        print(f"| {case} | {processes} | FAILED: {statuses}, {folder}/*/printed-* | | {took} |", flush=True)
        return False
    same, by_gloo = beside(folders["several"], folders["gloo"], 2)
    rounded, alone = beside(folders["several"], folders["one"], processes)
    print(f"| {case} | {processes} | {by_gloo} | {alone} | {took} |", flush=True)
    return same and rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["data", "fsdp", "tensor"])
    parser.add_argument("--processes", nargs="*", type=int, default=[2, 4])
    args, folder = parser.parse_args(), Path(tempfile.mkdtemp())
    compile_once(folder)
    heads = "case", "processes", "beside one process that adds by Gloo", "beside one process", "seconds, each"
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    good = [compare(case, number, folder) for case in args.cases for number in args.processes]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(be_a_process(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:]))
    main()
