"""Verifiers as a user would write them, most of them badly: run by tests/test_pool.py in worker processes."""

import os
import signal
import subprocess
import sys
import time

from cero_jax.rewards import NO_ANSWER, Verdict

NOT_A_FUNCTION = 3


def two_arguments(question, completion):
    return 1.0


def length(question, completion, answer):
    return len(completion) / 10


def even_length(question, completion, answer):
    """What an untaught policy gets right now and then."""
    return float(len(completion) % 2 == 0)


def by_prompt(question, completion, answer):
    """Does what the gold answer says."""
    if answer == "hang":
        time.sleep(1000)
    if answer == "raise":
        raise RuntimeError
    return Verdict(0.0, NO_ANSWER) if answer == "none" else 1.0


def misbehave(question, completion, answer):
    """Does what the completion says."""
    match completion:
        case "raise":
            raise KeyError("a bug\nof mine")
        case "hang":
            time.sleep(1000)
        case "compute":  # a loop in C, which no Python signal handler interrupts
            return float(len(str(9 ** (9**9))))
        case "ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(1)
        case "eat":
            held = []
            while True:
                held.append(bytearray(2**28))
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            sys.exit(0)
        case "quit":
            os._exit(3)
        case "nan":
            return float("nan")
        case "text":
            return "right"
        case "none":
            return None
        case "list":
            return [1.0]
        case "bool":
            return answer == "gold"
        case "numeral":
            return "1"
        case "once":  # killed, the first time that it is asked
            if not os.path.exists(question):
                open(question, "w").close()
                os.kill(os.getpid(), signal.SIGTERM)
        case "parent" | "leave a child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            with open(question, "a") as file:
                file.write(f"{child.pid}\n")
            if completion == "leave a child":
                os._exit(3)
            time.sleep(1000)
        case "slow":
            time.sleep(0.1)
            return 1.0
        case "object":
            return Verdict(0.25, NO_ANSWER, "seen")
        case "where":
            loaded = [name for name in ("jax", "numpy", "train", "flax") if name in sys.modules]
            main = sys.modules["__main__"]
            return Verdict(0.0, "wrong", f"{os.getpid()} {loaded} {getattr(main, '__file__', None)}")
    return float(completion == answer)
