"""One run on several hosts: its processes join, fail together, and tell each other what only one of them knows.

Every process runs the same program over one mesh of all devices: it reads the same settings and prompts, holds the same
allocator and lays out the same rows, so that none has to be told what to do. What can differ between them (a file, a
clock, a verifier's answer, a signal) is exchanged here before anything is decided by it. The first process alone writes
and prints.

`place` and `fetch` of sharding.py, and what exchanges something here, are collectives where there are several
processes: all call them, in one order, in their main threads. A single process, which has joined nobody, goes straight
through.
"""

import contextlib
import importlib.util
import logging
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cero_jax.terminal import say

T = TypeVar("T")

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PATIENCE, JOIN_SECONDS = 20, 300  # until a process says that it waits for others; until it ends
HEARTBEAT_SECONDS = 40  # without a sign of life, after which a process is taken for dead
BROKEN_OFF = ("UNKNOWN: ", "UNAVAILABLE: ", "INTERNAL: ", "ABORTED: ", "CANCELLED: ", "DEADLINE_EXCEEDED: ")
AT_FIRST = 1024  # bytes that an exchange takes in its first message: most need no second
_joined: list[str] = []  # the host of each process of this run, and its devices


def join() -> None:
    """Join the other processes of this run, where there are others, and once; before anything touches a device.

    Where JAX sees a cluster (a TPU pod, Slurm, Open MPI) it knows the rest; else all of BY_HAND are given in the
    environment. Raises ValueError where only some of them are, they are no numbers, or JAX cannot join the others. Ends
    the process, in one line, where they do not come.
    """
    given = _given_by_hand(os.environ)
    if jax.distributed.is_initialized() or not (given or _in_a_cluster(os.environ)):
        return
    # The run has handlers of its own; JAX's would take SIGTERM away from them.
    jax.config.update("jax_enable_preemption_service", False)
    limits: dict[str, Any] = {
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "initialization_timeout": JOIN_SECONDS + 60,  # `_waiting` ends it first
    }
    try:
        with _waiting(given):
            jax.distributed.initialize(**given, **limits)
    except Exception as error:  # a port in use, a package that is missing, metadata that do not come
        named = os.environ.get("TPU_WORKER_HOSTNAMES", "")
        if isinstance(error, ValueError) and not given and "," not in named:
            return  # libtpu is installed, and there is no TPU
        there = f"TPU_WORKER_HOSTNAMES={named}" if "," in named else given or "on this cluster"
        raise ValueError(
            f"{there}: JAX cannot join the other processes ({type(error).__name__}: {error}): see that process 0's "
            "port is free there, that jax[tpu] is installed on TPU hosts, and that they have their chips"
        ) from error
    if not leads():
        logging.getLogger("cero_jax").setLevel(logging.ERROR)
    here = f"{socket.gethostname()} (pid {os.getpid()}, {jax.local_device_count()} x {jax.devices()[0].device_kind})"
    _joined[:] = each_has(lambda: here)
    tell(f"{jax.process_count()} processes, {jax.device_count()} devices: {names()}")
    if not leads():  # where the first host hangs, JAX ends this process and says only that its service is silent
        say(f"process {jax.process_index()} on {here} joined process 0, JAX's leader and its service, on {_joined[0]}")


def names() -> str:
    """The number and the host of each process that has joined, in words."""
    return ", ".join(f"{index} on {each}" for index, each in enumerate(_joined))


@contextlib.contextmanager
def _waiting(given: dict[str, Any]) -> Iterator[None]:
    """Say after a while that the others are waited for, and end the process where they do not come.

    JAX says nothing while it waits, and then ends the process with a trace of its own calls.
    """
    me = f"process {given['process_id']} of {given['num_processes']}" if given else "this process"
    who = f"{me} on {socket.gethostname()}"
    where = f"at {given['coordinator_address']}" if given else "that the cluster names"

    def give_up() -> None:
        say(
            f"error: {who}: not all processes have come together {where} within {JOIN_SECONDS} s: see that each is "
            "started, by what its log says, and that all can reach process 0 there"
        )
        os._exit(1)

    patience = threading.Timer(PATIENCE, say, [f"{who} waits for the others {where}, {JOIN_SECONDS} s at most"])
    timers = patience, threading.Timer(JOIN_SECONDS, give_up)
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _given_by_hand(environment: Mapping[str, str]) -> dict[str, Any]:
    """What jax.distributed.initialize is told; {} where nothing is given. Raises ValueError where that is not whole."""
    given = {name: environment[name] for name in BY_HAND if environment.get(name)}
    if not given or (set(given) == {BY_HAND[0]} and _in_a_cluster(environment)):  # the cluster knows the rest
        return {}
    try:
        address, number, index = (given[name] for name in BY_HAND)
        found = {"coordinator_address": address, "num_processes": int(number), "process_id": int(index)}
    except KeyError as missing:
        raise ValueError(
            f"{', '.join(given)} given without {missing.args[0]}: a run on several hosts needs {', '.join(BY_HAND)}, a "
            "single process none of them"
        ) from None
    except ValueError:
        raise ValueError(f"{given}: the last two must be whole numbers") from None
    if ":" not in address or not 0 <= found["process_id"] < found["num_processes"]:
        raise ValueError(f"{given}: give host:port, and process ids from 0 up to the number of processes less 1")
    return found if found["num_processes"] > 1 else {}


