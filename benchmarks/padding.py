"""Whether a run's cost follows its prompts and not `max_prompt_tokens`: sampling, a learner's step, an evaluation.

python benchmarks/padding.py --path gsm8k_train.jsonl                # seconds at several limits, of rows of GSM8K
python benchmarks/padding.py --path gsm8k_train.jsonl --evaluation   # peak memory of an evaluation of 135M parameters

Random weights; a question's words and marks are its tokens, hashed to the vocabulary. `padded` is what a limit used to
be: the width of every prompt. Limits alternate within one process, and CPU seconds stand beside wall seconds: other
work on the machine adds to those.
"""

import argparse
import os
import re
import sys
import tempfile
import time
import zlib
from pathlib import Path

import jax
import numpy as np

from cero_jax import model, sharding
from cero_jax.data import Task, prompt_widths
from cero_jax.evaluation import EvaluationConfig, evaluate
from cero_jax.learner import Fixed, LearnerConfig, make_learner
from cero_jax.model import ModelConfig
from cero_jax.pace import Seconds
from cero_jax.packing import plan
from cero_jax.rollout import Rules, sampling_batch, to_batch
from cero_jax.sampler import SamplerConfig, make_sampler
from cero_jax.tasks.dataset import Dataset
from cero_jax.verify import verify

SMOLLM2 = ModelConfig(num_layers=30, width=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_width=1536)
GROUP = 4


class WordTokenizer:
    """A token for each word and mark, by its hash: as long as text in a tokenizer of that many words, and no text."""

    pad_id, eos_ids, chat = 0, (1,), None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """An id in 2..vocab_size-1 for each word and mark."""
        return [2 + zlib.crc32(word.encode()) % (self.vocab_size - 2) for word in re.findall(r"\w+|[^\w\s]", text)]

    def decode(self, ids) -> str:
        """The ids themselves."""
        return " ".join(map(str, ids))


def build(args: argparse.Namespace, limit: int) -> Task:
    """The task at this max_prompt_tokens, and a verifier that finds one completion in two right."""
    dataset = Dataset(path=args.path, template="Q: {question}\nA:", max_prompt_tokens=limit, num_heldout=64)
    task = dataset.build(0, WordTokenizer(args.vocab))
    return task._replace(verify=lambda question, completion, answer: float(zlib.crc32(completion.encode()) % 2))


