"""The two utility families: Fenchel-Young, autodiff and scipy against the closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from cero_jax.allocator.utility import EXPONENTIAL, RATIONAL, utility_family

Z = jnp.array([0.0, 1e-3, 0.1, 0.7, 1.0, 3.0, 12.0])
families = pytest.mark.parametrize("family", [EXPONENTIAL, RATIONAL], ids=["exponential", "rational"])


@families
def test_h_starts_at_0_with_slope_1_and_is_concave_and_bounded(family):
    assert float(family.value(0.0)) == 0
    assert float(family.log_slope(0.0)) == 0
    z = jnp.linspace(0, 50, 501)
    assert np.all(np.diff(family.value(z)) >= 0)
    assert np.all(np.diff(family.log_slope(z)) < 0)
    assert float(family.value(1e9)) <= 1


@families
def test_the_slope_is_the_derivative(family):
    np.testing.assert_allclose(jnp.exp(family.log_slope(Z)), jax.vmap(jax.grad(family.value))(Z), rtol=1e-5, atol=1e-7)


@families
def test_the_inverse_marginal_inverts(family):
    np.testing.assert_allclose(family.inverse_log_slope(family.log_slope(Z)), Z, rtol=1e-5, atol=1e-6)


@families
def test_fenchel_young_holds_with_equality_at_the_slope_and_above_elsewhere(family):
    slope = jnp.exp(family.log_slope(Z))
    np.testing.assert_allclose(slope * Z + family.conjugate(slope), family.value(Z), rtol=1e-5, atol=1e-6)
    other = jnp.array([1e-3, 0.2, 0.9])
    bound = other[:, None] * Z[None, :] + family.conjugate(other)[:, None]
    assert np.all(bound >= family.value(Z)[None, :] - 1e-6)


@families
@pytest.mark.parametrize("slope", [0.01, 0.3, 0.99])
def test_the_conjugate_is_scipys_maximum(family, slope):
    h = (lambda z: 1 - np.exp(-z)) if family is EXPONENTIAL else (lambda z: z / (1 + z))
    found = minimize_scalar(lambda z: slope * z - h(z), bounds=(0, 100), method="bounded", options={"xatol": 1e-10})
    assert float(family.conjugate(slope)) == pytest.approx(-found.fun, rel=1e-4, abs=1e-7)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="'log' is neither 'exponential' nor 'rational'"):
        utility_family("log")
