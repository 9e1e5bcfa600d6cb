"""Figures of an allocation against scipy, brute force and a loop; a run's own rows and its report say the same."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

import cero_jax
from cero_jax.report import mechanism, summary
from cero_jax.report.html import page_data
from cero_jax.report.mechanism import Groups
from cero_jax.report.read_run import read_run
from cero_jax.run import believe

RNG = np.random.default_rng(0)


def drawn(num_epochs=5, num_prompts=40):
    """Epochs of random posteriors and groups, of which two are of one rollout."""
    epochs = []
    for _ in range(num_epochs):
        alpha, beta = RNG.gamma(0.7, 4, (2, num_prompts)) + 0.1
        rollouts = RNG.choice([0, 1, 2, 4, 9], num_prompts)
        epochs.append((alpha, beta, rollouts, RNG.binomial(rollouts, RNG.random(num_prompts))))
    return epochs


@pytest.mark.parametrize("n", [1, 2, 5, 32])
def test_the_chance_of_an_effective_group_is_the_beta_binomials(n):
    alpha, beta = np.array([0.5, 1e-3, 300.0, 7.0]), np.array([0.5, 2.0, 0.1, 11.0])
    *_, chance = mechanism.effective_chances(alpha, beta, n)
    alike = stats.betabinom.pmf(0, n, alpha, beta) + stats.betabinom.pmf(n, n, alpha, beta) if n > 1 else 1.0
    np.testing.assert_allclose(chance, 1 - alike, atol=1e-12)


def test_sums_over_epochs_equal_a_loop_over_groups():
    epochs = drawn()
    found, groups = mechanism.observe(mechanism.epoch(*each) for each in epochs)
    effective = at_random = number = 0
    bins, bins_at_random, seen = np.zeros(5), np.zeros(5), []
    for alpha, beta, rollouts, correct in epochs:
        mean = alpha / (alpha + beta)
        place = np.array([sum(m >= edge for edge in (0.2, 0.4, 0.6, 0.8)) for m in mean])
        for i in np.flatnonzero(rollouts):
            n = rollouts[i]
            chance = 1 - (stats.betabinom.pmf(0, n, alpha, beta) + stats.betabinom.pmf(n, n, alpha, beta))
            effective, at_random = effective + chance[i], at_random + chance.mean()
            number += 1
            bins[place[i]] += 1
            bins_at_random += np.bincount(place, minlength=5) / len(place)
            moments = stats.beta(alpha[i], beta[i])
            seen.append((i, n, correct[i], moments.mean() - moments.moment(2), 0 < correct[i] < n))
    assert found.groups == number == len(groups.rollouts)
    np.testing.assert_allclose([found.effective, found.effective_at_random], [effective, at_random])
    np.testing.assert_array_equal(found.in_bin, bins)
    np.testing.assert_allclose(found.in_bin_at_random, bins_at_random)
    np.testing.assert_allclose(mechanism.lift(found), bins / bins_at_random)
    np.testing.assert_allclose(np.array([*groups[:4], groups.effective]).T, seen)


def test_so_many_prompts_that_some_stand_for_all():
    rng, number = np.random.default_rng(3), 3 * mechanism.SAMPLE - 5
    alpha, beta = rng.gamma(0.7, 4, (2, number)) + 0.1
    rollouts = np.where(rng.random(number) < 0.01, 8, 0)
    epoch = mechanism.epoch(alpha, beta, rollouts, rollouts // 2)
    assert len(epoch.all_alpha) == mechanism.SAMPLE - 1
    found = mechanism.selection(epoch)
    exact = mechanism.selection(epoch._replace(all_alpha=alpha, all_beta=beta))
    assert (found.groups, found.effective) == (exact.groups, exact.effective)
    np.testing.assert_array_equal(found.in_bin, exact.in_bin)
    assert found.effective_at_random == pytest.approx(exact.effective_at_random, rel=0.01)
    np.testing.assert_allclose(found.in_bin_at_random, exact.in_bin_at_random, rtol=0.05)
    assert mechanism.spaced(mechanism.SAMPLE) == slice(None, None, 1)


def test_an_edge_is_in_the_bin_above_it():
    right = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) - 1e-12 * (np.arange(10) == 9)
    found = mechanism.selection(mechanism.epoch(right, 10 - right, np.ones(10, int), np.zeros(10, int)))
    np.testing.assert_array_equal(found.in_bin, [1, 2, 2, 2, 3])


def test_the_unbiased_variance_has_the_mean_it_should():
    """Exactly, over all outcomes of n rollouts: p (1 - p)."""
    for n, p in ((2, Fraction(1, 3)), (5, Fraction(3, 10))):
        counts = np.arange(n + 1)
        seen = mechanism.unbiased_variance(Groups(counts, np.full(n + 1, n), counts, counts))
        assert np.dot(stats.binom.pmf(counts, n, float(p)), seen) == pytest.approx(float(p * (1 - p)))


def test_calibration_by_hand():
    groups = Groups(
        prompt_ids=np.array([0, 1, 2, 2, 3, 4]),
        rollouts=np.array([2, 1, 4, 4, 2, 4]),
        correct=np.array([1, 1, 2, 0, 1, 1]),
        expected=np.array([0.2, 0.0, 0.1, 0.1, 0.2, 0.05]),
    )
    found = mechanism.calibration(groups, 2)  # by what was expected: [prompts 4, 2, 2], [0, 3]; the group of one is out
    np.testing.assert_allclose(found.expected, [0.25 / 3, 0.2])
    np.testing.assert_allclose(found.seen, [(3 / 12 + 4 / 12 + 0) / 3, 1 / 2])
    residual = 3 / 12 - 7 / 36  # of prompt 4; those of prompt 2 sum to its opposite
    np.testing.assert_allclose(found.error, [np.sqrt(2 * 2 * residual**2) / 3, 0])
    assert np.isnan(mechanism.clustered_error(np.array([0.1, 0.2]), np.array([5, 5])))


def test_the_standard_error_is_that_of_repeated_draws():
    """200 prompts of three groups, which share their prompt's p: taken as independent it would be too small."""

    def one_mean(rng):
        seen = np.repeat(rng.beta(0.3, 0.3, 200), 3) + 0.1 * rng.normal(size=600)
        return seen.mean(), mechanism.clustered_error(seen, np.repeat(np.arange(200), 3)), seen.std() / 600**0.5

    means, errors, as_if_independent = np.array([one_mean(np.random.default_rng(i)) for i in range(2000)]).T
    assert errors.mean() == pytest.approx(means.std(), rel=0.05)
    assert as_if_independent.mean() < 0.7 * means.std()


