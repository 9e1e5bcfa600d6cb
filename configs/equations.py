"""Graded equations for a small model: a task of its own in a config file, and the real model's benchmark.

A prompt is two solved equations and one to solve; the reward is 1 for the right number and nothing else on its line.
No warm start, no chat template. SmolLM2-135M-Instruct, as it comes, solves some kinds mostly, some at times and others
never, and often writes on behind the right number.

Needs: 2 cores, 4 GB of memory; a model folder (benchmarks/model_folder.py makes one of SmolLM2 or of Gemma 3 270M).
Expect: benchmarks/real_model.py.
Command: python train.py configs/equations.py --model-folder=models/smollm2-135m-instruct
"""

from dataclasses import dataclass

import numpy as np

from cero_jax.config import AllocatorConfig, Config
from cero_jax.data import Prompts, Task, encode_prompts
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.rewards.exact import exact
from cero_jax.sampler import SamplerConfig
from cero_jax.tokenizer import ByteTokenizer, EndsAlsoAt, Tokenizer

SOLVED = ("23 + 14 = 37", "7 * 6 = 42")
KINDS = (  # digits of either side; from nearly always right to never
    "1 + 1", "2 + 1", "2 * 1", "2 + 2", "3 * 1", "2 - 2", "2 - 1", "3 + 3", "3 + 2", "2 * 2", "3 - 2", "3 - 3",
)  # fmt: skip
_STREAM = 4  # keeps the task's draws apart from other uses of the same seed


@dataclass(frozen=True)
class Equations:
    """Equations of twelve kinds, as many of each, none of them twice."""

    train_of_kind: int = 24
    """Training prompts of each kind."""
    heldout_of_kind: int = 16
    """Held-out prompts of each kind."""
    max_prompt_tokens: int = 32
    """Longest prompt in tokens."""

    def build(self, seed: int, tokenizer: Tokenizer | None = None) -> Task:
        """The task. A completion ends with its line. tokenizer: None is bytes."""
        rng, train, heldout = np.random.default_rng((seed, _STREAM)), [], []
        for kind in KINDS:
            drawn = self._draw(rng, kind)
            train += [(kind, *each) for each in drawn[: self.train_of_kind]]
            heldout += [(kind, *each) for each in drawn[self.train_of_kind :]]
        train = [train[i] for i in rng.permutation(len(train))]  # an id says nothing of the prompt
        tokenizer = tokenizer or ByteTokenizer()
        lines = (tokenizer.encode(end)[-1] for end in ("\n", "\n\n", "\n\n\n"))  # some tokens hold several
        tokenizer = EndsAlsoAt(tokenizer, lines)
        return Task(self._encode(train, tokenizer), self._encode(heldout, tokenizer), tokenizer, exact)

    def _draw(self, rng: np.random.Generator, kind: str) -> list[tuple[str, str]]:
        """(question, answer) of distinct equations in random order; a difference is never negative."""
        left, sign, right = kind.split()
        rows = {}
        while len(rows) < self.train_of_kind + self.heldout_of_kind:
            a, b = (int(rng.integers(10 ** (int(digits) - 1), 10 ** int(digits))) for digits in (left, right))
            answer = {"+": a + b, "-": a - b, "*": a * b}[sign]
            question = f"{a} {sign} {b} ="
            if answer >= 0 and f"{question} {answer}" not in SOLVED:
                rows[question] = str(answer)
        return list(rows.items())

    def _encode(self, rows: list[tuple[str, str, str]], tokenizer: Tokenizer) -> Prompts:
        kinds, questions, answers = zip(*rows, strict=True)
        questions = ["\n".join((*SOLVED, question)) for question in questions]
        return encode_prompts(questions, answers, kinds, tokenizer, self.max_prompt_tokens)


config = Config(
    name="equations",
    task=Equations(),
    # groups of 4 under `uniform` too
    allocator=AllocatorConfig(total_budget=1536, num_epochs=24, min_group=4, max_group=16, group_size=4),
    sampler=SamplerConfig(max_completion_tokens=6, window=6),  # tokens: a space, four digits, the end of the line
    learner=LearnerConfig(
        rows_per_step=16, rows_per_microbatch=4, learning_rate=1e-5, warmup_share=0.1, max_grad_norm=0.3
    ),
    evaluation=EvaluationConfig(every_rollouts=384, samples=4, rows=256),
    checkpoint_every_steps=1_000_000,  # one of SmolLM2 holds 1.6 GB: only the one at the end
)
