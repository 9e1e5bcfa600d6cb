"""What hangs on how a program rounds, or on what XLA makes of it, once more: compiled as a user's program is.

conftest.py turns XLA's optimisations down, which a process is told once, at its start: these have one of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOCATORS = (  # integers that real numbers decide on: exact sums, and the same in every process and on every device
    "test_contract.py::test_a_run_spends_the_budget_to_the_rollout_in_epochs_shorter_than_a_pass",
    "test_contract.py::test_jit_equals_eager",
    "test_cero.py::test_replicated_integers_are_those_of_one_device",
    "test_cero.py::test_extreme_states_keep_bounds_and_sums",
    "test_cero_dual.py::test_every_round_is_that_of_a_plain_transcript_of_algorithm_1[0]",
    "test_rounding.py::test_the_sum_is_exact_at_a_million_prompts",
    "test_rounding.py::test_groups_are_within_bounds_and_sum_to_the_closest_feasible_budget[4-10-2]",
)
POLICIES = (  # rounding in the model, memory, and bits over processes
    "test_learner.py::test_loss_equals_float64_loops",
    "test_memory.py::test_activations_and_logits_are_near_the_compilers_figure[False]",
    "test_prefill.py",
    "test_sampler.py::test_refilled_slots_draw_what_slots_of_their_own_do[8-2-8]",
    "test_sharding.py::test_draws_are_those_of_one_device[data 2 x fsdp 4]",
    "test_weights.py::test_greedy_decoding_with_the_cache_gives_the_tokens_of_transformers[qwen3]",
    "test_resume.py::test_kill_and_resume_is_bit_identical",
)


@pytest.mark.parametrize("tests", [ALLOCATORS, POLICIES], ids=["allocators", "policies"])
def test_what_hangs_on_rounding_holds_of_optimised_programs(tests):
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # it is no worker
    done = subprocess.run(
        [*command, *(f"tests/{each}" for each in tests)],
        env=own | {"XLA_FLAGS": "--xla_backend_optimization_level=3"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