def _in_a_cluster(environment: Mapping[str, str]) -> bool:
    """Whether JAX may find other processes by itself: a launcher says there are some, or it may be a TPU host."""
    if "SLURM_STEP_NODELIST" in environment:  # started by srun
        return int(environment.get("SLURM_NTASKS", "1")) > 1
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_SIZE"]) > 1
    platforms = environment.get("JAX_PLATFORMS", "")
    return (not platforms or "tpu" in platforms) and importlib.util.find_spec("libtpu") is not None


def several() -> bool:
    """Whether the run has several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def leads() -> bool:
    """Whether this process is the first, or the only one: it writes and prints."""
    return not several() or jax.process_index() == 0


def tell(text: str) -> None:
    """Print a line, once for all processes. Where nobody can read it any more, the run goes on all the same."""
    if leads():
        with contextlib.suppress(OSError):
            print(text, flush=True)


def each_has(make: Callable[[], T]) -> list[T]:
    """What `make` returns in each process, in every process; where it raises in one, all raise that."""
    if not several():
        return [make()]
    value, error = _tried(make)
    found = _exchange((value, _sendable(error)))
    _raise_alike(error, [each for _, each in found])
    return [value for value, _ in found]


def alike(make: Callable[[], T]) -> T:
    """What `make` returns here; where it raises in one process, all raise that. What it returns is not sent."""
    kept = []
    each_has(lambda: kept.append(make()))
    return kept[0]


def of_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, which alone calls it, in every process; what it raises there, too."""
    return each_has(lambda: make() if leads() else None)[0]  # type: ignore[return-value]


def noted(error: BaseException) -> str:
    """An error's words, with the process that it comes from, where that is another."""
    return " ".join([str(error), *(f"({note})" for note in getattr(error, "__notes__", []))])


def is_broken_off(error: BaseException | None) -> bool:
    """Whether an error is that of a collective in which another process is gone: JAX raises several kinds of them."""
    return several() and str(error).startswith(BROKEN_OFF)


def wait_for_the_dead() -> None:
    """After a collective was broken off, wait until JAX knows which process is dead: it names it, and ends this one."""
    time.sleep(HEARTBEAT_SECONDS + 15)


def _tried(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        return None, error


def _sendable(error: Exception | None) -> Exception | None:
    """The error as another process can raise it, with a note of where it comes from."""
    if error is None:
        return None
    try:
        sent = pickle.loads(pickle.dumps(error))
    except Exception:  # an exception of a user's own kind
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.__notes__ = [f"in process {jax.process_index()} on {socket.gethostname()}"]
    return sent


def _raise_alike(mine: Exception | None, all_errors: list[Exception | None]) -> None:
    if mine is not None:
        raise mine
    for error in all_errors:
        if error is not None:
            raise error


def _exchange(mine: Any) -> list[Any]:
    """Each process's value, in every process: pickled, and padded to few lengths, so that few programs are compiled."""
    sent = pickle.dumps(mine)
    sizes, heads = _gathered(sent, AT_FIRST)
    if (longest := max(sizes)) > AT_FIRST:
        _, heads = _gathered(sent, 2 ** (longest - 1).bit_length())
    return [pickle.loads(head[:size].tobytes()) for size, head in zip(sizes, heads, strict=True)]


def _gathered(sent: bytes, width: int) -> tuple[list[int], list[np.ndarray]]:
    """How many bytes each process has to send, and the first `width` of them, padded."""
    message = np.zeros(8 + width, np.uint8)
    message[:8] = np.frombuffer(np.int64(len(sent)).tobytes(), np.uint8)
    message[8 : 8 + min(len(sent), width)] = np.frombuffer(sent, np.uint8)[:width]
    found = np.asarray(multihost_utils.process_allgather(message))
    return [int(row[:8].view(np.int64)[0]) for row in found], [row[8:] for row in found]