def stepper(args: argparse.Namespace, config: ModelConfig, limit: int, padded: bool):
    """A function that draws and learns from a step, and returns [2, 2] wall and CPU seconds of both."""
    mesh, task = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]), build(args, limit)
    widths = (limit,) if padded else prompt_widths(task.train.lengths, args.completion)
    settings = LearnerConfig(rows_per_step=args.rows)
    sample = make_sampler(config, SamplerConfig(args.completion), (1,), 0, mesh, widths)
    learner = make_learner(config, args.vocab, settings, 1.0, mesh, widths)
    number = np.zeros(len(task.train.questions), int)
    chosen = np.random.default_rng(0).permutation(len(number))[: args.rows // GROUP * (args.repeats + 1)]
    number[chosen] = GROUP
    plans = plan(number, np.arange(len(number)), rows_per_step=args.rows, min_group=GROUP)
    state = learner.init(model.init_params(config, args.vocab, 0))
    mean_tokens = np.full(len(number), args.completion, np.float32)

    def run(step: int) -> np.ndarray:
        nonlocal state
        here, clocks = plans[step], [_clocks()]
        rollouts = sample(state.params, 0, step, sampling_batch(task.train, [here], 1, mean_tokens))
        clocks.append(_clocks())
        verified = verify(task, task.train, here.prompt_ids, rollouts, here.row_mask)
        batch = to_batch(task.train, here, rollouts, verified, Seconds(0.0, 0.0), None, Rules()).batch
        clocks.append(_clocks())
        inputs = batch, learner.advantages(batch), np.float32(1e-6), batch.row_mask
        state, metrics = learner.step(state, Fixed({}, None), *inputs)
        jax.block_until_ready((state, metrics))
        clocks.append(_clocks())
        return np.diff(clocks, axis=0)[[0, 2]]

    return run, task, widths


def _clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def steps(args: argparse.Namespace, config: ModelConfig) -> None:
    """Print seconds of sampling and of a learner's step at each limit, and of both together the ratio to the second.

    Medians over the repeats; a ratio is of runs that followed each other, its range over the repeats in brackets.
    """
    cases = [(limit, False) for limit in args.limits] + [(limit, True) for limit in args.padded]
    runs = [stepper(args, config, *case) for case in cases]
    compiled = [run(0).sum(axis=0)[0] for run, *_ in runs]
    every = []
    for step in range(1, args.repeats + 1):
        turn = range(len(runs)) if step % 2 else reversed(range(len(runs)))  # so that nobody is always first
        every.append([taken for _, taken in sorted((i, runs[i][0](step).tolist()) for i in turn)])
        print(f"repeat {step}: load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    taken, whole = np.median(every, axis=0), np.sum(every, axis=2)  # [cases, parts, clocks], [repeats, cases, clocks]
    ratios = whole / whole[:, 1:2]
    columns = ("max_prompt_tokens", "prompts", "longest", "widths", "sampling, wall (CPU) s", "step, wall (CPU) s")
    print(f"| {' | '.join(columns)} | both over those at {args.limits[1]}, wall; CPU | first s |\n{'|---' * 8}|")
    for i, ((limit, padded), (_, task, widths), parts, first) in enumerate(
        zip(cases, runs, taken, compiled, strict=True)
    ):
        prompts, name = task.train, f"{limit}{', padded' if padded else ''}"
        times = " | ".join(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in parts)
        over = "; ".join(f"{np.median(r):.3f} ({r.min():.3f} to {r.max():.3f})" for r in ratios[:, i].T)
        print(f"| {name} | {len(prompts.questions)} | {prompts.longest} | {widths} | {times} | {over} | {first:.0f} |")


def evaluation(args: argparse.Namespace) -> None:
    """Print the peak of this process's memory over an evaluation of 64 prompts, four completions of each at once."""
    mesh, task = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]), build(args, 1024)
    config, widths = SMOLLM2, prompt_widths(task.heldout.lengths, args.completion)
    settings = SamplerConfig(args.completion, slots=args.slots)
    sample = make_sampler(config, settings, (1,), 0, mesh, widths)
    params = jax.block_until_ready(jax.jit(lambda: model.init_params(config, args.vocab, 0))())
    before, began = _peak(), time.perf_counter()
    evaluate(sample, params, task, EvaluationConfig(samples=GROUP, rows=256), 0)
    number = sum(p.size for p in jax.tree.leaves(params)) / 1e6
    print(f"{number:.0f}M parameters, {args.vocab} words, 256 rows in {args.slots or 'default'} slots, prompts of up "
          f"to {task.heldout.longest} tokens at widths {widths}, {args.completion} tokens of completion: peak "
          f"{_peak():.2f} GB, of which {before:.2f} before; {time.perf_counter() - began:.0f} s")  # fmt: skip


def _peak() -> float:
    """Most memory that this process has held so far, in GB."""
    held = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert held
    return int(held[1]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--path", required=True, help="GSM8K's training rows, JSONL")
    add("--evaluation", action="store_true", help="measure an evaluation's memory instead of a step's seconds")
    add("--limits", type=int, nargs="+", default=[128, 256, 1024], help="max_prompt_tokens")
    add("--padded", type=int, nargs="*", default=[256, 1024], help="max_prompt_tokens to which prompts are padded")
    for name, default in (("rows", 16), ("completion", 64), ("vocab", 49_152), ("layers", 4), ("width", 256)):
        add(f"--{name}", type=int, default=default)
    add("--slots", type=int, help="of the evaluation (default: as many as the sampler takes)")
    add("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.evaluation:
        evaluation(args)
        return
    heads = args.width // 64
    config = ModelConfig(args.layers, args.width, heads, max(heads // 2, 1), 64, 4 * args.width)
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)  # limits with the same widths have the same programs
        steps(args, config)


if __name__ == "__main__":
    main()
