"""What the host does for many prompts, beside the device: processor seconds of each part, by the number of prompts.

    python benchmarks/host_time.py --prompts 100000 1000000

"An epoch of a pass" visits every prompt, "of 4 steps" 4 x 1,024 rollouts of some. The log that is read back is made up,
500 epochs of 4 steps. What a run does once an epoch or a step is the best of three.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np

from cero_jax.config import AllocatorConfig, Config
from cero_jax.data import Prompts, Task, epoch_order, prompts_hash
from cero_jax.huggingface.chat_template import ChatTemplate
from cero_jax.huggingface.tokenizer import RENDERED_AT_ONCE
from cero_jax.packing import plan
from cero_jax.report.mechanism import epoch_row
from cero_jax.report.read_run import prompt_history, read_run
from cero_jax.report.summary import summarise
from cero_jax.rollout import observed_tokens
from cero_jax.run_directory import write_settings
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.tokenizer import ByteTokenizer

ROWS, MIN_GROUP, EPOCHS, STEPS = 1024, 4, 500, 4
RENDERED = 10_000
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[100_000, 1_000_000])
    for number in parser.parse_args().prompts:
        print(f"{number:,} prompts")
        with tempfile.TemporaryDirectory() as folder:
            measure(number, Path(folder))


def measure(number: int, folder: Path) -> None:
    rng = np.random.default_rng(0)
    allocator = AllocatorConfig(total_budget=EPOCHS * STEPS * ROWS, num_epochs=EPOCHS).resolved()
    config = Config(name="made_up", task=ChainSum(), allocator=allocator, work_dir=str(folder))
    task = made_up_task(number)
    groups = some_groups(rng, number)
    with printed("once: hash of the prompts"):
        digest = prompts_hash(task.train)
    with printed("once: settings and prompts written"):
        write_settings(folder, config, task, digest)
    size = sum(path.stat().st_size for path in folder.glob("prompts*"))
    print(f"  {size / 2**20:8.1f} MB of prompts ({digest[:8]})")
    with printed("again, as a resume does"):
        write_settings(folder, config, task, digest)
    with printed(f"once: {RENDERED:,} prompts rendered by a chat template, in its process"):
        render = ChatTemplate(CHATML, {}, datetime.now())
        system = {"role": "system", "content": "Be brief."}
        asked = [[system, {"role": "user", "content": question}] for question in task.train.questions[:RENDERED]]
        for start in range(0, RENDERED, RENDERED_AT_ONCE):
            render(asked[start : start + RENDERED_AT_ONCE])
        del render  # waits for its process, whose time counts, too
    best("an epoch: order of the prompts", lambda: epoch_order(number, 0, 1))
    order, whole = epoch_order(number, 0, 1), np.full(number, 8, np.int32)
    sizes = {"rows_per_step": ROWS, "min_group": MIN_GROUP}
    best("an epoch of a pass: plan", lambda: plan(whole, order, **sizes))
    best("an epoch of a pass, groups of 4 to 32: plan", lambda: plan(rng.integers(4, 33, number), order, **sizes))
    best("an epoch of 4 steps: plan", lambda: plan(groups, order, **sizes))
    alpha, beta = rng.uniform(0.5, 9, (2, number))
    best("an epoch: its row of metrics", lambda: epoch_row(alpha, beta, groups, groups))
    tokens, step = np.ones(number, np.float32), plan(groups, order, **sizes)[0]
    best("a step: mean tokens", lambda: observed_tokens(tokens, step, np.ones(ROWS, np.int32)))
    made_up_log(rng, number, folder)
    with printed("a report: the log read"):
        run = read_run(folder)
    with printed("a report: its figures"):
        summarise(run)
    with printed("a report: the history of a prompt"):
        prompt_history(run, int(run.steps[0]["prompt_ids"][0]))


def made_up_task(number: int) -> Task:
    questions = tuple(
        f"What is {i} plus {3 * i % 1009}, and how would you explain it to a child?" for i in range(number)
    )
    answers = tuple(str(i + 3 * i % 1009) for i in range(number))
    tokens = np.frombuffer("".join(questions).encode(), np.uint8).astype(np.int32)  # as ByteTokenizer encodes them
    offsets = np.cumsum([0, *map(len, questions)], dtype=np.int64)
    train = Prompts(questions, answers, tokens, offsets, ("all",) * number, longest=max(map(len, questions)))
    return Task(train, train, ByteTokenizer(), verify=lambda question, completion, answer: 0.0)


def some_groups(rng: np.random.Generator, number: int) -> np.ndarray:
    """[N] int32 groups that fill 4 steps."""
    groups = np.zeros(number, np.int32)
    groups[rng.choice(number, STEPS * ROWS // 16, replace=False)] = 16
    return groups


def made_up_log(rng: np.random.Generator, number: int, folder: Path) -> None:
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        spent = 0
        for epoch in range(EPOCHS):
            groups = some_groups(rng, number)
            for step, each in enumerate(plan(groups, np.arange(number), rows_per_step=ROWS, min_group=MIN_GROUP)):
                used = each.visit_ids >= 0
                sizes, spent = each.visit_sizes[used], spent + int(each.visit_sizes.sum())
                row = {"kind": "step", "step": STEPS * epoch + step, "epoch": epoch, "spent": spent, "live_share": 0.5}
                row |= {"prompt_ids": each.visit_ids[used].tolist(), "num_rollouts": sizes.tolist()}
                row |= {"num_correct": rng.binomial(sizes, 0.4).tolist(), "num_evidence": sizes.tolist()}
                file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"kind": "eval", "step": 0, "spent": spent, "accuracy": 0.5}) + "\n")


@contextmanager
def printed(what: str) -> Iterator[None]:
    began = sum(os.times()[:4])  # of this process, and of those that it waited for
    yield
    print(f"  {sum(os.times()[:4]) - began:8.3f} s  {what}", flush=True)


def best(what: str, function: Callable) -> None:
    seconds = []
    for _ in range(3):
        began = time.process_time()
        function()
        seconds.append(time.process_time() - began)
    print(f"  {min(seconds):8.3f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
