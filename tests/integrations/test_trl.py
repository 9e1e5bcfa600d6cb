"""CERO in the real GRPOTrainer of trl, on a policy of two thousand random parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trl_toy
from document import python_blocks
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer
from trl_toy import HOPELESS, build, correct, shape, sometimes, summary

import cero_jax
from cero_jax.integrations.trl import CeroGRPOTrainer, CeroMixin

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def cero(folder, config=None, **settings):
    return build(folder, trainer=CeroGRPOTrainer, config=config, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """33 batches in six and a half of the trainer's epochs, evaluated on the way, checkpointed twice."""
    config = {
        "max_steps": 33, "save_strategy": "steps", "save_steps": 11, "eval_strategy": "steps", "eval_steps": 11,
        "per_device_eval_batch_size": 16,
    }  # fmt: skip
    trainer = cero(tmp_path_factory.mktemp("run"), config, eval_dataset=trl_toy.dataset().select(range(4)))
    trainer.train()
    return trainer


def test_what_is_spent_is_the_budget_and_hopeless_prompts_get_less_of_it(trained):
    state = trained.cero_groups.state
    drawn = np.asarray(state.cumulative_rollouts)
    assert int(state.ledger.total) == int(state.ledger.spent) == drawn.sum() == 33 * 32
    assert int(state.ledger.reserved) == int(state.ledger.left) == 0
    assert np.all(drawn % trl_toy.GROUP == 0)
    assert drawn[HOPELESS].sum() < 0.35 * drawn.sum()  # of which TRL gives them half
    assert trained.state.global_step == 33


def test_the_trainers_log_has_the_ledger_and_an_evaluation_is_not_charged(trained):
    logged = [row for row in trained.state.log_history if "cero/spent" in row]
    assert [row["cero/spent"] for row in logged] == [32 * (i + 1) for i in range(33)]
    assert all(row["epoch"] == pytest.approx(row["step"] / 5) for row in logged)  # 40 prompts, 8 a batch
    assert len([row for row in trained.state.log_history if "eval_reward" in row]) == 3


def test_the_three_lines_of_the_document_train(tmp_path):
    (code,) = python_blocks("TRL")
    plain = build(tmp_path, config={"max_steps": 2})
    plain.save_model(tmp_path / "model")
    scope = {"model": str(tmp_path / "model"), "args": plain.args, "dataset": trl_toy.dataset(), "correct": correct}
    exec(code, scope)
    assert int(scope["trainer"].cero_groups.state.ledger.spent) == 64


@pytest.mark.parametrize("step", [11, 22])
def test_a_resumed_run_is_the_run_to_the_bit(trained, step, tmp_path):
    config = {"max_steps": 33, "eval_strategy": "steps", "eval_steps": 11, "per_device_eval_batch_size": 16}
    resumed = cero(tmp_path, config, eval_dataset=trl_toy.dataset().select(range(4)), model=trl_toy.model(seed=9))
    resumed.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-{step}")
    assert summary(resumed) == summary(trained)


# A generation batch serves several optimiser steps: TRL alone would draw it again. Two of them in one; two epochs.
@pytest.mark.parametrize(
    ("config", "step"),
    [
        ({"steps_per_generation": 4, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 14}, 6),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 2, "max_steps": 8}, 3),
        ({"max_steps": -1, "num_train_epochs": 2.0}, 5),
        ({"dataloader_num_workers": 1, "max_steps": 6}, 3),
    ],
    ids=["many steps a batch", "many batches a step", "epochs", "a loader that reads ahead"],
)
def test_it_is_so_however_batches_and_steps_are_cut(config, step, tmp_path):
    saving = {**config, "save_strategy": "steps", "save_steps": step}
    whole = cero(tmp_path / "whole", saving)
    whole.train()
    resumed = cero(tmp_path / "resumed", config)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
    assert summary(resumed) == summary(whole)
    ledger = whole.cero_groups.state.ledger
    assert int(ledger.spent) == int(ledger.total) > 0
    assert int(ledger.left) == int(ledger.reserved) == 0


