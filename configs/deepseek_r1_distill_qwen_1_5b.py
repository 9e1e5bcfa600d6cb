"""DeepSeek-R1-Distill-Qwen-1.5B on GSM8K's training questions.

Needs, by the estimate that a run prints and not measured: 45 GB on one H100, 14 of them the optimiser's and as many
gradients, each layer computed again for its gradient; less with --mesh.fsdp=N on N devices. Not run at this size yet.
Get: the model's folder from Hugging Face (deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B), gsm8k_train.jsonl.
Command: python train.py configs/deepseek_r1_distill_qwen_1_5b.py --model-folder=DIR --task.path=gsm8k_train.jsonl
"""

from cero_jax.config import AllocatorConfig, Config
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.tasks.dataset import Dataset

config = Config(
    name="deepseek_r1_distill_qwen_1_5b",
    model_folder="DeepSeek-R1-Distill-Qwen-1.5B",
    model=ModelConfig(compute_dtype="bfloat16", remat=True),
    task=Dataset(
        path="gsm8k_train.jsonl",
        # The folder's chat template for one question, as text; the tokenizer puts the BOS before it.
        template="<｜User｜>{question} Please reason step by step, and put your final answer within \\boxed{}."
        "<｜Assistant｜><think>\n",
        max_prompt_tokens=320,
    ),
    allocator=AllocatorConfig(total_budget=8 * 7217, num_epochs=16, min_group=4, max_group=32),
    sampler=SamplerConfig(max_completion_tokens=2048),
    learner=LearnerConfig(rows_per_step=64, learning_rate=1e-6, adam_b2=0.999, clip_high=0.28),
    evaluation=EvaluationConfig(every_rollouts=8192, samples=2, rows=64),
)
