"""pass@k against a count over all subsets; intervals hold the true mean as often as they say, on simulated models."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from cero_jax.statistics import bootstrap_interval, pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_avg_and_pass_at_k_equal_the_mean_over_all_subsets(num_samples):
    rng = np.random.default_rng(num_samples)
    outcomes = rng.random((20, num_samples)) < rng.random((20, 1))
    for k in range(1, num_samples + 1):
        chosen = [list(subset) for subset in combinations(range(num_samples), k)]
        any_right = np.mean([outcomes[:, subset].any(axis=1) for subset in chosen], axis=0)
        mean_right = np.mean([outcomes[:, subset].mean(axis=1) for subset in chosen], axis=0)
        np.testing.assert_allclose(pass_at_k(outcomes.sum(axis=1), num_samples, k), any_right, atol=1e-12)
        np.testing.assert_allclose(outcomes.mean(axis=1), mean_right)  # avg@n is without bias for every avg@k


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(np.array([0, 1, 5000, 10_000]), 10_000, 100).tolist() == pytest.approx(
        [0, 0.01, 1 - 0.5**100, 1], abs=1e-9
    )


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_that_many_samples(k):
    with pytest.raises(ValueError, match=rf"pass@{k} needs k in 1..4"):
        pass_at_k(np.array([1]), 4, k)


MODELS = {  # success rates of a data set's prompts
    "solved or hopeless": lambda rng, n: rng.beta(0.3, 0.5, n),
    "alike": lambda rng, n: np.full(n, 0.4),
    "strong": lambda rng, n: rng.beta(4, 1, n),
}


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("num_prompts", [30, 100])
@pytest.mark.parametrize("model", MODELS)
def test_intervals_hold_the_true_mean_at_their_nominal_rate(model, num_prompts, confidence):
    """Over 500 data sets of such prompts, with 4 samples of each prompt."""
    rng = np.random.default_rng(0)
    truth = MODELS[model](rng, 10**6).mean()
    covered = 0
    for _ in range(500):
        rates = MODELS[model](rng, num_prompts)
        low, high = bootstrap_interval(rng.binomial(4, rates) / 4, confidence, draws=300)
        covered += low <= truth <= high
    # three standard errors of 500 data sets, and 0.02 for what a bootstrap over 30 prompts may miss
    assert abs(covered / 500 - confidence) < 3 * np.sqrt(confidence * (1 - confidence) / 500) + 0.02


def test_equal_values_give_the_exact_binomial_interval():
    low, high = bootstrap_interval(np.zeros(30))
    assert low == 0
    assert (1 - high) ** 30 == pytest.approx(0.025)  # at a true mean of `high`, all 30 wrong has this probability
    assert bootstrap_interval(np.ones(30)) == (pytest.approx(1 - high), 1.0)
    low, high = bootstrap_interval(np.full(30, 0.5))
    assert stats.binom.sf(14, 30, low) == pytest.approx(0.025)  # 15 of 30 or more
    assert stats.binom.cdf(15, 30, high) == pytest.approx(0.025)
    assert bootstrap_interval(np.array([0.3])) == (0.0, 1.0)


def test_intervals_are_reproducible_and_narrow_with_more_prompts():
    values = np.random.default_rng(0).random(400)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    widths = [np.subtract(*bootstrap_interval(values[:n])[::-1]) for n in (25, 100, 400)]
    assert widths[0] > 1.6 * widths[1] > 1.6**2 * widths[2]


def test_an_interval_holds_on_any_scale():
    """What is so of shares is so of rewards of -1 and +1, or of 0 to 10, by the same linear map."""
    rng = np.random.default_rng(5)
    for low, high in ((-1.0, 1.0), (0.0, 10.0), (-1e6, 1e6), (-0.5, 0.25)):
        for shares in (rng.random(20), np.zeros(30), np.ones(30), np.full(30, 0.5), np.array([0.3])):
            want = low + (high - low) * np.array(bootstrap_interval(shares))
            got = bootstrap_interval(low + (high - low) * shares, scale=(low, high))
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * (high - low))
    # values beyond the scale: it reaches to them, and nothing is nan
    assert bootstrap_interval(np.full(30, -100.0)) == (-100.0, pytest.approx(-100 + 101 * 0.11570, rel=1e-3))
    assert bootstrap_interval(np.array([7.0])) == (0.0, 7.0)
    assert bootstrap_interval(np.full(30, 5.0), scale=(5.0, 5.0)) == (5.0, 5.0)  # no reward above the lowest is known
