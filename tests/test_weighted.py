r"""Several rewards: their sum by hand, each kept by name, correctness apart from the rest, and a price of length."""

import dataclasses
import json

import numpy as np
import pytest
from test_rollout import LIMIT, ROLLOUTS, TEXTS, make_rows, make_task

from cero_jax.config import AllocatorConfig, Config
from cero_jax.learner import LearnerConfig
from cero_jax.pace import Seconds
from cero_jax.rewards import ERROR, RIGHT, TIMED_OUT, WRONG, Verdict, verdict
from cero_jax.rewards.formatted import formatted
from cero_jax.rewards.weighted import one_by_one, read_weights, weighted
from cero_jax.rollout import Rules, overlong, score_steps, step_metrics, step_samples
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.tasks.dataset import Dataset
from cero_jax.verify import verify


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"so \boxed{5}", True),
        (r"so \boxed{\frac{1}{2}}", True),
        ("<think>a</think><answer>5</answer>", True),
        ("it is 5\n#### 5", True),
        ("a</think> \\boxed{5}", True),  # opened in the prompt
        (r"so \boxed{5", False),
        (r"so \boxed{}", False),
        ("<think>a</think><answer>5", False),
        (r"<think>hm \boxed{5}", False),
        (r"\boxed{5}<think>once more", False),
        (r"<think>\boxed{5}</think> so it is", False),
        ("the answer is 5", False),
        ("5", False),
        ("", False),
    ],
)
def test_an_answer_is_marked_and_tags_are_closed(text, right):
    found = formatted("q", text, "another")
    assert (found.reward, found.status == RIGHT) == (float(right), right)


