"""What stands between the allocator and other trainers, without them: tests/integrations has the real ones."""

import itertools
import math
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import cero_jax
from cero_jax.integrations import trl
from cero_jax.integrations.groups import Groups, budget_of, one_size_allocator
from cero_jax.integrations.tunix import CeroDataset

SHARED = one_size_allocator(320, 32, 4)  # compiled once for 40 prompts


def config(**settings):
    """What a plan reads of a GRPOConfig: a batch of 32 rollouts, two steps of the loader an optimiser step."""
    given = {
        "generation_batch_size": 32, "num_generations": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 2,
        "num_iterations": 1, "max_steps": -1, "num_train_epochs": 3.0,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **settings})


def drawn_by(args, steps: trl.Plan) -> int:
    """Rollouts that TRL draws in a plan's steps: micro-batch by micro-batch, a new batch whenever one has served."""
    micro_batches = steps.max_steps * args.gradient_accumulation_steps
    return sum(i % steps.repeat == 0 for i in range(micro_batches)) * args.generation_batch_size


@pytest.mark.parametrize("num_prompts", [3, 40, 41])
@pytest.mark.parametrize(("accumulated", "per_generation", "iterations"), [(2, 2, 1), (4, 1, 1), (1, 4, 2), (4, 3, 2)])
@pytest.mark.parametrize("steps", [-1, 1, 7])
def test_a_plan_draws_its_budget_exactly(num_prompts, accumulated, per_generation, iterations, steps):
    cuts = {"steps_per_generation": per_generation, "num_iterations": iterations, "max_steps": steps}
    args = config(gradient_accumulation_steps=accumulated, **cuts)
    planned = trl.plan(args, num_prompts, None)
    assert drawn_by(args, planned) == planned.total_budget > 0
    assert planned.max_steps == steps or steps < 0
    assert planned.trainer_epoch_micro_batches % accumulated == 0  # none ends within an optimiser step
    args.max_steps = -1
    unit = 32 * accumulated // math.gcd(accumulated, planned.repeat)
    given = trl.plan(args, num_prompts, 5 * unit)
    assert drawn_by(args, given) == given.total_budget == 5 * unit
    with pytest.raises(ValueError, match=f"give {5 * unit} or {6 * unit}"):
        trl.plan(args, num_prompts, 5 * unit + 4)


def test_by_default_a_plan_is_trls_own():
    """Three epochs over 40 prompts in batches of 8: 15 batches, a step each."""
    assert trl.plan(config(), 40, None) == trl.Plan(480, 15, 8, 2, 5)


def test_jax_is_kept_off_the_gpu_unless_it_is_told_otherwise(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    assert trl._jax_backend() == "JAX on the CPU"
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # as where it was begun before, or asked for
    assert "JAX on the gpu" in trl._jax_backend()
    assert "start with JAX_PLATFORMS=cpu" in trl._jax_backend()


def test_a_class_without_a_trainer_and_a_name_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match="_get_train_sampler: CeroMixin goes before a GRPOTrainer"):
        type("Alone", (trl.CeroMixin, dict), {})()
    with pytest.raises(AttributeError, match="it has CeroGRPOTrainer and CeroMixin"):
        trl.CeroTrainer  # noqa: B018


def test_the_sampler_gives_each_group_in_turn_as_often_as_its_batch_serves():
    groups = Groups(SHARED, 40, 4)
    sampler = trl.GroupSampler(groups, trl.plan(config(), 80, 320))
    rows = np.array(list(sampler)).reshape(10, 2, 8, 4)  # batches, micro-batches, groups, rollouts
    assert len(sampler) == rows.size == 10 * 2 * 32
    assert np.all(rows == rows[:, :1, :, :1])
    assert rows[:, 0, :, 0].ravel().tolist() == groups.held
    assert int(groups.state.ledger.reserved) == 320


