"""Qwen3-4B on GSM8K's training questions, without its thinking mode.

Needs, by the estimate that a run prints and not measured: 49 GB on each of two H100, 16 of them the
optimiser's and as many gradients, each layer computed again for its gradient. Not run at this size yet.
Get: the model's folder from Hugging Face (Qwen/Qwen3-4B), gsm8k_train.jsonl.
Command: python train.py configs/qwen3_4b.py --model-folder=DIR --task.path=gsm8k_train.jsonl
"""

from cero_jax.config import AllocatorConfig, Config
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.sharding import MeshConfig
from cero_jax.tasks.dataset import Dataset

config = Config(
    name="qwen3_4b",
    model_folder="Qwen3-4B",
    model=ModelConfig(compute_dtype="bfloat16", remat=True),
    mesh=MeshConfig(fsdp=2),
    task=Dataset(
        path="gsm8k_train.jsonl",
        # The empty thought is how the folder's chat template turns thinking off.
        template="<|im_start|>user\n{question} Please reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        max_prompt_tokens=320,
    ),
    allocator=AllocatorConfig(total_budget=8 * 7217, num_epochs=16, min_group=4, max_group=32),
    sampler=SamplerConfig(max_completion_tokens=1024),
    learner=LearnerConfig(rows_per_step=64, learning_rate=1e-6, adam_b2=0.999, clip_high=0.28),
    evaluation=EvaluationConfig(every_rollouts=8192, samples=2, rows=64),
)
