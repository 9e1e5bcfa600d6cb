"""The two utility families: Fenchel-Young, autodiff and scipy against the closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from cero_jax.allocator.utility import EXPONENTIAL, RATIONAL, first_slope_and_scale, utility_family

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
    with pytest.raises(ValueError, match="'log' is neither 'exponential' nor 'rational' nor 'capture'"):
        utility_family("log")


U = {
    "exponential": lambda v, x, tau: v * (1 - np.exp(-x / tau)),
    "rational": lambda v, x, tau: v * (x / tau) / (1 + x / tau),
    "capture": lambda v, x, tau: 1 - np.exp(-4 * v * x / tau),
}


@pytest.mark.parametrize("name", U)
def test_each_utility_is_its_first_slope_times_its_scale_times_the_curve(name):
    v, tau, x = jnp.array([0.25, 0.1, 0.002]), jnp.float32(30.0), jnp.array([0.0, 3.0, 40.0])
    log_slope, scale = first_slope_and_scale(name, v, tau)
    family = utility_family(name)
    scale = jnp.broadcast_to(scale, v.shape)
    slope = jnp.exp(log_slope) / tau
    value = (slope * scale)[:, None] * family.value(x[None, :] / scale[:, None])
    exact = U[name](np.asarray(v, float)[:, None], np.asarray(x, float)[None, :], 30.0)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    numeric = (U[name](np.asarray(v, float), 1e-6, 30.0) - U[name](np.asarray(v, float), 0.0, 30.0)) / 1e-6
    np.testing.assert_allclose(slope, numeric, rtol=1e-4)


@pytest.mark.parametrize("price", [1e-4, 0.002, 0.02])
@pytest.mark.parametrize("v", [0.25, 0.05, 0.001])
def test_the_inverse_marginal_of_value_capture_is_its_closed_form_and_scipys_maximiser(price, v):
    tau = 30.0
    c = 4 * v / tau  # X*(price) = (1 / c) log(c / price)
    log_slope, scale = first_slope_and_scale("capture", jnp.float32(v), jnp.float32(tau))
    inverse = utility_family("capture").inverse_log_slope(jnp.log(jnp.float32(price)) + jnp.log(tau) - log_slope)
    found = float(jnp.maximum(scale * inverse, 0))
    assert found == pytest.approx(max(np.log(c / price) / c, 0), rel=1e-4, abs=1e-2)
    best = minimize_scalar(
        lambda x: price * x - 1 + np.exp(-c * x), bounds=(0, 5000), method="bounded", options={"xatol": 1e-8}
    )
    value = price * found - 1 + np.exp(-c * found)
    assert value == pytest.approx(min(best.fun, 0), abs=1e-6)
    conjugate = utility_family("capture").conjugate(jnp.minimum(jnp.float32(price / c), 1))  # max of U(X) - price X
    assert float(conjugate) == pytest.approx(max(-best.fun, 0), abs=1e-5)
