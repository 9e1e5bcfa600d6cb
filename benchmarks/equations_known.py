r"""What is it worth to know the prompts before the first rollout? Graded equations, and how often a model solved each.

The model is asked first, 16 samples of every prompt, and nobody pays for that: so it is with a data set that comes with
pass rates. Whose rates these are is a question of who was asked: the policy itself as it comes, or another model.

    python benchmarks/real_model.py headroom models/smollm2-135m-instruct --samples 16 --seed 100 --out right.json
    python train.py benchmarks/equations_known.py --model-folder=models/smollm2-135m-instruct --task.right=right.json \
        --seed=100 --allocator.min-group=1 --allocator.max-group=8 --allocator.total-budget=768 \
        --learner.advantage=reward --learner.learning-rate=1e-5 --learner.rows-per-step=8 \
        --learner.rows-per-microbatch=8 --evaluation.every-rollouts=192

With `--task.third=True` the data are the third of the prompts that vary most, without their rates. Equal shares of it
(`--allocator.name=uniform --allocator.group-size=1`) are the best that an allocator could do which knows who varies and
learns nothing more.
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
class Known(Equations):
    """The equations of a seed, and how often a model was right on each."""

    right: str = "right.json"
    """What `benchmarks/real_model.py headroom --out` wrote for this seed."""
    third: bool = False
    """Train on the third that varies most alone."""

    def build(self, seed: int, tokenizer: Tokenizer | None = None) -> Task:
        """The task. Raises ValueError where `right` is another seed's."""
        task, known = super().build(seed, tokenizer), json.loads(Path(self.right).read_text())
        right, train = np.array(known["right"]), task.train
        if known["labels"] != list(train.labels):
            raise ValueError(f"{self.right} is of other prompts than seed={seed} has: write it with that seed")
        if not self.third:
            return task._replace(train=train._replace(pass_rates=(right / known["samples"]).astype(np.float32)))
        most = np.argsort(-right * (known["samples"] - right), kind="stable")[: len(right) // 3]
        rows = [(train.questions[i], train.answers[i], train.labels[i]) for i in sorted(most)]
        questions, answers, labels = zip(*rows, strict=True)
        third = encode_prompts(questions, answers, labels, task.tokenizer, self.max_prompt_tokens)
        return task._replace(train=third)


config = dataclasses.replace(_whole["config"], name="equations_known", task=Known())
