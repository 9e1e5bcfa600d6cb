"""Adaptive rollout allocation: pure functions on a NamedTuple state, one contract for every allocator."""

from cero_jax.allocator.base import Allocator, AllocatorState, diagnostics
from cero_jax.allocator.cero import cero
from cero_jax.allocator.cero_dual import cero_dual
from cero_jax.allocator.dual import offline_optimum
from cero_jax.allocator.ledger import Ledger, TokenLedger
from cero_jax.allocator.rivals import knapsack, uniform, variance

__all__ = [
    "Allocator",
    "AllocatorState",
    "Ledger",
    "TokenLedger",
    "cero",
    "cero_dual",
    "diagnostics",
    "knapsack",
    "offline_optimum",
    "uniform",
    "variance",
]