def test_a_calibrated_posterior_lies_on_the_diagonal_and_expects_what_comes():
    rng = np.random.default_rng(1)
    alpha, beta = rng.gamma(1, 2, (2, 20_000)) + 0.2
    rollouts = np.where(rng.random(20_000) < alpha / (alpha + beta), 8, 0)  # picks the easy ones
    epoch = mechanism.epoch(alpha, beta, rollouts, rng.binomial(rollouts, rng.beta(alpha, beta)))
    found, groups = mechanism.observe([epoch])
    bins = mechanism.calibration(groups, 10)
    assert np.all(np.abs(bins.seen - bins.expected) < 4 * bins.error)
    assert groups.effective.mean() == pytest.approx(found.effective / found.groups, abs=0.02)
    everyone = rng.binomial(8, rng.beta(alpha, beta))  # what a group of 8 for each prompt would have come to
    assert np.mean((everyone > 0) & (everyone < 8)) == pytest.approx(found.effective_at_random / found.groups, abs=0.02)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The log of six epochs, whose groups are drawn in two parts, and the rows of its epochs."""
    rng, settings = np.random.default_rng(2), {"total_budget": 240, "num_epochs": 6, "min_group": 2, "max_group": 8}
    allocator = cero_jax.cero(**settings)
    state, rows, steps, spent = allocator.init(24), [], [], 0
    for epoch in range(6):
        n, state = allocator.allocate(state)
        posterior = (np.asarray(x, float) for x in believe(state, np.arange(24), prior=(0.5, 0.5)))
        row = mechanism.epoch_row(*posterior, np.asarray(n), np.asarray(state.cumulative_rollouts))
        rows.append({"kind": "epoch", "epoch": epoch, "spent": spent} | row)
        for size in (n // 2, n - n // 2):
            ids = np.flatnonzero(size)
            size = np.asarray(size)[ids]
            correct, spent = rng.binomial(size, ids / 23), spent + int(size.sum())
            state = allocator.update(state, size, correct, prompt_ids=ids, release=False)
            columns = {"prompt_ids": ids.tolist(), "num_rollouts": size.tolist(), "num_correct": correct.tolist()}
            steps.append({"kind": "step", "step": 0, "epoch": epoch, "spent": spent, "live_share": 0.5} | columns)
    folder = tmp_path_factory.mktemp("run")
    settings |= {"name": "cero", "prior": [0.5, 0.5], "discount": 0.9}
    config = {"name": "tiny", "seed": 0, "allocator": settings}
    evaluation = {"kind": "eval", "step": 0, "spent": 240, "accuracy": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "prompts.json").write_text(json.dumps({"labels": ["all"] * 24}))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*rows, *steps, evaluation])))
    return read_run(folder), rows


def test_a_runs_own_rows_say_what_the_report_replays_from_its_counts(run):
    run, rows = run
    found = summary.summarise(run)
    who, weights = found.selection, [row["groups"] for row in rows]
    assert who.groups == sum(weights)
    for name, total in (("effective_expected", who.effective), ("effective_at_random", who.effective_at_random)):
        assert np.dot(weights, [row[name] for row in rows]) == pytest.approx(total, rel=1e-4)
    for column, name in ((2, "effective_expected"), (3, "effective_at_random")):
        np.testing.assert_allclose(found.course[:, column], [row[name] for row in rows], rtol=1e-4)
    assert np.dot(weights, found.course[:, 1]) == pytest.approx(found.groups.effective.sum())
    shares = np.array([list(row["prompts_by_success"].values()) for row in rows])
    lifts = np.array([list(row["lift_by_success"].values()) for row in rows], float)  # None: nan
    np.testing.assert_allclose(weights @ shares, who.in_bin_at_random)
    np.testing.assert_allclose(weights @ np.nan_to_num(lifts * shares), who.in_bin, atol=1e-9)


def test_exposure_and_pace_by_the_steps(run):
    run, rows = run
    found = summary.summarise(run)
    totals, before = np.zeros(24, int), {}
    for row in run.steps:
        before.setdefault(row["epoch"], totals.copy())
        np.add.at(totals, row["prompt_ids"], row["num_rollouts"])
    np.testing.assert_allclose(found.exposure, np.quantile(totals, [0.1, 0.5, 0.9]) / totals.mean())
    assert found.never_visited == np.mean(totals == 0)
    for row in rows:
        assert row["never_visited"] == np.mean(before[row["epoch"]] == 0)
        assert row["spent"] == before[row["epoch"]].sum()
    assert rows[0]["exposure"] is None
    assert rows[-1]["exposure"]["50"] == pytest.approx(np.median(before[5]) / before[5].mean())
    np.testing.assert_array_equal(found.ahead, [*(row["spent"] - 40 * row["epoch"] for row in rows[1:]), 0])


def test_what_is_printed_of_a_run(run):
    run, _ = run
    text, found = summary.describe(run), summary.summarise(run)
    assert f"{100 * found.groups.effective.mean():.1f} % of {found.selection.groups} groups" in text
    assert summary.effective_groups(found) in page_data([run])["runs"][0]["mechanism"]["lines"]
    assert len(page_data([run])["runs"][0]["mechanism"]["calibration"]) == 10
    json.dumps(page_data([run]), allow_nan=False)


def test_the_pace_of_an_epoch_under_way_is_left_out(run):
    run, _ = run
    spent = [7, 12, 35, 60]  # of 20 an epoch, over epochs 0, 0, 2, 3; epoch 1 drew nothing
    steps = [{"epoch": e, "spent": s} for e, s in zip([0, 0, 2, 3], spent, strict=True)]
    settings = {"total_budget": 100, "num_epochs": 5}
    other = run._replace(steps=tuple(steps), config={"allocator": settings})
    np.testing.assert_array_equal(summary.ahead(other), [-8, -28, -25])
    for ended in ({"num_epochs": 4, "total_budget": 80}, {"num_epochs": 3, "total_budget": 60}):
        done = other._replace(config={"allocator": ended})
        np.testing.assert_array_equal(summary.ahead(done), [-8, -28, -25, -20])


@pytest.mark.parametrize("name", ["prior", "discount", "total_budget", "num_epochs"])
def test_a_run_that_does_not_tell_says_what_is_missing(run, name):
    run, _ = run
    settings = {key: value for key, value in run.config["allocator"].items() if key != name}
    text = summary.describe(run._replace(config=run.config | {"allocator": settings}))
    assert re.fullmatch(
        rf"tiny, cero, seed 0: no figures of the allocation: .*config.json: no allocator.{name}: .*", text
    )
