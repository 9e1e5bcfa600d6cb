"""The embedded task: shares, distinct prompts, right and wrong gold, noisy demonstrations."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from cero_jax.data import prompts_hash
from cero_jax.tasks import chain_sum
from cero_jax.tasks.chain_sum import ChainSum

LABELS = {"length 2-4", "length 8-12", "length 13-18", "length 19-24", "wrong gold"}


def row_of(question):
    """The digits of a prompt, which stand in a field of 24 places before the "="."""
    assert len(question) == 25
    assert question[-1] == "="
    return question[:-1].rstrip(".")


def sums_by_hand(question):
    total, text = 0, ""
    for digit in row_of(question):
        total = (total + int(digit)) % 10
        text += str(total)
    return text


@pytest.fixture(scope="module")
def task():
    return ChainSum().build(seed=0)


def test_the_example_of_the_docstring():
    assert '"3141....................=" -> "3489"' in (chain_sum.__doc__ or "")
    assert chain_sum.question("3141") == "3141....................="
    assert chain_sum.running_sums("3141") == sums_by_hand("3141....................=") == "3489"


@pytest.mark.parametrize("wrong_share", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_shares(wrong_share):
    train = ChainSum(wrong_share=wrong_share).build(seed=1).train
    counts = Counter(train.labels)
    assert counts["wrong gold"] == round(wrong_share * 512)
    assert abs(counts["length 2-4"] - 256 * (1 - wrong_share)) <= 1
    short = sum(len(row_of(question)) <= 4 for question in train.questions)
    assert short == 256
    assert set(counts) <= LABELS


def test_right_and_wrong_gold(task):
    for question, answer, label in zip(task.train.questions, task.train.answers, task.train.labels, strict=True):
        right = sums_by_hand(question)
        assert len(answer) == len(row_of(question))
        if label == "wrong gold":
            assert all(a != b for a, b in zip(answer, right, strict=True))
            row = (int(d) for d in row_of(question)[1:])  # no step follows from the digit before, either
            assert all((int(a) + d) % 10 != int(b) for a, b, d in zip(answer, answer[1:], row, strict=False))
        else:
            assert answer == right
            low, high = map(int, label.removeprefix("length ").split("-"))
            assert low <= len(answer) <= high
    assert task.heldout.answers == tuple(map(sums_by_hand, task.heldout.questions))


def test_prompts_are_distinct_and_the_heldout_are_kept_apart(task):
    questions = task.train.questions + task.heldout.questions
    assert len(set(questions)) == len(questions) == 512 + 256
    assert sum(len(row_of(q)) <= 4 for q in task.heldout.questions) == 128
    assert "wrong gold" not in task.heldout.labels
    lengths = Counter(len(row_of(q)) for q in questions)
    assert set(lengths) == {2, 3, 4, *range(8, 25)}  # every length occurs
    assert lengths[2] >= 50  # of the 100 there are, between train and held-out
    held_short = Counter(len(row_of(q)) for q in task.heldout.questions)
    assert held_short[2] >= 10


def test_ids_say_nothing_about_the_prompt(task):
    """Labels are in random order: the mean place of wrong gold lies within 5 standard deviations of the middle."""
    places = np.flatnonzero([label == "wrong gold" for label in task.train.labels])
    assert abs(places.mean() - 255.5) < 5 * 512 / np.sqrt(12 * len(places))


def test_the_task_is_reproducible_from_settings_and_seed(task):
    again = ChainSum().build(seed=0)
    assert prompts_hash(again.train) == prompts_hash(task.train)
    assert prompts_hash(again.heldout) == prompts_hash(task.heldout)
    assert prompts_hash(ChainSum().build(seed=1).train) != prompts_hash(task.train)
    other = dataclasses.replace(ChainSum(), wrong_share=0.2).build(seed=0)
    assert other.heldout.questions == task.heldout.questions  # so that mixes are judged on the same prompts
    assert set(other.train.questions) == set(task.train.questions)


def test_verifier_wants_the_whole_completion(task):
    question, answer = task.heldout.questions[0], task.heldout.answers[0]
    assert task.verify(question, answer, answer).reward == 1.0
    for wrong in (answer[:-1], answer + "0", "", answer + "="):
        assert task.verify(question, wrong, answer).reward == 0.0


def test_demonstrations_err_at_their_rate_and_go_on_from_what_is_written(task):
    questions, completions = task.demonstrations(np.random.default_rng(0), 4000)
    assert len(questions) == len(completions) == 4000
    assert not set(questions) & set(task.heldout.questions)
    slips = []
    for question, completion in zip(questions, completions, strict=True):
        assert len(completion) == len(row_of(question))
        before = 0
        for digit, written in zip(question, completion, strict=False):
            slips.append((int(written) - before - int(digit)) % 10)
            before = int(written)
    steps, counts = len(slips), np.bincount(slips, minlength=10)
    assert abs(counts[1:].sum() / steps - 0.15) < 5 * np.sqrt(0.15 * 0.85 / steps)
    assert np.all(abs(counts[1:] / steps - 0.15 / 9) < 5 * np.sqrt(0.15 / 9 / steps))  # a uniformly drawn other digit
    lengths = np.bincount([len(row_of(q)) for q in questions], minlength=25)
    assert lengths[:2].sum() == 0
    assert np.all(abs(lengths[3:] - 4000 / 23) < 6 * np.sqrt(4000 / 23))  # 2 digits are rarer: many are held out
    again = task.demonstrations(np.random.default_rng(0), 4000)
    assert again == (questions, completions)


def test_demonstrations_without_errors_are_right():
    task = ChainSum(demonstration_error_rate=0.0).build(seed=0)
    assert task.demonstrations is not None
    questions, completions = task.demonstrations(np.random.default_rng(1), 100)
    assert completions == list(map(sums_by_hand, questions))


def test_everything_fits_its_tokens(task):
    assert len(task.train.lengths) == 512
    assert task.train.longest <= 25
    (tokens,), (length,) = task.train.rows(np.array([3]), 25)
    assert task.tokenizer.decode(tokens[:length]) == task.train.questions[3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("wrong_share", 1.5),
        ("easy_share", -0.1),
        ("demonstration_error_rate", 2),
        ("num_prompts", 0),
        ("num_heldout", 0),
    ],
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} must"):
        ChainSum(**{field: value}).build(seed=0)


def test_more_short_rows_than_exist_are_refused():
    with pytest.raises(ValueError, match=r"11,100 exist: lower num_prompts=30000"):
        ChainSum(num_prompts=30000).build(seed=0)
