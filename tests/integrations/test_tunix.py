"""CERO in the real GRPOLearner of google-tunix, on a policy of two thousand random parameters."""

import numpy as np
import pytest
from document import python_blocks
from tunix.rl.rl_cluster import Mode
from tunix_toy import HOPELESS, correct, dataset, learner, rows, short, summary

from cero_jax.integrations.tunix import CeroDataset


def train(folder, steps, reward_fns=None, **settings):
    cero = dataset(steps)
    reward_fns = reward_fns(cero) if reward_fns else cero.watch(correct)
    settings = {"max_steps": steps, **settings}
    trained = learner(cero, folder, reward_fns, **settings)
    cero.train(trained)
    return cero, trained


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """24 batches of 8 groups of 4, checkpointed after every third."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *train(folder, 24)


def test_what_is_spent_is_the_budget_and_hopeless_prompts_get_less_of_it(whole):
    _, cero, trained = whole
    state = cero.groups.state
    drawn = np.asarray(state.cumulative_rollouts)
    assert int(state.ledger.total) == int(state.ledger.spent) == drawn.sum() == 24 * 32
    assert int(state.ledger.reserved) == int(state.ledger.left) == 0
    assert drawn[HOPELESS].sum() < 0.4 * drawn.sum()  # of which Tunix gives them half
    assert trained.rl_cluster.actor_trainer.train_steps == 24


class StoppedError(Exception):
    pass


def judge(counts, most=10**9):
    """`correct` that counts the rollouts it is asked of, and stops the run rather than judge more than `most`."""

    def counted(prompts, completions, **kwargs):
        counts.append(len(prompts))
        if sum(counts) > most:
            raise StoppedError
        return correct(prompts, completions, **kwargs)

    return counted


# Stopped in step 5, after the checkpoint of step 3: of the third batch's end, or of the middle of the second.
@pytest.mark.parametrize(
    ("batches", "a_step"),
    [({}, 32), ({"mini_batch_size": 4, "train_micro_batch_size": 2}, 16)],
    ids=["a batch a step", "two steps a batch, of two micro-batches"],
)
def test_a_resumed_run_is_the_run_to_the_bit(batches, a_step, tmp_path):
    kept = {"max_steps": 160 // a_step, **batches}
    whole = train(None, 5, lambda cero: [cero.watch(correct), short], **kept)
    with pytest.raises(StoppedError):
        train(tmp_path, 5, lambda cero: [cero.watch(judge([], most=4 * a_step)), short], **kept)
    counts = []
    resumed = train(tmp_path, 5, lambda cero: [cero.watch(judge(counts)), short], **kept)
    assert sum(counts) == 160 - 3 * a_step  # what the checkpoint has was not drawn again
    assert summary(*resumed) == summary(*whole)
    assert resumed[0].groups.state.ledger.spent == 160


def test_stopped_between_two_iterations_over_a_batch_the_budget_is_still_spent_exactly(tmp_path):
    kept = {"max_steps": 6, "num_iterations": 2}
    with pytest.raises(StoppedError):
        train(tmp_path, 3, lambda cero: cero.watch(judge([], most=2 * 32)), **kept)
    counts = []
    cero, trained = train(tmp_path, 3, lambda cero: cero.watch(judge(counts)), **kept)
    assert sum(counts) == 32  # the checkpoint is of step 3, amid the second batch
    assert [int(x) for x in cero.groups.state.ledger][:3] == [96, 96, 0]
    assert trained.rl_cluster.actor_trainer.train_steps == 5  # its second half was lost


def test_the_lines_of_the_document_train():
    (code,) = python_blocks("Tunix")
    plain = learner(dataset(4), None, correct, 24)
    scope = {"rows": rows(), "rl_cluster": plain.rl_cluster, "algo_config": plain.algo_config, "correct": correct}
    exec(code, {**scope, "GRPOLearner": type(plain)}, scope)
    assert int(scope["cero"].groups.state.ledger.spent) == 768


def test_an_evaluation_is_not_charged_and_metrics_are_logged():
    cero, seen = dataset(4), []

    def watching(prompts, completions, mode, **kwargs):
        seen.append(mode)
        return correct(prompts, completions, **kwargs)

    trained = learner(cero, None, cero.watch(watching), 4, metric_fns=[cero.metrics])
    eval_rows = rows()[:8]
    evaluated = {name: np.array([row[name] for row in eval_rows]) for name in eval_rows[0]}
    cero.train(trained, eval_ds=[evaluated])
    assert {str(mode) for mode in seen} == {"train", "eval"}
    assert int(cero.groups.state.ledger.spent) == 4 * 32
    assert float(cero.metrics()["cero/spent"][0]) == 128
    logger = trained.rl_cluster._rl_metrics_logger
    assert logger.metric_exists("cero", "spent", Mode.TRAIN.value)


def test_what_the_learner_cannot_spend_is_refused():
    cero = dataset(4)
    with pytest.raises(ValueError, match="takes 4 steps, and the learner has max_steps=3: give it 4"):
        cero.train(learner(cero, None, cero.watch(correct), 3))
    cero = CeroDataset(rows(), batch_size=8, num_generations=2, total_budget=64)
    with pytest.raises(ValueError, match="num_generations=4, this data 2"):
        cero.train(learner(cero, None, cero.watch(correct), 4))


def test_a_checkpoint_of_another_run_is_refused(whole):
    folder, *_ = whole
    cero = dataset(30)
    with pytest.raises(ValueError, match="768 rollouts of total_budget, this trainer 960"):
        cero.train(learner(cero, folder, cero.watch(correct), 30))


def test_a_checkpoint_without_an_allocator_is_refused(tmp_path):
    cero = dataset(3)
    learner(cero, tmp_path, cero.watch(correct), 3).train(cero)
    cero = dataset(3)
    with pytest.raises(ValueError, match="step 3 has no allocator"):
        cero.train(learner(cero, tmp_path, cero.watch(correct), 3))
