"""Pass rates from elsewhere: what they do to the posterior, and how they come from a file into a run."""

import json

import jax
import numpy as np
import pytest
from scipy import stats

import cero_jax
from cero_jax.allocator.posterior import under_fitted_prior
from cero_jax.data import prompts_hash
from cero_jax.tasks.dataset import Dataset


def test_a_rate_counts_like_rollouts_that_nobody_pays_for():
    """Beside the same evidence given to `update`: the posterior is alike, the ledger is not."""
    allocator = cero_jax.cero(total_budget=800, num_epochs=10, discount=1.0)
    start = allocator.init(4)
    told = cero_jax.with_pass_rates(start, np.array([0.0, 0.25, 1.0, np.nan]), 8)
    drawn = allocator.update(start, np.array([8, 8, 8, 0]), np.array([0, 2, 8, 0]))
    np.testing.assert_array_equal(told.alpha, drawn.alpha)
    np.testing.assert_array_equal(told.beta, drawn.beta)
    assert int(told.ledger.spent) == 0
    assert int(told.cumulative_rollouts.sum()) == 0
    assert int(allocator.allocate(told)[0].sum()) == 80


def test_rates_fade_as_other_evidence_does():
    allocator = cero_jax.cero(total_budget=800, num_epochs=10, discount=0.5)
    told = cero_jax.with_pass_rates(allocator.init(2), np.array([1.0, 0.0]), np.array([4.0, 2.0]))
    later = allocator.update(told, np.array([0, 16]), np.array([0, 0]))  # a pass of 8 rollouts a prompt
    np.testing.assert_allclose(later.alpha, [0.5 + 4 / 2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(later.beta, [0.5, 0.5 + 2 / 2 + 16], rtol=1e-6)


def test_the_first_epoch_goes_where_rates_say():
    """Of 300 prompts a third is always right elsewhere, a third never: `cero` draws the others from the start."""
    rates = np.repeat([0.0, 0.5, 1.0], 100)
    allocator = cero_jax.cero(total_budget=12_000, num_epochs=30)
    blind = allocator.init(300)
    shares = [
        np.asarray(allocator.allocate(state)[0]).reshape(3, 100).sum(axis=1)
        for state in (blind, cero_jax.with_pass_rates(blind, rates, 8))
    ]
    assert shares[0][1] < 0.5 * shares[0].sum()
    assert shares[1][1] > 0.8 * shares[1].sum()


def test_rates_foretell_what_a_fitted_prior_alone_cannot():
    """Held-out log-likelihood of rollouts by scipy: better with rates of another model that is right more often."""
    rng = np.random.default_rng(0)
    p = rng.beta(0.4, 0.8, 2_000)
    right = rng.binomial(8, p)
    elsewhere = rng.binomial(8, p**0.7) / 8
    allocator = cero_jax.cero(total_budget=10_000, num_epochs=10)

    def likelihood(state):
        a, b = (np.asarray(x, float) for x in under_fitted_prior(state.alpha, state.beta, (0.5, 0.5)))
        return stats.betabinom.logpmf(right, 8, a, b).mean()

    blind = allocator.init(2_000)
    assert likelihood(cero_jax.with_pass_rates(blind, elsewhere, 4)) > likelihood(blind) + 0.4


@pytest.mark.parametrize(
    ("rates", "rollouts", "message"),
    [
        ([0.5, 1.5], 4, r"pass_rates holds 1.5: give shares in \[0, 1\]"),
        ([0.5], 4, r"pass_rates has shape \(1,\), not \(2,\)"),
        ([0.5, 0.5], -1, "num_rollouts=-1 that a pass rate is worth must be finite and not negative"),
        ([0.5, 0.5], np.nan, "num_rollouts=nan"),
        ([0.5, 0.5], [1.0, 2.0, 3.0], r"num_rollouts has shape \(3,\)"),
    ],
)
def test_what_is_no_rate_is_named(rates, rollouts, message):
    state = cero_jax.uniform(total_budget=80, num_epochs=1).init(2)
    with pytest.raises(ValueError, match=message):
        cero_jax.with_pass_rates(state, rates, rollouts)
    traced = jax.jit(cero_jax.with_pass_rates)(state, np.array([0.5, np.nan]), 4.0)  # passes; and NaN is unknown
    np.testing.assert_array_equal(traced.alpha, [2.5, 0.5])


ROWS = [
    {"question": f"{i} + 1 =", "answer": str(i + 1), "rate": rate} for i, rate in enumerate([0, 0.5, None, 1, 0.25])
]


@pytest.fixture
def write(tmp_path):
    """Writes rows and returns the path."""

    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    return write


def test_a_column_of_a_file(write):
    path = write(ROWS)
    task = Dataset(path=str(path), verifier="exact", pass_rate_field="rate", num_heldout=1).build(0)
    known = {row["question"]: row["rate"] for row in ROWS}
    expected = np.array([known[question] for question in task.train.questions], np.float32)
    assert task.train.pass_rates is not None
    np.testing.assert_array_equal(task.train.pass_rates, expected)
    plain = Dataset(path=str(path), verifier="exact", num_heldout=1).build(0).train
    assert plain.pass_rates is None
    assert prompts_hash(plain) != prompts_hash(task.train)


@pytest.mark.parametrize("value", [1.5, -0.1, "often", True, [0.5], float("nan")])
def test_a_rate_that_is_none_is_named_with_its_row(write, value):
    path = write([*ROWS[:2], ROWS[2] | {"rate": value}])
    with pytest.raises(ValueError, match=r"rows.jsonl:3: field 'rate' is .*, no share from 0 to 1"):
        Dataset(path=str(path), verifier="exact", pass_rate_field="rate", num_heldout=1).build(0)