def test_weights_are_read_as_a_person_writes_them():
    assert read_weights("correct=1, format=0.1,my.module:tone = -.2") == {
        "correct": 1.0, "format": 0.1, "my.module:tone": -0.2
    }  # fmt: skip
    assert list(read_weights("format=1,correct=0")) == ["format", "correct"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not name=weight"),
        ("correct", "'correct' is not name=weight"),
        ("correct=1,", "'' is not name=weight"),
        ("correct=1, format=", "'format=' is not name=weight"),
        ("correct=1, format=nan", "'format=nan' is not name=weight"),
        ("correct=1, format=inf", "'format=inf' is not name=weight"),
        ("correct=1, =2", "'=2' is not name=weight"),
        ("correct=1, format=0.1 tone=2", "'format=0.1 tone=2' is none|format=0.1 tone is not one of"),
        ("correct=1, correct=2", "names correct twice"),
        ("format=1", "leaves out correct, what the verifier says: add correct=1"),
        ("correct=1, frmat=0.1", "frmat is not one of correct, format, nor module:function"),
        ("correct=1, no_such_module:f=1", "'no_such_module:f' cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_other_weights_are_refused_before_a_file_is_read(text, message):
    with pytest.raises(ValueError, match=message):
        Dataset("no_such_file.jsonl", rewards=text).build(0)


def test_one_reward_alone_is_the_verifier_itself_and_several_are_judged_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{n}?", "answer": f"{n}"}) for n in range(4)))
    alone, both = (
        Dataset(str(path), num_heldout=1, rewards=each).build(0) for each in ("correct=1", "correct=2,format=.5")
    )
    plain = Dataset(str(path), num_heldout=1).build(0)
    assert alone.verify is plain.verify
    assert alone.verify_many is plain.verify_many is both.verify is None
    asked = [("q", r"\boxed{5}", "5"), ("q", "5", "5"), ("q", "####6", "5"), ("q", "none", "5")]
    found = both.verify_many(asked)
    assert [each.reward for each in found] == [2.5, 2.0, 0.5, 0.0]
    assert [each.status for each in found] == [RIGHT, RIGHT, WRONG, "no answer"]
    assert found[2].parts == {"correct": 0.0, "format": 1.0}
    assert found[0].extracted == "5"


def test_where_one_says_nothing_the_whole_says_nothing():
    def odd(question, completion, answer):
        return {"late": Verdict(0.0, TIMED_OUT, "after 3 s"), "text": "1"}.get(completion) or 1 / (
            completion != "raise"
        )

    judge = weighted(
        {"correct": 1.0, "odd": 1.0}, {"correct": lambda asked: [1.0] * len(asked), "odd": one_by_one(odd)}
    )
    late, text, raised, fine = judge([("", each, "") for each in ("late", "text", "raise", "fine")])
    assert late == Verdict(0.0, TIMED_OUT, "odd: after 3 s")
    assert text.status == raised.status == ERROR
    assert "odd: ZeroDivisionError" in raised.extracted
    assert fine == Verdict(2.0, RIGHT, "", {"correct": 1.0, "odd": 1.0})


@pytest.mark.parametrize("parts", [None, [1.0], {"a": "1"}, {"a": np.nan}, {"a": True}, {"a": 1e13}])
def test_parts_that_are_no_numbers_are_refused(parts):
    with pytest.raises(ValueError, match="it gave "):
        verdict(Verdict(1.0, RIGHT, "", parts))


def test_soft_overlong_is_the_papers_equation():
    """Equation 13 of DAPO, case by case, with its sizes: 20,480 tokens at most, the last 4,096 of them punished."""
    limit, cache = 20_480, 4_096
    lengths = np.array([1, 16_383, 16_384, 16_385, 18_432, 20_479, 20_480])
    by_hand = [0 if n <= limit - cache else (limit - cache - n) / cache if n <= limit else -1 for n in lengths.tolist()]
    np.testing.assert_allclose(overlong(lengths, limit, cache), by_hand, rtol=1e-6)
    assert by_hand[4] == -0.5
    np.testing.assert_array_equal(overlong(np.arange(4), 3, 3), np.float32([0, -1 / 3, -2 / 3, -1]))


PARTS = {"a": (1.0, 0.0), "b": (1.0, 1.0), "c": (0.0, 1.0), "x": (0.0, 0.0)}


def scored(task, rules, rollouts=ROLLOUTS):
    rows = make_rows()
    verified = verify(task, task.train, rows.prompt_ids, rollouts, rows.row_mask)
    return score_steps(task.train, [rows], rollouts, verified, Seconds(0.0, 0.0), [None], rules)[0]


def in_parts(question, completion, answer):
    right, form = PARTS[completion]
    return Verdict(right + 0.6 * form, RIGHT if right else WRONG, "", {"correct": right, "form": form})


def test_correctness_alone_moves_the_posterior_and_each_part_is_in_the_metrics():
    task = make_task(in_parts)
    step = scored(task, Rules())
    # rows: a b c cut | a x a; "c" is wrong and its reward 0.6
    np.testing.assert_allclose(step.batch.reward, [1, 1.6, 0.6, 0, 1, 0, 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(step.num_correct[:2], [2, 2])
    np.testing.assert_array_equal(step.num_evidence[:2], [4, 3])
    metrics = step_metrics(step)
    assert metrics["rewards"] == {"correct": 4 / 6, "form": 2 / 6}  # of the six that were judged
    drawn = step.plan.row_mask
    tokens = [p for row in np.flatnonzero(drawn) for p in ROLLOUTS.log_probs[row].tolist()]
    assert metrics["entropy"] == pytest.approx(-sum(tokens) / ROLLOUTS.lengths[drawn].sum())
    assert step_samples(step)[0]["rewards"] == {"correct": 1.0, "form": 0.0}


def test_one_number_alone_leaves_metrics_and_samples_as_they_are():
    step = scored(make_task(lambda q, c, a: float(c == "a")), Rules())
    assert "rewards" not in step_metrics(step)
    assert all("rewards" not in each for each in step_samples(step))
    assert all(each.parts == {} for each in step.verdicts)


@pytest.mark.parametrize("verifier", [in_parts, lambda q, c, a: PARTS[c][0]], ids=["parts", "one number"])
def test_every_row_pays_for_its_length_and_the_posterior_does_not(verifier):
    task, rules = make_task(verifier), Rules(overlong_tokens=2, overlong_penalty=4.0)
    free, paying = scored(task, Rules()), scored(task, rules)
    lengths = ROLLOUTS.lengths
    # tokens with eos: a letter is 2 of 3, what was cut 3; half the penalty, and all of it
    by_hand = [-2.0 if text in PARTS else -4.0 if text else 0.0 for text in TEXTS]
    assert LIMIT == lengths.max() == 3
    np.testing.assert_allclose(paying.batch.reward - free.batch.reward, by_hand, rtol=1e-6)
    assert paying.batch.reward.dtype == np.float32
    np.testing.assert_array_equal(paying.num_correct, free.num_correct)
    np.testing.assert_array_equal(paying.num_evidence, free.num_evidence)
    assert paying.batch.reward[3] == paying.batch.reward.min()  # what was cut is never better than what ended
    assert step_metrics(paying)["rewards"]["length"] == pytest.approx(np.mean(by_hand[:7]))
    assert paying.verdicts[7].parts == {}  # padding


def test_a_length_penalty_that_cannot_be_is_refused():
    config = Config("x", ChainSum(), allocator=AllocatorConfig(min_group=2))
    for changes, message in (
        ({"overlong_tokens": 26}, r"overlong_tokens=26 must lie in 0..sampler.max_completion_tokens=25"),
        ({"overlong_tokens": -1}, r"overlong_tokens=-1 must"),
        ({"overlong_tokens": 5, "overlong_penalty": -1.0}, r"overlong_penalty=-1.0 in 0"),
        ({"overlong_tokens": 5, "learner": LearnerConfig(advantage="posterior")}, "cuts them to 0..1: choose one"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes).check(3)
    dataclasses.replace(config, overlong_tokens=25).check(3)
