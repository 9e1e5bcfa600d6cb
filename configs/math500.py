r"""Competition mathematics judged by math-verify, with a tiny random policy on bytes: a check of the plumbing.

Trains on the rows of a file of `problem` and `answer` (MATH's shape) and measures on AIME and AMC rows, each a data set
of its own in the table. Give a real model to make a result of it.

Needs: 2 cores, 3 GB of memory, `pip install '.[train]'`, and the files.
Expect: rewards of 0, since nothing was ever taught.
Command: python train.py configs/math500.py --task.path=math500.jsonl --task.heldout-paths aime24.jsonl amc23.jsonl
"""

from cero_jax.config import AllocatorConfig, Config
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.tasks.dataset import Dataset

config = Config(
    name="math500",
    task=Dataset(
        path="math500.jsonl",
        question_field="problem|question",
        template="{question}\nReason step by step, and put the final answer within \\boxed{}.\n",
        verifier="math",
        heldout_paths=("aime24.jsonl", "amc23.jsonl"),
    ),
    allocator=AllocatorConfig(total_budget=20 * 32, num_epochs=10, max_group=16),
    model=ModelConfig(num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128),
    sampler=SamplerConfig(max_completion_tokens=64),
    learner=LearnerConfig(rows_per_step=32),
    evaluation=EvaluationConfig(every_rollouts=320, samples=4, rows=32),
)
