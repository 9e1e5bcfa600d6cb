r"""Qwen2.5-0.5B-Instruct on GSM8K: one GPU, data and model by name. Its test split is held out, and never trained on.

Needs, by the estimate that a run prints and not measured: 13 GB of one GPU's memory, with parameters in float32 that
are computed with in bfloat16, and each layer computed again for its gradient. Adapters alone (LoRA) need 6 GB:
--model.lora-rank=16 --model.param-dtype=bfloat16 --learner.learning-rate=1e-5 (whose rate is a guess).
The answer is read from a \boxed{} or behind "####", else it is the last number: the verifier final_number.
Expect: not yet measured, neither the accuracy nor the hours. `--dry-run` says what would begin, and draws nothing.
Get: pip install '.[train,cuda]'. The first start downloads 1 GB into the hub's cache; later ones need no network.
Command: python train.py configs/qwen2_5_0_5b_gsm8k.py --dry-run
"""

from cero_jax.config import AllocatorConfig, Config
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.tasks.dataset import Dataset

config = Config(
    name="qwen2_5_0_5b_gsm8k",
    model_folder="hf:Qwen/Qwen2.5-0.5B-Instruct",
    model=ModelConfig(compute_dtype="bfloat16", remat=True),
    task=Dataset(
        path="hf:openai/gsm8k:main/train",
        heldout_paths=("hf:openai/gsm8k:main/test",),
        template="{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        chat=True,
        max_prompt_tokens=320,
    ),
    allocator=AllocatorConfig(total_budget=4 * 7473, num_epochs=16, min_group=4, max_group=32),
    sampler=SamplerConfig(max_completion_tokens=512),
    learner=LearnerConfig(rows_per_step=64, learning_rate=1e-6, adam_b2=0.999, clip_high=0.28),
    evaluation=EvaluationConfig(every_rollouts=4096, samples=1, rows=256),
)
