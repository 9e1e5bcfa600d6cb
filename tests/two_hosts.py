"""What each process of a run on several hosts does in tests/test_hosts.py: `python -m tests.two_hosts FOLDER`."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

import train
from cero_jax import evaluate, hosts, metrics, run_directory, sharding
from cero_jax.config import Config
from cero_jax.rewards import Verdict
from tests.tiny_run import FirstDigit, tiny_config

STOPPED_AFTER = 6  # rows of metrics


@dataclasses.dataclass(frozen=True)
class JudgedSomewhere(FirstDigit):
    """Its verifier leaves a trace of the process in which it judges."""

    traces: str = ""

    def build(self, seed, tokenizer=None):
        task = super().build(seed, tokenizer)
        assert task.verify is not None
        first_digit = task.verify

        def verify(question, completion, answer):
            if self.traces:
                with open(f"{self.traces}/judged-{os.getpid()}", "a") as file:
                    file.write(".")
            return Verdict(float(first_digit(question, completion, answer)), "right", completion[:1])

        return task._replace(verify=verify)


def hosts_config(work_dir, **changes) -> Config:
    """The tiny run, its verifier watched."""
    traces = str(Path(work_dir).parent)
    task = JudgedSomewhere(num_prompts=24, num_heldout=8, traces=traces)
    return tiny_config(work_dir, **({"task": task} | changes))


def raised(function) -> str:
    """What a function raises, in words."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {hosts.noted(error)}"
    return ""


def exchanges(folder: Path) -> dict:
    """What the functions of hosts.py and sharding.py come to in this process."""
    me = jax.process_index()

    def fails_in_one():
        if me == 1:
            raise FileNotFoundError("train.jsonl: no such file")

    Path(f"{folder}/host-{me}").mkdir()
    os.chdir(f"{folder}/host-{me}")  # so that one path leads each process to a folder of its own
    run_directory.SHARED_SECONDS = 0.1
    mesh = sharding.make_mesh(sharding.MeshConfig())
    numbers = np.arange(4 * jax.device_count(), dtype=np.int32).reshape(-1, 4)
    placed = sharding.place({"a": numbers, "b": None}, sharding.rows(mesh))
    return {
        "each": [len(text) for text in hosts.each_has(lambda: "x" * 5000 * me)],
        "alike": raised(lambda: hosts.alike(fails_in_one)),
        "first": hosts.of_first(lambda: me),
        "first_fails": raised(lambda: hosts.of_first(lambda: 1 // me)),
        "leads": hosts.leads(),
        "whole": bool((sharding.fetch(placed)["a"] == numbers).all()),
        "here": sum(shard.data.size for shard in placed["a"].addressable_shards) / numbers.size,
        "not_shared": raised(lambda: run_directory.check_shared(Path("/proc/self/cwd/runs"))),
        "other_settings": raised(lambda: run_directory.check_alike(tiny_config(folder, seed=me), "a hash")),
    }


def stop_one(rows: int) -> None:
    """Let this process, which writes no metrics, get SIGTERM at this row of them."""
    write, written = metrics.Unwritten.write, []

    def counting(self, *args):
        written.append(1)
        if len(written) == rows:
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, *args)

    metrics.Unwritten.write = counting


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    hosts.join()
    (folder / f"exchanges-{jax.process_index()}.json").write_text(json.dumps(exchanges(folder)))
    if jax.process_index() == 1:
        stop_one(STOPPED_AFTER)
    status = train.main(hosts_config(folder / "runs/two"))
    evaluate.main([str(folder / "runs/two"), "--samples=2", "--rows=16", f"--output={folder}/samples-two.jsonl"])
    (folder / f"status-{jax.process_index()}").write_text(str(status))