@pytest.mark.parametrize("skipped", [0, 1, 4, 9, 20])
def test_a_resumed_sampler_begins_with_rows_that_are_skipped(skipped):
    groups = Groups(SHARED, 40, 4)
    sampler = trl.GroupSampler(groups, trl.plan(config(), 80, 320))
    sampler.skipped = skipped
    rows = np.array(list(sampler)).reshape(20, 32)
    served = 2 * -(-skipped // 2)  # a batch that has begun to serve is with the trainer
    assert np.all(rows[:served] == 0)
    assert rows[served::2, ::4].ravel().tolist() == groups.held
    assert sampler.skipped == 0


def report_next(groups: Groups, count: int, rng) -> None:
    ids = groups.held[:count]
    judged = rng.integers(0, groups.group_size + 1, count)
    groups.report(np.array(ids), rng.binomial(judged, 0.5), judged)


@pytest.mark.parametrize("num_prompts", [3, 40])  # fewer than the groups of a batch, and more
def test_groups_spend_the_budget_exactly_and_are_counted_as_reported(num_prompts):
    """Asked two batches ahead; the state is that of an allocator that hears the same, counted by hand."""
    rng, groups = np.random.default_rng(0), Groups(SHARED, num_prompts, 4, seed=3)
    ahead = groups.take(8) + groups.take(8)
    counted = np.zeros(num_prompts, int)
    while groups.held:
        counted += 4 * np.bincount(groups.held[:8], minlength=num_prompts)
        report_next(groups, 8, rng)
        ledger = groups.state.ledger
        assert int(ledger.reserved) == 4 * (len(groups.held) + len(groups.waiting))
        assert int(ledger.spent) + int(ledger.reserved) + int(ledger.left) == 320
        ahead += groups.take(8)
    assert len(ahead) == 80
    assert np.asarray(groups.state.cumulative_rollouts).tolist() == counted.tolist()
    assert counted.sum() == 320


def allocating(*sizes):
    """An allocator that gives these sizes."""
    return SHARED._replace(allocate=lambda state: (np.array(sizes), state))


def test_groups_of_one_prompt_are_behind_each_other():
    order = Groups(allocating(8, 0, 4, 12), 4, 4).take(6)
    assert sorted(order) == [0, 0, 2, 3, 3, 3]
    assert sum(a != b for a, b in itertools.pairwise(order)) == 2


def test_what_came_of_groups_is_what_the_posterior_hears():
    """Prompts twice in a batch, a prompt that nobody could judge, without forgetting: prior + counts."""
    groups = Groups(cero_jax.uniform(total_budget=24, num_epochs=1, discount=1.0), 3, 4)
    groups.held = [2, 2, 0, 0, 1, 1]
    groups.report(np.array(groups.held), np.array([1, 2, 0, 3, 0, 0]), np.array([4, 4, 4, 3, 0, 0]))
    assert np.asarray(groups.state.alpha - 0.5).tolist() == [3, 0, 3]
    assert np.asarray(groups.state.beta - 0.5).tolist() == [4, 0, 5]
    assert int(groups.state.ledger.spent) == 24


def test_groups_in_another_order_are_refused():
    groups = Groups(SHARED, 40, 4)
    first, second = groups.take(2)
    with pytest.raises(ValueError, match="alike in all processes"):
        groups.report(np.array([second, first]), np.zeros(2, int), np.full(2, 4))


def test_saved_groups_go_on_to_the_bit():
    rng, groups = np.random.default_rng(0), Groups(SHARED, 40, 4, seed=3)
    groups.take(16)
    report_next(groups, 8, rng)
    copy = Groups(groups.allocator, 40, 4, seed=3)
    copy.from_bytes(groups.to_bytes(), "the file")
    held = list(groups.held)
    assert copy.take(8) == held  # they were handed out and not reported
    for _ in range(4):
        assert groups.take(8) == copy.take(8)
        answers = np.random.default_rng(5), np.random.default_rng(5)
        for each, chance in zip((groups, copy), answers, strict=True):
            report_next(each, 8, chance)
    assert groups.to_bytes() == copy.to_bytes()


@pytest.mark.parametrize(
    ("budget", "num_prompts", "size", "message"),
    [
        (640, 40, 4, "320 rollouts of total_budget, this trainer 640"),
        (320, 39, 4, "40 prompts"),
        (320, 40, 8, "4 rollouts a group"),
    ],
)
def test_saved_groups_of_another_run_are_refused(budget, num_prompts, size, message):
    saved = Groups(SHARED, 40, 4).to_bytes()
    with pytest.raises(ValueError, match=f"the file has .*{message}"):
        Groups(one_size_allocator(budget, 32, size), num_prompts, size).from_bytes(saved, "the file")


def test_saved_groups_of_another_allocator_are_refused():
    saved = Groups(SHARED, 40, 4).to_bytes()
    other = cero_jax.cero_dual(total_budget=320, num_epochs=10)
    with pytest.raises(ValueError, match="written with another allocator"):
        Groups(other, 40, 4).from_bytes(saved, "the file")


def test_an_allocator_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="make the allocator with min_group=4"):
        Groups(allocating(4, 6, 8), 3, 4).take(2)
    with pytest.raises(ValueError, match="in tokens"):
        budget_of(cero_jax.cero(total_budget=10**6, num_epochs=9, expected_tokens=10))


