"""Running sums modulo 10: the embedded task. No download, no GPU.

Needs: 2 cores, 2 GB of memory.
Command: make train, or python train.py configs/chain_sum.py
"""

from cero_jax.config import AllocatorConfig, Config
from cero_jax.sampler import SamplerConfig
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.warm_start import WarmStartConfig

config = Config(
    name="chain_sum",
    task=ChainSum(),
    allocator=AllocatorConfig(total_budget=12_800, num_epochs=25),
    sampler=SamplerConfig(max_completion_tokens=25),
    warm_start=WarmStartConfig(num_steps=500, learning_rate=3e-3),
)
