"""A run small enough to be killed and resumed many times: `python -m tests.tiny_run WORK_DIR [POINT COUNT]...`.

For each POINT a process of its own runs, one after the other, and ends itself there, at the COUNT-th time it passes: by
SIGKILL, or by SIGTERM at one so named. They are forked, which spares the imports.
"""

import os
import signal
import sys
from dataclasses import dataclass

import jax
import numpy as np

import train
from cero_jax import checkpoint, config, evaluation, hosts, learner, metrics, model, run
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.warm_start import WarmStartConfig


@dataclass(frozen=True)
class FirstDigit(ChainSum):
    """Right where the first digit is small: what an untaught policy gives now and then, for some prompts more."""

    def build(self, seed, tokenizer=None):
        task = super().build(seed, tokenizer)
        return task._replace(verify=lambda question, completion, answer: float(completion[:1] in set("0123")))


def tiny_config(work_dir, **changes) -> config.Config:
    """Six epochs of 40 rollouts on 24 prompts."""
    settings = dict(  # noqa: C408
        name="tiny",
        task=FirstDigit(num_prompts=24, num_heldout=8),
        allocator=config.AllocatorConfig(total_budget=240, num_epochs=6, min_group=2, max_group=8),
        model=model.ModelConfig(width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32),
        learner=learner.LearnerConfig(rows_per_step=16, learning_rate=3e-3),
        warm_start=WarmStartConfig(num_steps=10, rows_per_step=8),
        evaluation=evaluation.EvaluationConfig(every_rollouts=60, samples=2, rows=16),
        checkpoint_every_steps=4,
        work_dir=str(work_dir),
    )
    return config.Config(**(settings | changes))


def runs_end(work_dir) -> tuple[checkpoint.Cursor, list[np.ndarray]]:
    """Where a finished run stands, and every array of its state."""
    this, state, cursor = run.start(tiny_config(work_dir))
    this.close()
    assert cursor.finished
    leaves = jax.tree.leaves(state)
    return cursor, [np.asarray(jax.random.key_data(x) if checkpoint.is_key(x) else x) for x in leaves]


def end_at(point: str, count: int) -> None:
    """Let the process end itself at the `count`-th passing of `point`."""
    owner, name, kill_before = {
        "step": (metrics.MetricsWriter, "write", False),
        "sigterm": (metrics.MetricsWriter, "write", False),
        "half_line": (metrics.MetricsWriter, "write", True),
        "checkpoint_write": (checkpoint.Checkpoints, "save", False),  # saving goes on in the background
        "before_checkpoint": (checkpoint.Checkpoints, "save", True),
        "evaluation": (run.Run, "evaluate", True),
        "plan": (run.Run, "plan", False),  # an epoch is allocated and nothing of it drawn
        "plan_sigterm": (run.Run, "plan", False),
        "evaluation_sigterm": (run.Run, "evaluate", False),
    }[point]
    original, passed = getattr(owner, name), 0

    def passing(*args, **kwargs):
        nonlocal passed
        passed += 1
        if passed == count and kill_before:
            if point == "half_line":
                args[0]._files[0].write(b'{"kind": "st')
                args[0]._files[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if passed == count:
            os.kill(os.getpid(), signal.SIGTERM if point.endswith("sigterm") else signal.SIGKILL)
        return result

    setattr(owner, name, passing)


def one_length():
    """As the fixture of that name, in a process of its own."""
    learner.token_limits = lambda limit: (limit,)


if __name__ == "__main__":
    work_dir, *ends = sys.argv[1:]
    for point, count in zip(ends[::2], ends[1::2], strict=True):
        if (child := os.fork()) == 0:
            one_length()
            end_at(point, int(count))
            sys.exit(train.main(tiny_config(work_dir)))
        print(f"{point} {count} ended with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
    if not ends:
        hosts.join()
        sys.exit(train.main(tiny_config(work_dir)))
