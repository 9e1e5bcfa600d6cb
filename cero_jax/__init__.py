"""Spend one global budget of rollouts where they teach the most, over all prompts and all epochs.

`import cero_jax` imports nothing else; jax and numpy come in with the first use of a name, so that a process that needs
a verifier alone does not pay for them.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cero_jax.allocator import (
        Allocator,
        AllocatorState,
        Candidates,
        Ledger,
        Rule,
        TokenLedger,
        build_allocator,
        cero,
        cero_dual,
        diagnostics,
        expected_variance,
        knapsack,
        offline_optimum,
        uniform,
        variance,
        with_pass_rates,
    )

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


def __getattr__(name: str):
    """The allocator's public names, imported on first use."""
    if name in __all__:
        from cero_jax import allocator

        return getattr(allocator, name)
    raise AttributeError(f"module 'cero_jax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
