"""What each process of a run on several hosts does in tests/test_hosts.py: `python -m tests.two_hosts FOLDER`."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import train
from cero_jax import evaluate, hosts, metrics, run_directory, sharding, warm_start
from cero_jax.config import Config
from cero_jax.rewards import RIGHT, WRONG, Verdict
from cero_jax.rewards.pool import Pool
from cero_jax.sampler import SamplerConfig
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.tokenizer import AlphabetTokenizer
from cero_jax.warm_start import WarmStartConfig
from tests.tiny_run import tiny_config

STOPPED_AFTER = 6  # rows of metrics


class EveryTokenEnds(AlphabetTokenizer):
    """A completion is one token, and reads as its id: with one length there is little to compile."""

    eos_ids = tuple(range(1, 14))

    def decode(self, ids):
        return " ".join(map(str, ids))


@dataclasses.dataclass(frozen=True)
class JudgedSomewhere(ChainSum):
    """A third of the tokens are right; the verifier leaves a trace of the process in which it judges."""

    traces: str = ""

    def build(self, seed, tokenizer=None):
        task = super().build(seed, tokenizer)

        def verify(question, completion, answer):
            with open(f"{self.traces}/judged-by-{os.getpid()}", "a") as file:
                file.write(".")
            right = int(completion) % 3 == 0
            return Verdict(float(right), RIGHT if right else WRONG, completion)

        return task._replace(tokenizer=EveryTokenEnds("0123456789.="), verify=verify)


@dataclasses.dataclass(frozen=True)
class JudgedInAPool(JudgedSomewhere):
    """Judged by a function module:function, in processes of its own that have a second for each."""

    verifier: str = ""

    def build(self, seed, tokenizer=None):
        task = super().build(seed, tokenizer)
        return task._replace(verify=None, verify_many=Pool(self.verifier, seconds=1.0).many)


def hosts_config(work_dir, **changes) -> Config:
    """The tiny run with as little in it to compile as can be."""
    traces = str(Path(work_dir).parent)
    settings = dict(  # noqa: C408
        task=JudgedSomewhere(num_prompts=24, num_heldout=8, traces=traces),
        sampler=SamplerConfig(max_completion_tokens=1),
        warm_start=WarmStartConfig(num_steps=0),
    )
    return tiny_config(work_dir, **(settings | changes))


def raised(function) -> str:
    """What a function raises, in words."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {hosts.noted(error)}"
    return ""


def exchanges(folder: Path) -> dict:
    """What the functions that make several processes one run come to in this process."""
    me = jax.process_index()

    def fails_in_one():
        if me == 1:
            raise FileNotFoundError("train.jsonl: no such file")

    mesh = sharding.make_mesh(sharding.MeshConfig())
    by_row = sharding.rows(mesh)
    numbers = np.arange(4 * jax.device_count(), dtype=np.int32).reshape(-1, 4)
    placed = sharding.place({"a": numbers, "b": None}, by_row)
    warm_start.write_cache(folder / "cache/warm", placed)
    target = {"a": jax.ShapeDtypeStruct(numbers.shape, jnp.int32, sharding=by_row), "b": None}
    read = warm_start.read_cache(folder / "cache/warm", target)
    (folder / f"host-{me}").mkdir()
    os.chdir(folder / f"host-{me}")  # so that one path leads each process to a folder of its own
    run_directory.SHARED_SECONDS = 0.1
    return {
        "each": [len(text) for text in hosts.each_has(lambda: "x" * 5000 * me)],
        "alike": raised(lambda: hosts.alike(fails_in_one)),
        "first": hosts.of_first(lambda: me),
        "first_fails": raised(lambda: hosts.of_first(lambda: 1 // me)),
        "leads": hosts.leads(),
        "whole": bool((sharding.fetch(placed)["a"] == numbers).all()),
        "here": sum(shard.data.size for shard in placed["a"].addressable_shards) / numbers.size,
        "read": bool((sharding.fetch(read)["a"] == numbers).all()),
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
