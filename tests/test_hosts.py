"""Two real processes are one run: each judges its rows, all stop together, one writes, and a single one goes on."""

import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import jax
import pytest
from two_hosts import STOPPED_AFTER, hosts_config

import train
from cero_jax import hosts, sharding
from cero_jax.checkpoint import fail_at_once

ROOT = Path(__file__).parent.parent


def as_srun_starts(index):
    """Slurm's variables of a step of two tasks. JAX makes the coordinator's port of the job's number."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder in which two processes, of a device each, ran until one of them got SIGTERM; and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    shared = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_hosts", str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | shared | as_srun_starts(index),
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    return folder, processes, printed


def test_what_one_process_knows_all_know_and_what_fails_in_one_fails_in_all(two):
    folder, _, _ = two
    first, second = (json.loads((folder / f"exchanges-{index}.json").read_text()) for index in range(2))
    assert (first.pop("leads"), second.pop("leads")) == (True, False)
    here = f"(in process 1 on {socket.gethostname()})"
    assert first.pop("alike") == f"FileNotFoundError: train.jsonl: no such file {here}"
    assert second.pop("alike") == "FileNotFoundError: train.jsonl: no such file"
    assert first.pop("first_fails") == "ZeroDivisionError: integer division or modulo by zero"
    assert "ZeroDivisionError" in second.pop("first_fails")
    assert first == second
    assert first["each"] == [0, 5000]
    assert first["first"] == 0
    assert first["whole"]
    assert first["here"] == 0.5
    assert first["read"]
    assert "the work directory /proc/self/cwd/runs of process 0 is not that of process 1" in first["not_shared"]
    assert first["other_settings"].startswith("ValueError: process 1 has seed=1, process 0 0: give all the same")


@pytest.fixture
def as_there(monkeypatch):
    """This process compiles for as many devices as those two had."""
    monkeypatch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:2]))


def test_two_processes_and_then_one_are_as_one_to_the_bit(two, as_there):
    """One gets SIGTERM and both save and stop; one process with as many devices goes on."""
    folder, processes, ((out, _), (other_out, other_said)) = two
    assert [(folder / f"status-{index}").read_text() for index in range(2)] == ["143", "143"]
    assert "stopped and saved" in out
    assert all(line.startswith("[Gloo]") for line in other_out.splitlines())  # which the library prints
    assert "SIGTERM: stopping after this step" in other_said
    first, second = (f"{socket.gethostname()} (pid {process.pid}, 1 x cpu)" for process in processes)
    assert f"process 1 on {second} joined process 0, JAX's leader and its service, on {first}" in other_said
    assert f"2 processes, 2 devices: 0 on {socket.gethostname()} (pid {processes[0].pid}, 1 x cpu), 1 on " in out
    stopped = (folder / "runs/two/metrics.jsonl").read_bytes()
    assert STOPPED_AFTER <= stopped.count(b"\n") <= STOPPED_AFTER + 2
    judged = [(folder / f"runs/judged-by-{process.pid}").stat().st_size for process in processes]
    assert min(judged) > 0.3 * sum(judged)

    one, two = folder / "runs/one", folder / "runs/two"
    for work_dir in (one, two):
        assert train.main(hosts_config(work_dir)) == 0
    assert (two / "metrics.jsonl").read_bytes() == (one / "metrics.jsonl").read_bytes()
    assert (two / "metrics.jsonl").read_bytes().startswith(stopped)
    assert saved_arrays(two) == saved_arrays(one)
    evaluated = json.loads((folder / "samples-two.jsonl").read_text().splitlines()[0])
    assert evaluated["prompt_id"] == evaluated["sample"] == 0


def test_a_process_joins_others_only_where_there_are_some():
    by_hand = dict(zip(hosts.BY_HAND, ("host0:1234", "2", "1"), strict=True))
    told = {"coordinator_address": "host0:1234", "num_processes": 2, "process_id": 1}
    assert hosts._given_by_hand(by_hand | {"PATH": "/bin"}) == told
    assert (
        hosts._given_by_hand({})
        == hosts._given_by_hand(by_hand | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"})
        == {}
    )
    for wrong, said in (
        ({"JAX_PROCESS_ID": ""}, "given without JAX_PROCESS_ID: a run on several hosts needs"),
        ({"JAX_PROCESS_ID": "2"}, "process ids from 0 up to the number of processes less 1"),
        ({"JAX_PROCESS_ID": "one"}, "must be whole numbers"),
        ({"JAX_COORDINATOR_ADDRESS": "host0"}, "give host:port"),
    ):
        with pytest.raises(ValueError, match=said):
            hosts._given_by_hand(by_hand | wrong)
    in_slurm = as_srun_starts(0)
    only_cpu = {"JAX_PLATFORMS": "cpu"}
    assert hosts._in_a_cluster(in_slurm)
    assert hosts._given_by_hand(in_slurm | {"JAX_COORDINATOR_ADDRESS": "host0:1234"}) == {}  # Slurm knows the rest
    assert hosts._in_a_cluster({"OMPI_COMM_WORLD_SIZE": "4"})
    for alone in (
        in_slurm | {"SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        only_cpu,
        only_cpu | {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
    ):  # in a script, outside of srun
        assert not hosts._in_a_cluster(alone)


def test_who_waits_for_others_says_so_and_not_for_ever(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    with hosts._waiting({}):
        pass
    monkeypatch.setattr(hosts, "PATIENCE", 0.01)
    monkeypatch.setattr(hosts, "JOIN_SECONDS", 0.1)
    with hosts._waiting({"coordinator_address": "host0:1234", "num_processes": 2, "process_id": 1}):
        assert ended.wait(10)
    here = f"process 1 of 2 on {socket.gethostname()}"
    waits, gives_up = capsys.readouterr().err.splitlines()
    assert waits == f"{here} waits for the others at host0:1234, 0.1 s at most"
    assert gives_up.startswith(f"error: {here}: not all processes have come together at host0:1234 within 0.1 s: see")


def test_a_process_that_cannot_join_says_why_and_does_not_run_alone(monkeypatch):
    def refuses(error):
        def initialize(**settings):
            raise error

        monkeypatch.setattr(jax.distributed, "initialize", initialize)

    for name in hosts.BY_HAND:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts, "_in_a_cluster", lambda environment: True)
    refuses(ValueError("coordinator_address should be defined."))
    hosts.join()  # libtpu without a TPU: alone, as on any machine
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host0")
    hosts.join()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host0,host1")
    with pytest.raises(ValueError, match=r"TPU_WORKER_HOSTNAMES=host0,host1: JAX cannot join the other .*ValueError"):
        hosts.join()
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    refuses(jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server"))
    for name, value in zip(hosts.BY_HAND, ("host0:1234", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"'host0:1234'.*: JAX cannot join .*Failed to start RPC server"):
        hosts.join()


def test_a_collective_that_breaks_off_names_all_hosts_and_waits_for_jax_to_say_which(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "_joined", ["host0 (pid 7, 1 x cpu)", "host1 (pid 8, 1 x cpu)"])
    monkeypatch.setattr(hosts, "several", lambda: True)
    waited = []
    monkeypatch.setattr(hosts.time, "sleep", waited.append)
    monkeypatch.setattr(os, "_exit", lambda status: waited.append(f"status {status}"))
    try:
        raise RuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nand more")
    except RuntimeError:
        fail_at_once(ValueError)
    assert waited == [hosts.HEARTBEAT_SECONDS + 15, "status 1"]
    assert capsys.readouterr().err == (
        "error: another process is gone (UNKNOWN: Gloo AllGather failed: Connection reset by peer): JAX will say "
        "which, by its number: 0 on host0 (pid 7, 1 x cpu), 1 on host1 (pid 8, 1 x cpu)\n"
    )


def saved_arrays(run_dir):
    """The checksum of each array of the newest checkpoint."""
    newest = max((run_dir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    return json.loads((newest / "cursor/metadata").read_text())["arrays"]
