r"""DAPO's rows (Parquet, a chat in `prompt`, the gold answer in `reward_model.ground_truth`) by config alone.

As it stands, a tiny random policy on bytes: a check of the plumbing. With a model folder's tokenizer say
--task.chat=True.

Needs: 2 cores, 3 GB of memory, and the files (BytedTsinghua-SIA/DAPO-Math-17k).
Expect: rewards of 0, since nothing was ever taught.
Command: python train.py configs/dapo.py --task.path='dapo-math-17k/*.parquet'
"""

from cero_jax.config import AllocatorConfig, Config
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.tasks.dataset import Dataset

config = Config(
    name="dapo",
    task=Dataset(
        path="dapo-math-17k.parquet",
        question_field="prompt",
        answer_field="reward_model.ground_truth",
        verifier="math",
        num_heldout=64,
    ),
    allocator=AllocatorConfig(total_budget=20 * 32, num_epochs=10, max_group=16),
    model=ModelConfig(num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128),
    sampler=SamplerConfig(max_completion_tokens=64),
    learner=LearnerConfig(rows_per_step=32),
    evaluation=EvaluationConfig(every_rollouts=320, samples=1, rows=32),
)
