"""An allocator of your own in ten lines, and a config that trains with it.

A rule says what share of a budget each prompt should get. `cero_jax.build_allocator` adds the rest: whole groups, exact
sums, the ledger, the posterior, batches of prompts.

    python train.py examples/own_allocator.py --allocator.power=2
"""

from dataclasses import dataclass

import jax.numpy as jnp

import cero_jax
from cero_jax.config import AllocatorConfig, Config
from cero_jax.grpo import AdvantageKind
from cero_jax.learner import LearnerConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.warm_start import WarmStartConfig


def proportional(*, power: float, **settings) -> cero_jax.Allocator:
    """Shares in proportion to a power of E[p (1 - p)], the variance that a prompt's rewards are expected to have."""

    def rule(state, candidates, budget, key):
        weight = cero_jax.expected_variance(candidates.alpha, candidates.beta) ** power
        weight = jnp.where(candidates.valid, weight, 0.0)
        return budget * weight / jnp.sum(weight), state

    return cero_jax.build_allocator(rule, **settings)


@dataclass(frozen=True)
class Proportional(AllocatorConfig):
    """The settings of `proportional`, beside those that every allocator has."""

    name: str = "proportional"
    """Stands in the name of the run's directory."""
    power: float = 1.0
    """0 is uniform; the larger, the more goes to prompts that are solved half of the time."""

    def build(self, advantage: AdvantageKind = "grpo") -> cero_jax.Allocator:
        """The allocator. advantage: how the learner computes advantages, for a rule that depends on it."""
        if self.name != "proportional":
            return super().build(advantage)
        settings = self.resolved()  # with the usual prior and discount where none are named
        return proportional(
            power=settings.power,
            total_budget=settings.total_budget,
            num_epochs=settings.num_epochs,
            min_group=settings.min_group,
            max_group=settings.max_group,
            prior=settings.prior,
            discount=settings.discount,
        )


config = Config(
    name="own_allocator",
    task=ChainSum(),
    allocator=Proportional(total_budget=12_800, num_epochs=25, min_group=4, max_group=16),
    sampler=SamplerConfig(max_completion_tokens=25),
    learner=LearnerConfig(rows_per_step=16, learning_rate=2.5e-4),
    warm_start=WarmStartConfig(num_steps=500, learning_rate=3e-3),
)
