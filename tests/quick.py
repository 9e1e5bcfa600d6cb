"""Compiling with little optimisation: for tests of integers that a program decides on, not of how it rounds."""

import functools

import jax

LITTLE_OPTIMISATION = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@functools.cache
def _known_options() -> dict:
    """Those that this version of XLA has: they come and go."""

    def is_known(name: str) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options={name: LITTLE_OPTIMISATION[name]})()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in LITTLE_OPTIMISATION.items() if is_known(name)}


def quick_jit(function):
    """`jax.jit` that compiles `cero` in 1.1 s of processor time instead of 3.9; what it compiled runs slower."""
    return jax.jit(function, compiler_options=_known_options())
