"""XLA's flags for the tests: compiling, most of their time, takes a third of it where little is optimised."""

import os
import subprocess
import sys

LITTLE_OPTIMISATION = (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


def with_little_optimisation(given: str) -> str:
    """XLA_FLAGS as given and these; as given where a level of optimisation is among them."""
    if "xla_backend_optimization_level" in given or not _known(LITTLE_OPTIMISATION):
        return given
    return given + LITTLE_OPTIMISATION


def _known(flags: str) -> bool:
    """Whether this version of XLA has these flags: they come and go, and it ends the process that gives it another."""
    code = "from jaxlib import xla_client; xla_client.CompileOptions()"
    read = subprocess.run([sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True)
    return read.returncode == 0
