"""What an import costs: the package alone imports nothing, the allocator jax and numpy only."""

import subprocess
import sys

import pytest


def imported(statement: str) -> set[str]:
    """Top-level modules that a fresh process has after the statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_package_alone_imports_nothing_heavy():
    assert not imported("import cero_jax, cero_jax.rewards") & {"jax", "jaxlib", "numpy", "flax", "optax", "orbax"}


def test_a_verifying_process_imports_neither_jax_nor_numpy():
    modules = imported("import cero_jax.rewards.pool, cero_jax.rewards.choice, cero_jax.rewards.final_number")
    assert not modules & {"jax", "jaxlib", "numpy", "flax", "sympy", "pebble"}


def test_the_allocator_imports_jax_and_numpy_only():
    modules = imported("import cero_jax; cero_jax.cero")
    assert {"jax", "numpy"} <= modules
    assert not modules & {"flax", "optax", "orbax", "chex", "scipy", "matplotlib", "tyro"}


def test_integrations_import_neither_torch_nor_their_trainers_until_used():
    modules = imported("import cero_jax.integrations.trl; cero_jax.integrations.trl.CeroMixin")
    assert not modules & {"torch", "trl", "transformers", "jax", "flax", "optax", "orbax"}
    modules = imported("import cero_jax.integrations.tunix")
    assert not modules & {"torch", "tunix", "flax", "optax", "orbax"}


def test_the_simulator_and_reports_import_jax_and_numpy_only():
    modules = imported("import cero_jax.simulate, cero_jax.report.__main__")
    assert not modules & {"flax", "optax", "orbax", "chex", "scipy", "matplotlib", "tyro", "pyarrow"}
    assert not modules & {"tqdm", "tensorboardX", "pebble", "safetensors"}


def test_an_unknown_name_is_refused_with_those_there_are():
    import cero_jax

    with pytest.raises(AttributeError, match=r"sero.*uniform"):
        cero_jax.sero  # noqa: B018
    assert set(cero_jax.__all__) <= set(dir(cero_jax))
