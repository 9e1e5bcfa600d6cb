"""Adaptive rollout allocation: pure functions on a NamedTuple state, one contract for every allocator."""

from cero_jax.allocator.base import Allocator, AllocatorState, diagnostics
from cero_jax.allocator.cero import cero
from cero_jax.allocator.ledger import Ledger
from cero_jax.allocator.rivals import uniform

__all__ = ["Allocator", "AllocatorState", "Ledger", "cero", "diagnostics", "uniform"]
