"""The learning rate over the rollouts spent: by hand, and against optax's schedules."""

import optax
import pytest

from cero_jax.learner import LearnerConfig, learning_rate


@pytest.mark.parametrize(("spent", "rate"), [(0, 1e-3), (50, 6e-4), (100, 2e-4), (150, 2e-4)])
def test_the_rate_falls_linearly_with_the_budget(spent, rate):
    config = LearnerConfig(learning_rate=1e-3, final_learning_rate_share=0.2)
    assert learning_rate(config, spent, 100) == pytest.approx(rate)
    assert learning_rate(LearnerConfig(learning_rate=1e-3, final_learning_rate_share=1.0), spent, 100) == 1e-3


@pytest.mark.parametrize(("spent", "rate"), [(0, 0.0), (5, 5e-4), (10, 1e-3), (55, 6e-4), (100, 2e-4), (150, 2e-4)])
def test_the_rate_rises_over_the_warmup_first(spent, rate):
    config = LearnerConfig(learning_rate=1e-3, warmup_share=0.1, final_learning_rate_share=0.2)
    assert learning_rate(config, spent, 100) == pytest.approx(rate)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.55])
@pytest.mark.parametrize("end", [0.0, 0.2, 1.0])
def test_the_schedules_are_those_of_optax(warmup, end):
    """Over the rollouts spent in the place of steps; beyond the budget the rate stays."""
    peak, total = 3e-3, 200
    rising, rest = int(warmup * total), total - int(warmup * total)
    after = {
        "linear": optax.linear_schedule(peak, end * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=end),
        "constant": optax.constant_schedule(peak),
    }
    for name, schedule in after.items():
        config = LearnerConfig(learning_rate=peak, schedule=name, warmup_share=warmup, final_learning_rate_share=end)
        whole = optax.join_schedules([optax.linear_schedule(0.0, peak, max(rising, 1)), schedule], [rising])
        for spent in (0, 1, 20, 50, 109, 110, 111, 150, 199, 200, 230):
            expected = float(whole(spent))
            assert learning_rate(config, spent, total) == pytest.approx(expected, rel=1e-5, abs=1e-9), (name, spent)
    assert LearnerConfig().schedule == "linear"
