"""Qwen2.5-Math-7B, the base model, on GSM8K's training questions.

Needs, by the estimate that a run prints and not measured: 47 GB on each of four H100, 15 of them the
optimiser's and as many gradients, each layer computed again for its gradient. Its 28 heads over 4 of keys and
values: --mesh.tensor may be 2 or 4. With LoRA one will do (27 GB): --mesh.fsdp=1 --model.lora-rank=16
--model.param-dtype=bfloat16 --learner.learning-rate=1e-5 (whose rate is a guess). Not run at this size yet.
Get: the model's folder from Hugging Face (Qwen/Qwen2.5-Math-7B), gsm8k_train.jsonl.
Command: python train.py configs/qwen2_5_math_7b.py --model-folder=DIR --task.path=gsm8k_train.jsonl
"""

from cero_jax.config import AllocatorConfig, Config
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.sharding import MeshConfig
from cero_jax.tasks.dataset import Dataset

config = Config(
    name="qwen2_5_math_7b",
    model_folder="Qwen2.5-Math-7B",
    model=ModelConfig(compute_dtype="bfloat16", remat=True),
    mesh=MeshConfig(fsdp=4),
    task=Dataset(
        path="gsm8k_train.jsonl",
        template="<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        max_prompt_tokens=320,
    ),
    allocator=AllocatorConfig(total_budget=8 * 7217, num_epochs=16, min_group=4, max_group=32),
    sampler=SamplerConfig(max_completion_tokens=1024),
    learner=LearnerConfig(rows_per_step=64, learning_rate=1e-6, adam_b2=0.999, clip_high=0.28),
    evaluation=EvaluationConfig(every_rollouts=8192, samples=2, rows=64),
)
