"""GSM8K's rows through the same loop, with a tiny random policy on bytes: a check of the plumbing, not a result.

Needs: 2 cores, 2 GB of memory, a JSONL file of `question` and `answer` (ending in `#### 72`).
Expect: rewards of 0, since nothing was ever taught; about 7 seconds a step.
Command: python train.py configs/gsm8k.py --task.path=gsm8k_train.jsonl
"""

from cero_jax.config import AllocatorConfig, Config
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.tasks.dataset import Dataset

config = Config(
    name="gsm8k",
    task=Dataset(path="gsm8k_train.jsonl", template="Q: {question}\nA: ", max_prompt_tokens=1024, num_heldout=64),
    allocator=AllocatorConfig(total_budget=20 * 32, num_epochs=10, max_group=16),
    model=ModelConfig(num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128),
    sampler=SamplerConfig(max_completion_tokens=64),
    learner=LearnerConfig(rows_per_step=32),
    evaluation=EvaluationConfig(every_rollouts=320, samples=1, rows=32),
)
