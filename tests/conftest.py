"""Strict settings for every test: 8 virtual CPU devices, no silent rank promotion. What one compiled serves all.

XLA optimises little here; test_optimised.py has what hangs on its optimisations. To have all tests with them:
`XLA_FLAGS=--xla_backend_optimization_level=3 make test`.
"""

import os
import tempfile

from little_optimisation import with_little_optimisation

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers, and the processes that tests start, inherit it
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = with_little_optimisation(flags)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["NPROC"] = "8"  # fixes the size of XLA's thread pool, and with it the bits of a matrix product
    compiled = tempfile.TemporaryDirectory(prefix="cero_jax-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("any machine", deadline=None)  # on a busy one an example may take long
hypothesis.settings.load_profile("any machine")

# The files that take longest: begun last, one of them would keep a worker after the others have nothing left to do.
FIRST = (
    "test_optimised", "test_train", "test_contract", "test_resume", "test_weights", "test_docs", "test_lora",
    "test_sharding", "test_rounding", "test_hosts", "test_cero", "test_cero_dual", "test_learner", "test_sampler",
    "test_simulate",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Begin with these, the longest first; with --no-loadscope-reorder a worker takes up the next in this order."""
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


@pytest.fixture
def strict_dtypes():
    """No implicit dtype promotion: for the allocator, grpo, the sampler and the model (optax raises under it)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def one_length():
    """A program for one length of a micro-batch, where what is tested does not hang on there being three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cero_jax.learner.token_limits", lambda limit: (limit,))
        yield