def test_advantages_by_the_posterior_equal_float64_loops():
    rng = np.random.default_rng(0)
    ids, rewards = rng.integers(0, 4, 24), rng.normal(0.5, 1, (24, 3))
    rewards[rng.random((24, 3)) < 0.2] = np.nan
    weights, alpha, beta = np.array([0.5, 2.0, -1.0]), rng.gamma(1, 2, 4)[ids], rng.gamma(1, 2, 4)[ids]
    success = rewards[:, 1] >= 0.4
    got = trl.posterior_advantages(rewards, weights, 1, success, ids, alpha.astype("f4"), beta.astype("f4"))
    for row, prompt in enumerate(ids):
        expected = 0.0
        if not np.isnan(rewards[row, 1]):
            others = [i for i in range(24) if ids[i] == prompt and i != row and not np.isnan(rewards[i, 1])]
            expected += 2 * (
                success[row] - (alpha[row] + success[others].sum()) / (alpha[row] + beta[row] + len(others))
            )
        for function in (0, 2):
            if not np.isnan(rewards[row, function]):
                expected += weights[function] * (rewards[row, function] - np.nanmean(rewards[ids == prompt, function]))
        assert got[row] == pytest.approx(expected, abs=1e-5)


ROWS = [{"prompts": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]


def test_tunixs_data_is_batches_of_rows_and_the_watched_function_reports_them():
    cero, seen = CeroDataset(ROWS, batch_size=8, num_generations=4, allocator=SHARED), []

    def half_right(prompts, completions, answer, **kwargs):
        assert kwargs == {"mode": "train"}
        seen.extend(prompts)
        return [1.0, None] * (len(prompts) // 2)

    watched = cero.watch(half_right)
    assert watched.__name__ == "half_right"  # under which Tunix logs it
    for batch in cero:
        assert [ROWS[i]["answer"] for i in batch["cero_prompt_id"]] == batch["answer"].tolist()
        repeated = {name: np.repeat(values, 4) for name, values in batch.items()}
        watched(completions=["3"] * 32, mode="train", **repeated)
    assert len(seen) == 320
    state = cero.groups.state
    assert int(state.ledger.spent) == 320
    assert float(state.beta.max()) == 0.5  # no failure: what had no reward is no evidence
    assert cero.metrics(rewards=None)["cero/spent"][0] == 320


@pytest.mark.parametrize("skipped", [0, 3, 8, 19])
def test_tunix_reads_past_what_was_trained_on(skipped):
    cero = CeroDataset(ROWS, batch_size=8, num_generations=4, allocator=SHARED)
    cero._skipped = skipped
    ids = np.concatenate([batch["cero_prompt_id"] for batch in cero])
    assert np.all(ids[:skipped] == 0)
    assert ids[skipped:].tolist() == cero.groups.held[: len(ids) - skipped]
    assert len(ids) % 8 == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_budget": 90}, "give 88 or 96"),
        ({"total_budget": 0}, "give 8"),
        ({}, "give total_budget"),
        ({"total_budget": 80, "rows": [*ROWS, {"question": "?"}]}, r"row 40 has the fields \['question'\]"),
    ],
)
def test_tunixs_data_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CeroDataset(**{"rows": ROWS, "batch_size": 4, "num_generations": 2, **settings})
