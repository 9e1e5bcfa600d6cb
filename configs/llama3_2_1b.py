"""Llama-3.2-1B-Instruct on GSM8K's training questions.

Needs, by the estimate that a run prints and not measured: 28 GB on one H100, 10 of them the optimiser's and as many
gradients, each layer computed again for its gradient. Not run at this size yet.
Get: the model's folder from Hugging Face (meta-llama/Llama-3.2-1B-Instruct; its licence must be accepted there),
gsm8k_train.jsonl.
Command: python train.py configs/llama3_2_1b.py --model-folder=DIR --task.path=gsm8k_train.jsonl
"""

from cero_jax.config import AllocatorConfig, Config
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.tasks.dataset import Dataset

config = Config(
    name="llama3_2_1b",
    model_folder="Llama-3.2-1B-Instruct",
    model=ModelConfig(compute_dtype="bfloat16", remat=True),
    task=Dataset(
        path="gsm8k_train.jsonl",
        # The folder's chat format for one question, as text, without its dated system message.
        template="<|start_header_id|>user<|end_header_id|>\n\n{question} Reason step by step, and end with a line "
        "#### and the number.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        max_prompt_tokens=320,
    ),
    allocator=AllocatorConfig(total_budget=8 * 7217, num_epochs=16, min_group=4, max_group=32),
    sampler=SamplerConfig(max_completion_tokens=512),
    learner=LearnerConfig(rows_per_step=64, learning_rate=1e-6, adam_b2=0.999, clip_high=0.28),
    evaluation=EvaluationConfig(every_rollouts=8192, samples=2, rows=64),
)
