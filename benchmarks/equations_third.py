r"""What would an allocation be worth that knew the truth? Graded equations, the third of the prompts that vary most.

The model as it comes is asked first, and nobody pays for that; equal shares of this third are then what an allocator
could do at best that never has to find out. The held-out prompts are those of all.

    python benchmarks/real_model.py headroom models/smollm2-135m-instruct --samples 16 --seed 100 --out right.json
    python train.py benchmarks/equations_third.py --model-folder=models/smollm2-135m-instruct --task.truth=right.json \
        --seed=100 --allocator.name=uniform --allocator.min-group=1 --allocator.group-size=1 --allocator.max-group=8 \
        --allocator.total-budget=768 --learner.advantage=reward --learner.learning-rate=1e-5 --learner.rows-per-step=8 \
        --learner.rows-per-microbatch=8 --evaluation.every-rollouts=192
"""

import dataclasses
import json
import runpy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cero_jax.data import Task, encode_prompts
from cero_jax.tokenizer import Tokenizer

_whole = runpy.run_path(str(Path(__file__).parent.parent / "configs/equations.py"))
Equations = _whole["Equations"]


@dataclass(frozen=True)
class Third(Equations):
    """The equations that `truth` says vary most; of the seed that it was drawn with."""

    truth: str = "right.json"
    """What `benchmarks/real_model.py headroom --out` wrote."""

    def build(self, seed: int, tokenizer: Tokenizer | None = None) -> Task:
        """The task. Raises ValueError where the truth is another seed's."""
        task, truth = super().build(seed, tokenizer), json.loads(Path(self.truth).read_text())
        right, train = np.array(truth["right"]), task.train
        if truth["labels"] != list(train.labels):
            raise ValueError(f"{self.truth} is of other prompts than seed={seed} has: write it with that seed")
        most = np.argsort(-right * (truth["samples"] - right), kind="stable")[: len(right) // 3]
        rows = [(train.questions[i], train.answers[i], train.labels[i]) for i in sorted(most)]
        questions, answers, labels = zip(*rows, strict=True)
        third = encode_prompts(questions, answers, labels, task.tokenizer, self.max_prompt_tokens)
        return task._replace(train=third)


config = dataclasses.replace(_whole["config"], name="equations_third", task=Third())