def run_in_two_processes(folder, *arguments):
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(HERE / "trl_toy.py"),
        str(folder),
    ]
    given = {"capture_output": True, "text": True, "timeout": 600, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    done = subprocess.run([sys.executable, *command, *arguments], **given)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"summary_{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_decide_alike_and_resume_to_the_bit(tmp_path):
    config = {"max_steps": 8, "per_device_train_batch_size": 8, "ddp_backend": "gloo", "save_strategy": "steps"}
    config |= {"save_steps": 3, "steps_per_generation": 4}  # checkpointed while rollouts wait for their steps
    first, second = run_in_two_processes(tmp_path / "whole", json.dumps(config), '{"advantage": "posterior"}')
    assert first == second
    assert first["spent"] == 4 * 64  # 8 steps, two a batch of 2 x 8 x 4
    assert (first["left"], first["reserved"], sum(first["drawn"])) == (0, 0, 256)
    checkpoint = str(tmp_path / "whole/checkpoint-3")
    arguments = json.dumps(config), '{"advantage": "posterior"}', checkpoint
    assert run_in_two_processes(tmp_path / "resumed", *arguments) == [first, second]


def test_the_advantage_by_the_posterior_is_what_the_policy_is_trained_on(tmp_path):
    """Success less the mean of the posterior that has seen the prompt's other rollouts, as a float64 loop."""
    right_ones = []

    class Watched(CeroGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            alpha, beta = (x.astype(float) for x in self.cero_groups.belief())
            output = super()._generate_and_score_completions(inputs)
            ids, right, form = self._cero_ids, *(np.array(self._logs["rewards"][name]) for name in ("correct", "shape"))
            expected = []
            for row, prompt in enumerate(ids):
                others = [i for i in np.flatnonzero(ids == prompt) if i != row]
                baseline = (alpha[prompt] + right[others].sum()) / (alpha[prompt] + beta[prompt] + len(others))
                expected.append(2.0 * (right[row] - baseline) + 0.5 * (form[row] - form[ids == prompt].mean()))
            np.testing.assert_allclose(output["advantages"], expected, atol=1e-5)
            np.testing.assert_allclose(list(self._logs["advantages"]), expected, atol=1e-5)
            right_ones.append(right.sum())
            return output

    settings = {"advantage": "posterior", "reward_funcs": [shape, correct], "correct": "correct"}
    build(tmp_path, trainer=Watched, config={"max_steps": 5, "reward_weights": [0.5, 2.0]}, **settings).train()
    assert len(right_ones) == 5
    assert sum(right_ones) > 5


def test_a_completion_without_a_reward_is_paid_for_and_no_evidence(tmp_path):
    allocator = cero_jax.cero(total_budget=256, num_epochs=8, min_group=4, max_group=4, discount=1.0)
    trainer = cero(tmp_path, {"max_steps": -1}, reward_funcs=[sometimes, shape], allocator=allocator)
    trainer.train()
    state = trainer.cero_groups.state
    judged = float((state.alpha + state.beta - 1).sum())
    assert int(state.ledger.spent) == 256
    assert 0 < judged < 256
    assert judged == round(judged)


def test_an_allocator_of_ones_own_decides(tmp_path):
    """Equal shares: what TRL draws, two groups at once where the size allows."""
    allocator = cero_jax.uniform(total_budget=320, num_epochs=5, min_group=4, max_group=8, multiple_of=4, group_size=8)
    trainer = cero(tmp_path, {"max_steps": -1}, allocator=allocator)
    trainer.train()
    assert np.all(np.asarray(trainer.cero_groups.state.cumulative_rollouts) == 8)


def test_the_mixin_goes_over_other_trainers(tmp_path):
    class Theirs(GRPOTrainer):
        def compute_loss(self, *args, **kwargs):
            self.asked = True
            return super().compute_loss(*args, **kwargs)

    class Ours(CeroMixin, Theirs):
        pass

    class OurRLOO(CeroMixin, RLOOTrainer):
        pass

    ours = build(tmp_path, trainer=Ours, config={"max_steps": 2})
    ours.train()
    assert ours.asked
    assert int(ours.cero_groups.state.ledger.spent) == 64
    rloo = build(tmp_path, trainer=OurRLOO, config={"max_steps": 2}, config_class=RLOOConfig)
    rloo.train()
    assert int(rloo.cero_groups.state.ledger.spent) == 64


def test_rows_are_known_where_trl_drops_their_columns(tmp_path):
    trainer = cero(tmp_path, {"max_steps": 1, "remove_unused_columns": True}, reward_funcs=shape)
    trainer.train()
    assert int(trainer.cero_groups.state.ledger.spent) == 32


def test_a_second_run_of_one_trainer_begins_anew(tmp_path):
    trainer = cero(tmp_path, {"max_steps": 2})
    for _ in range(2):
        trainer.train()
        assert int(trainer.cero_groups.state.ledger.spent) == 64


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"max_steps": -1}, {"total_budget": 100}, "total_budget=100 .* give 96 or 128"),
        ({"max_steps": -1}, {"total_budget": 8}, "give 32"),
        ({}, {"total_budget": 32}, "max_steps=8 draws 256"),
        ({}, {"advantage": "rloo"}, "advantage='rloo' must be one of"),
        ({}, {"correct": "right"}, r"correct='right' is no reward function.*'correct'"),
        ({}, {"correct": 3}, "correct=3 is no reward function"),
        ({"ignore_data_skip": True}, {}, "ignore_data_skip"),
        ({"accelerator_config": {"dispatch_batches": True}}, {}, "dispatch_batches"),
        ({}, {"train_dataset": trl_toy.dataset().to_iterable_dataset()}, "IterableDataset"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"}, {"advantage": "posterior"}, "sum_then_normalize",
        ),
        (
            {"max_steps": -1},
            {"allocator": cero_jax.cero(total_budget=10**6, num_epochs=9, expected_tokens=10)},
            "in tokens",
        ),
        (
            {"max_steps": -1},
            {"allocator": cero_jax.cero(total_budget=256, num_epochs=9), "total_budget": 256},
            "leave out total_budget",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_with_the_mend(config, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        cero(tmp_path, config, **settings)


def test_an_allocator_of_other_sizes_is_refused_before_anything_is_drawn(tmp_path):
    allocator = cero_jax.cero(total_budget=256, num_epochs=1, min_group=2, max_group=7)
    with pytest.raises(ValueError, match="min_group=4 and max_group=4"):
        cero(tmp_path, {"max_steps": -1}, allocator=allocator).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 9}, "1056 rollouts of total_budget, this trainer 288"),
        ({"num_generations": 8}, "4 rollouts a group"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(trained, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        cero(tmp_path, {"max_steps": 33, **settings}).train(f"{trained.args.output_dir}/checkpoint-11")


def test_a_checkpoint_without_an_allocator_is_refused(tmp_path):
    plain = build(tmp_path, config={"max_steps": 1, "save_strategy": "steps", "save_steps": 1})
    plain.train()
    with pytest.raises(ValueError, match=r"has no cero\.npz"):
        cero(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
