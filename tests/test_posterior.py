"""The Beta posterior: scipy's moments, forgetting that does not depend on how time is cut, the fitted prior."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

from cero_jax.allocator.posterior import expected_variance, fitted_prior, forget, retention

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_expected_variance_is_scipys_moment_even_at_the_extremes():
    alpha, beta = np.meshgrid([1e-6, 0.5, 1.0, 3.7, 40.0, 1e6], [1e-6, 0.5, 2.0, 1e6])
    law = stats.beta(alpha, beta)
    ours = expected_variance(jnp.float32(alpha), jnp.float32(beta))
    np.testing.assert_allclose(ours, alpha * beta / ((alpha + beta) * (alpha + beta + 1)), rtol=1e-5)
    mild = (alpha > 1e-3) & (beta > 1e-3) & (alpha < 1e3) & (beta < 1e3)
    np.testing.assert_allclose(ours[mild], (law.mean() - law.mean() ** 2 - law.var())[mild], rtol=1e-5)


def test_a_pass_of_8_rollouts_a_prompt_keeps_the_discount_however_it_is_cut():
    whole = retention(jnp.int32(800), discount=0.9, num_prompts=100)
    assert float(whole) == pytest.approx(0.9)
    parts = [retention(jnp.int32(n), discount=0.9, num_prompts=100) for n in (100, 300, 400)]
    assert float(np.prod(parts)) == pytest.approx(0.9)
    assert float(retention(jnp.int32(12345), discount=1.0, num_prompts=7)) == 1


def test_forgetting_moves_towards_the_prior_alone():
    np.testing.assert_allclose(forget(jnp.array([0.5, 8.5]), 0.5, jnp.float32(0.5)), [0.5, 4.5])


def marginal_likelihood(successes, failures, start):
    """The likeliest (a, b) with the same weak density on them, by scipy in float64."""

    def loss(log_ab):
        a, b = np.exp(log_ab)
        seen = special.betaln(successes + a, failures + b) - special.betaln(a, b)
        return -np.sum(seen) - np.sum(log_ab - np.exp(log_ab) / start)

    return np.exp(optimize.minimize(loss, np.log(start)).x)


@pytest.mark.parametrize("law", [(0.3, 0.5), (0.15, 0.6), (0.8, 0.8)])
def test_the_fitted_prior_is_near_the_likeliest(law):
    rng, start = np.random.default_rng(0), np.array([0.5, 0.5])
    successes = rng.binomial(24, rng.beta(*law, 1500)).astype(float)
    likeliest = marginal_likelihood(successes, 24 - successes, start)
    ours = fitted_prior(jnp.float32(successes), jnp.float32(24 - successes), (0.5, 0.5))
    np.testing.assert_allclose(ours, likeliest, rtol=0.1)


def test_the_fitted_prior_is_the_given_one_while_nothing_is_seen_and_finite_at_extremes():
    nothing = jnp.zeros(50)
    np.testing.assert_allclose(fitted_prior(nothing, nothing, (0.5, 0.7)), (0.5, 0.7), rtol=1e-5)
    for s, f in ((1e6, 1e6), (0.0, 1e6), (1e6, 0.0), (1e-6, 1e-6)):
        fitted = np.asarray(fitted_prior(jnp.full(50, s), jnp.full(50, f), (0.5, 0.5)))
        assert np.all(np.isfinite(fitted) & (fitted > 0))
