"""A task and a verifier of your own: close what brackets are open. A minute on a laptop, nothing to download.

"([{=" -> "}])" is right. There is no gold answer: the verifier reads the brackets. A fifth of the training prompts hold
a bracket that closes nothing, "([)=", so that no rollout can solve them, as some rows of real data are broken.

A task is a frozen dataclass with `build`; its fields are settings of the run: `--task.broken-share=0.5`, or `--help`.

Needs: 2 cores, 2 GB of memory.
Expect: held-out accuracy from about 0.25 to about 0.8 (0.229 to 0.787 with seed 0, 0.279 to 0.844 with seed 1).
Command: python train.py examples/own_task.py
"""

from dataclasses import dataclass

import numpy as np

from cero_jax.config import AllocatorConfig, Config
from cero_jax.data import Prompts, Task, encode_prompts
from cero_jax.learner import LearnerConfig
from cero_jax.rewards import RIGHT, WRONG, Verdict
from cero_jax.sampler import SamplerConfig
from cero_jax.tokenizer import AlphabetTokenizer, Tokenizer
from cero_jax.warm_start import WarmStartConfig

CLOSER = {"(": ")", "[": "]", "{": "}"}
LONGEST = 8  # brackets of a question


def balanced(question: str, completion: str, answer: str) -> Verdict:
    """The verifier: does the completion close all that the question opened, in order, and nothing else?

    A float would do, too: a Verdict says beside the reward what was read. `answer` is the gold answer, where there is
    one. The text of a completion is parsed; it is never executed.
    """
    still_open = []
    for character in question.removesuffix("=") + completion:
        if character in CLOSER:
            still_open.append(CLOSER[character])
        elif not still_open or still_open.pop() != character:
            return Verdict(0.0, WRONG, completion)
    return Verdict(0.0, WRONG, completion) if still_open else Verdict(1.0, RIGHT, completion)


@dataclass(frozen=True)
class Brackets:
    """Rows of open brackets to close."""

    num_prompts: int = 256
    """Training prompts."""
    broken_share: float = 0.2
    """Share of the training prompts that nothing can close."""
    num_heldout: int = 128
    """Held-out prompts: none broken, none a training prompt."""

    def build(self, seed: int, tokenizer: Tokenizer | None = None) -> Task:
        """The prompts, drawn by `seed`. tokenizer: a model folder's; None where the run has no model folder."""
        tokenizer = tokenizer or AlphabetTokenizer("([{)]}=")
        rng = np.random.default_rng(seed)
        rows = list(dict.fromkeys(draw_rows(rng, 10_000)))  # each once
        if len(rows) < self.num_prompts + self.num_heldout:
            raise ValueError(f"num_prompts={self.num_prompts} and num_heldout={self.num_heldout}: at most {len(rows)}")
        train, heldout = rows[: self.num_prompts], rows[self.num_prompts :][: self.num_heldout]
        num_broken = round(self.broken_share * self.num_prompts)
        labels = ["broken"] * num_broken + [f"{len(row)} brackets" for row in train[num_broken:]]
        train[:num_broken] = [row[:-1] + wrong_closer(row) for row in train[:num_broken]]

        def demonstrations(rng: np.random.Generator, batch_size: int) -> tuple[list[str], list[str]]:
            """What the warm start imitates, before any rollout is drawn; a fifth of the answers' brackets are wrong."""
            shown = [row for row in draw_rows(rng, 2 * batch_size) if row not in heldout][:batch_size]
            return [f"{row}=" for row in shown], [noisy_answer(rng, row) for row in shown]

        def encode(rows: list[str], labels: list[str]) -> Prompts:
            return encode_prompts([f"{row}=" for row in rows], [""] * len(rows), labels, tokenizer, LONGEST + 1)

        return Task(
            train=encode(train, labels),
            heldout=encode(heldout, [f"{len(row)} brackets" for row in heldout]),
            tokenizer=tokenizer,
            verify=balanced,
            demonstrations=demonstrations,
        )


def draw_rows(rng: np.random.Generator, count: int) -> list[str]:
    """Rows of 2 to LONGEST open brackets."""
    return ["".join(rng.choice(list(CLOSER), rng.integers(2, LONGEST + 1))) for _ in range(count)]


def wrong_closer(row: str) -> str:
    """A closing bracket that does not fit behind the last but one bracket of the row."""
    return next(closer for opener, closer in CLOSER.items() if opener != row[-2])


def noisy_answer(rng: np.random.Generator, row: str) -> str:
    """What closes the row, but three in ten brackets are drawn blindly."""
    closers = [CLOSER[bracket] for bracket in reversed(row)]
    return "".join(rng.choice(list(CLOSER.values())) if rng.random() < 0.3 else closer for closer in closers)


config = Config(
    name="own_task",
    task=Brackets(),
    allocator=AllocatorConfig(total_budget=6_400, num_epochs=16, min_group=4, max_group=16),
    sampler=SamplerConfig(max_completion_tokens=LONGEST + 1),
    learner=LearnerConfig(rows_per_step=16, learning_rate=4e-4),
    warm_start=WarmStartConfig(num_steps=400, learning_rate=3e-3),
)
