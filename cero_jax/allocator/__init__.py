"""Adaptive rollout allocation: pure functions on a NamedTuple state, one contract for every allocator."""

from cero_jax.allocator.base import Allocator, AllocatorState, Candidates, Rule, diagnostics, with_pass_rates
from cero_jax.allocator.build import build_allocator
from cero_jax.allocator.cero import cero
from cero_jax.allocator.cero_dual import cero_dual
from cero_jax.allocator.dual import offline_optimum
from cero_jax.allocator.ledger import Ledger, TokenLedger
from cero_jax.allocator.posterior import expected_variance
from cero_jax.allocator.rivals import knapsack, uniform, variance

__all__ = [
    "Allocator",
    "AllocatorState",
    "Candidates",
    "Ledger",
    "Rule",
    "TokenLedger",
    "build_allocator",
    "cero",
    "cero_dual",
    "diagnostics",
    "expected_variance",
    "knapsack",
    "offline_optimum",
    "uniform",
    "variance",
    "with_pass_rates",
]
