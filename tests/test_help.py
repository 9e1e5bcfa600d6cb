"""What `help` shows of the public functions: every argument in one line, complete in itself, and examples that run."""

import doctest
import importlib
import inspect
import pydoc
import re

import pytest

import cero_jax
from cero_jax.allocator import defaults

ALLOCATOR = cero_jax.cero(total_budget=100, num_epochs=1)
MAKERS = [cero_jax.cero, cero_jax.uniform, cero_jax.variance, cero_jax.knapsack, cero_jax.cero_dual]
FUNCTIONS = {
    make.__name__: make for make in (*MAKERS, cero_jax.build_allocator, cero_jax.offline_optimum)
} | ALLOCATOR._asdict()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_shows_every_argument_in_one_line(name):
    function = FUNCTIONS[name]
    shown = pydoc.render_doc(function, renderer=pydoc.plaintext)
    arguments = inspect.signature(function).parameters
    (text,) = re.findall(r"^    Args:\n(.*?)^    \n", shown, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^        (\w+): \S", text, re.MULTILINE) == list(arguments)
    assert len(text.splitlines()) == len(arguments)
    signature = next(line for line in shown.splitlines() if line.startswith(f"{name}("))
    assert all(re.search(rf"\b{argument}\b", signature) for argument in arguments)
    assert {"    Returns:", "    Raises:"} <= set(shown.splitlines())
    assert "as in `" not in shown
    assert max(map(len, shown.partition("Args:")[2].splitlines())) <= 120


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_formula_has_its_source(make):
    assert len(re.findall(r"Source.*arXiv \d{4}\.\d{5}", inspect.getdoc(make))) == 1


def test_the_example_of_cero_runs():
    module = importlib.import_module("cero_jax.allocator.cero")
    result = doctest.testmod(module)
    assert (result.failed, result.attempted) == (0, 4)


def test_defaults_stand_in_one_place():
    for make in (*MAKERS, cero_jax.build_allocator):
        papers = ("prior", "discount") if make is cero_jax.cero_dual else ()  # which has the paper's constants
        for name, argument in inspect.signature(make).parameters.items():
            if hasattr(defaults, name.upper()) and name not in papers:
                assert argument.default is getattr(defaults, name.upper())
