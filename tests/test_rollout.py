"""Between sampler and learner: rewards, live rows, packed steps and visit rates, by hand and against grpo."""

import threading

import numpy as np
import pytest

import cero_jax
from cero_jax import grpo
from cero_jax.data import Prompts, Task, encode_prompts
from cero_jax.learner import live_rows
from cero_jax.pace import Seconds
from cero_jax.packing import plan
from cero_jax.rewards import ERROR, TIMED_OUT, TOO_LONG, Verdict
from cero_jax.rollout import (
    Beliefs,
    Rules,
    observed_tokens,
    sampling_batch,
    score_steps,
    split_steps,
    step_metrics,
    step_samples,
)
from cero_jax.sampler import Rollouts
from cero_jax.tokenizer import AlphabetTokenizer
from cero_jax.verify import Verification, judge, on_scale, probe, verify

TOKENIZER = AlphabetTokenizer("abcx")
QUESTIONS, ANSWERS = ("a", "bc", "cab"), ("1", "2", "3")
ROWS, LIMIT, WIDTH = 8, 3, 4


def make_task(verify):
    prompts = encode_prompts(QUESTIONS, ANSWERS, ["all"] * 3, TOKENIZER, WIDTH)
    nothing = Prompts((), (), np.zeros(0, np.int32), np.zeros(1, np.int64), (), longest=1)
    return Task(prompts, nothing, TOKENIZER, verify, None)


def make_rows():
    """Prompt 2 in four rows, prompt 0 in three, one row of padding."""
    (rows,) = plan(np.array([3, 0, 4]), np.array([2, 0, 1]), rows_per_step=ROWS, min_group=3)
    return rows


def make_rollouts(texts, cut=()):
    """Completions in letters; "" is a padding row; those cut have no eos."""
    tokens = np.full((len(texts), LIMIT), TOKENIZER.pad_id, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        ids = TOKENIZER.encode(text) + [TOKENIZER.eos_ids[0]] * (row not in cut and text != "")
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    log_probs = -np.arange(tokens.size, dtype=np.float32).reshape(tokens.shape)
    return Rollouts(tokens, log_probs, lengths, np.isin(np.arange(len(texts)), cut))


# rows 0 to 3 are of prompt 2, 4 to 6 of prompt 0
TEXTS = ["a", "b", "c", "aab", "a", "x", "a", ""]
REWARD = {"a": 1.0, "b": 0.5, "c": 0.49, "x": 0.0, "aab": 1.0}
ROLLOUTS = make_rollouts(TEXTS, cut=(3,))


def scored_by(verifier, truncated="wrong", threshold=0.5, beliefs=None, lowest=0.0):
    task, rows = make_task(verifier), make_rows()
    verified = verify(task, task.train, rows.prompt_ids, ROLLOUTS, rows.row_mask)
    (step,) = score_steps(
        task.train, [rows], ROLLOUTS, verified, Seconds(0.0, 0.0), [beliefs], Rules(truncated, threshold, lowest)
    )
    return step


def scored(truncated="wrong", threshold=0.5):
    return scored_by(lambda q, c, a: REWARD[c], truncated, threshold)


MEAN_TOKENS = np.array([5, 6, 7], np.float32)


def test_steps_of_one_policy_are_laid_behind_each_other_and_a_short_batch_is_padded():
    task, rows = make_task(lambda q, c, a: 0.0), make_rows()
    one = sampling_batch(task.train, [rows], 1, MEAN_TOKENS)
    two = sampling_batch(task.train, [rows, rows], 3, MEAN_TOKENS)
    visits = len(one.prompt_lengths)
    for name in ("row_mask", "prompt_ids", "rollout_index", "expected_tokens"):
        np.testing.assert_array_equal(getattr(two, name)[: 2 * ROWS], np.tile(getattr(one, name), 2))
    np.testing.assert_array_equal(two.prompt_of_row[ROWS : 2 * ROWS], one.prompt_of_row + visits)
    assert not two.row_mask[2 * ROWS :].any()
    assert two.prompt_tokens.shape == (3 * visits, 3)  # the longest prompt's tokens, not the limit
    np.testing.assert_array_equal(one.expected_tokens[:7], [7, 7, 7, 7, 5, 5, 5])


def test_observed_tokens_follow_the_completions():
    seen = observed_tokens(MEAN_TOKENS, make_rows(), np.array([1, 2, 3, 2, 9, 9, 9, 50]))
    np.testing.assert_array_equal(seen, [7, 6, 4.5])  # prompt 2 took 2 on average, prompt 0 took 9; padding counts not
    np.testing.assert_array_equal(MEAN_TOKENS, [5, 6, 7])


def test_sampling_batch_hold_each_prompt_once_and_point_to_it():
    task, rows = make_task(lambda q, c, a: 0.0), make_rows()
    inputs = sampling_batch(task.train, [rows], 1, MEAN_TOKENS)
    assert inputs.prompt_tokens.shape == (ROWS // 3, 3)
    for row in np.flatnonzero(rows.row_mask):
        visit, prompt = inputs.prompt_of_row[row], inputs.prompt_ids[row]
        assert prompt == (2 if row < 4 else 0)
        length = inputs.prompt_lengths[visit]
        assert TOKENIZER.decode(inputs.prompt_tokens[visit, :length]) == QUESTIONS[prompt]
    np.testing.assert_array_equal(inputs.rollout_index, [0, 1, 2, 3, 0, 1, 2, 0])
    np.testing.assert_array_equal(inputs.row_mask, np.arange(ROWS) < 7)
    assert (inputs.prompt_ids >= 0).all()
    # a step with a single visit: what is not used must still index something
    (rows,) = plan(np.array([0, 3, 0]), np.arange(3), rows_per_step=ROWS, min_group=3)
    np.testing.assert_array_equal(sampling_batch(task.train, [rows], 1, MEAN_TOKENS).prompt_lengths, [2, 1])


def test_each_rollout_is_verified_against_its_own_prompt_and_padding_never():
    asked = []

    def judge(question, completion, answer):
        asked.append((question, completion, answer))
        return 0.0

    scored_by(judge)
    assert asked == [("cab", text, "3") for text in "abc"] + [("a", text, "1") for text in "axa"]  # row 3 is cut


@pytest.mark.parametrize(
    ("threshold", "num_correct"),
    [(0.5, [2, 2]), (0.51, [1, 2]), (0.1, [3, 2]), (1.5, [0, 0])],  # rewards 1 .5 .49 cut | 1 0 1
)
def test_success_is_a_reward_of_at_least_the_threshold(threshold, num_correct):
    result = scored(threshold=threshold)
    np.testing.assert_array_equal(result.num_correct, num_correct)
    assert result.num_correct.dtype == np.int32
    np.testing.assert_array_equal(result.batch.reward, np.float32([1, 0.5, 0.49, 0, 1, 0, 1, 0]))
    assert result.completions == TEXTS


def test_rollouts_verified_as_they_end_are_those_verified_together():
    """The sampler tells of rows in three parts; the first are judged while the others are still to come."""
    task, rows = make_task(lambda q, c, a: REWARD[c]), make_rows()
    judged, slow = [], threading.Event()

    def judge(question, completion, answer):
        judged.append(completion)
        slow.set()
        return REWARD[completion]

    def sample(params, seed, steps, batch, on_end):
        on_end(np.array([4, 1]), ROLLOUTS)
        assert slow.wait(10)  # verified before the last row is drawn
        on_end(np.array([0, 2, 3]), ROLLOUTS)
        on_end(np.array([5, 6]), ROLLOUTS)
        return ROLLOUTS

    batch = sampling_batch(task.train, [rows], 1, MEAN_TOKENS)
    verification = Verification(make_task(judge), batch)
    rollouts = sample(None, 0, np.zeros(ROWS), batch, verification.on_end)
    verified, seconds = verification.result()
    assert seconds.drawing > 0 < seconds.waiting
    whole = verify(task, task.train, rows.prompt_ids, ROLLOUTS, rows.row_mask)
    assert verified.completions == whole.completions
    assert verified.verdicts == whole.verdicts
    np.testing.assert_array_equal(verified.reward, whole.reward)
    assert judged[:2] == ["b", "a"]
    parts = list(split_steps(rollouts, verified, 4))
    assert [part.completions for _, part in parts] == [TEXTS[:4], TEXTS[4:]]
    np.testing.assert_array_equal(parts[1][0].tokens, ROLLOUTS.tokens[4:])


@pytest.mark.parametrize("truncated", ["wrong", "mask"])
def test_a_cut_completion_is_wrong_and_under_mask_no_part_of_its_group(truncated):
    result = scored(truncated)
    np.testing.assert_array_equal(result.truncated, np.arange(ROWS) == 3)
    want = np.arange(ROWS) < 7
    if truncated == "mask":
        want[3] = False
    np.testing.assert_array_equal(result.batch.row_mask, want)
    assert result.batch.reward[3] == 0
    np.testing.assert_array_equal(result.num_correct, [2, 2])  # to the posterior it is a failure either way


def test_a_verification_that_timed_out_is_charged_and_no_evidence():
    """Rows 1 (of prompt 2) and 4, 6 (of prompt 0) time out: reward 0, drawn, and left out of the posterior."""
    slow = {("cab", "b"), ("a", "a")}
    judge = lambda q, c, a: Verdict(0.0, TIMED_OUT) if (q, c) in slow else REWARD[c]  # noqa: E731
    result = scored_by(judge)
    np.testing.assert_array_equal(result.num_evidence, [3, 1])
    np.testing.assert_array_equal(result.num_correct, [1, 0])
    np.testing.assert_array_equal(result.batch.reward, np.float32([1, 0, 0.49, 0, 0, 0, 0, 0]))
    np.testing.assert_array_equal(result.batch.row_mask, np.arange(ROWS) < 7)
    row = step_metrics(result)
    assert (row["num_rollouts"], row["num_evidence"]) == ([4, 3], [3, 1])
    assert row["effective_share"] == 1 / 2
    assert row["status"] == {"right": 1, "wrong": 2, "no answer": 0, "too long": 1, "timed out": 3, "error": 0}
    rows, allocator = make_rows(), cero_jax.cero(total_budget=100, num_epochs=1, discount=1.0)
    counts = {"prompt_ids": rows.visit_ids, "num_evidence": result.num_evidence}
    state = allocator.update(allocator.init(3), rows.visit_sizes, result.num_correct, **counts)
    np.testing.assert_allclose(state.alpha, [0.5, 0.5, 1.5])
    np.testing.assert_allclose(state.beta, [1.5, 0.5, 2.5])
    assert int(state.ledger.spent) == 7


def test_each_row_has_what_was_believed_of_its_prompt_and_what_is_no_evidence_has_no_advantage():
    beliefs = Beliefs(np.float32([3, 0.5]), np.float32([1, 6]))  # of prompt 2, then of prompt 0
    slow = lambda q, c, a: Verdict(0.0, TIMED_OUT) if (q, c) == ("cab", "b") else REWARD[c]  # noqa: E731
    step = scored_by(slow, beliefs=beliefs)
    np.testing.assert_array_equal(step.batch.alpha[:7], [3, 3, 3, 3, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(step.batch.beta[:7], [1, 1, 1, 1, 6, 6, 6])
    np.testing.assert_array_equal(step.batch.row_mask, [1, 0, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(step.num_evidence, [3, 3])
    without = scored_by(slow)
    assert without.batch.alpha is without.batch.beta is None
    np.testing.assert_array_equal(without.batch.row_mask, [1, 1, 1, 1, 1, 1, 1, 0])


def test_one_sample_of_each_visit_is_kept_to_read():
    samples = step_samples(scored())
    assert [(each["prompt_id"], each["completion"], each["status"]) for each in samples] == [
        (2, "a", "right"),
        (0, "a", "right"),
    ]
    assert samples[0] | {"length": 2, "reward": 1.0, "extracted": ""} == samples[0]


def test_the_batch_pairs_each_completion_with_its_prompt():
    batch = scored().batch
    prompts = [TOKENIZER.encode("cab")] * 4 + [[*TOKENIZER.encode("a"), 0, 0]] * 3
    np.testing.assert_array_equal(batch.prompt_tokens[:7], prompts)
    np.testing.assert_array_equal(batch.prompt_lengths[:7], [3, 3, 3, 3, 1, 1, 1])
    np.testing.assert_array_equal(batch.tokens, ROLLOUTS.tokens)
    np.testing.assert_array_equal(batch.log_probs, ROLLOUTS.log_probs)
    np.testing.assert_array_equal(batch.lengths, [2, 2, 2, 3, 2, 2, 2, 0])
    np.testing.assert_array_equal(batch.group_ids[:7], [0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(batch.row_weight, 1)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (float("nan"), "ValueError: it gave nan: a reward must be finite"),
        (float("-inf"), "ValueError: it gave -inf: a reward must be finite"),
        (1e300, "ValueError: it gave 1e+300: a reward must lie within -1e+12 and 1e+12"),
        (-3.5e38, "ValueError: it gave -3.5e+38: a reward must lie within"),  # finite in float64, not in float32
        (10**400, "ValueError: it gave 1000"),
        (Verdict(1e300, "right"), "ValueError: it gave 1e+300: a reward must lie"),
        (Verdict(float("nan"), "wrong"), "ValueError: it gave nan: a"),
        (Verdict(None, "right"), "ValueError: it gave Verdict(reward=None"),
        (Verdict(1.0, "fine"), "ValueError: it gave Verdict(reward=1.0, status='fine'"),
        (None, "ValueError: it gave None: give a number, or a Verdict whose status is one of 'right', "),
        ("right", "ValueError: it gave 'right': give a number"),
        (ZeroDivisionError("of mine"), "ZeroDivisionError: of mine"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_is_no_reward_is_an_error_and_no_evidence_and_the_other_rows_stand(odd, why):
    """Of prompt 0, rows 4 to 6; whether the verifier is asked one by one or for many at once."""

    def one(question, completion, answer):
        if question == "a" and isinstance(odd, Exception):
            raise odd
        return odd if question == "a" else REWARD[completion]

    step = scored_by(one)
    assert [each.status for each in step.verdicts[4:7]] == [ERROR] * 3
    assert step.verdicts[4].extracted.startswith(why)
    np.testing.assert_array_equal(step.batch.reward, np.float32([1, 0.5, 0.49, 0, 0, 0, 0, 0]))
    np.testing.assert_array_equal(step.num_evidence, [4, 0])
    np.testing.assert_array_equal(step.batch.judged, np.arange(ROWS) < 4)
    np.testing.assert_array_equal(live_rows(step.batch), np.arange(ROWS) < 4)
    if not isinstance(odd, Exception):
        many = make_task(None)._replace(verify_many=lambda asked: [one(*each) for each in asked])
        asked = [("cab", "a", "3"), ("a", "b", "1")]
        assert judge(many, asked) == judge(make_task(one), asked)


def test_a_verifier_of_many_that_raises_or_loses_count_is_an_error_of_each():
    asked = [("a", "b", "1"), ("bc", "b", "2")]

    def lost(asked):
        raise ConnectionError("no server")

    for many, why in ((lost, "ConnectionError: no server"), (lambda asked: [1.0], "gave 1 results for 2 completions")):
        verdicts = judge(make_task(None)._replace(verify_many=many), asked)
        assert [each.status for each in verdicts] == [ERROR, ERROR]
        assert why in verdicts[1].extracted


def test_a_verifier_is_asked_once_before_any_work(caplog):
    asked = []
    probe(make_task(lambda *each: asked.append(each) or 0.0))
    assert asked == [("a", "1", "1")]
    with pytest.raises(ValueError, match=r"training prompt 0, asked of its gold answer '1': ValueError: it gave None"):
        probe(make_task(lambda q, c, a: None))
    with pytest.raises(ValueError, match=r"KeyError: 'a'.*: mend it, or the data"):
        probe(make_task(lambda q, c, a: {}[q]))
    of_an_evaluation = make_task(lambda q, c, a: None)
    of_an_evaluation = of_an_evaluation._replace(
        train=encode_prompts([], [], [], of_an_evaluation.tokenizer), heldout=of_an_evaluation.train
    )
    with pytest.raises(ValueError, match="the verifier fails on held-out prompt 0"):
        probe(of_an_evaluation)
    probe(make_task(lambda q, c, a: Verdict(0.0, TIMED_OUT, "after 3 s")))
    assert "timed out (after 3 s) on its first call" in caplog.text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_policy_that_is_not_a_number_is_found_by_what_it_draws(bad):
    task, rows = make_task(lambda q, c, a: 1.0), make_rows()
    log_probs = ROLLOUTS.log_probs.copy()
    log_probs[7] = bad  # padding: anything may stand there
    verify(task, task.train, rows.prompt_ids, ROLLOUTS._replace(log_probs=log_probs), rows.row_mask)
    log_probs[3, 2] = bad
    with pytest.raises(FloatingPointError, match=r"the policy is not a number: of 7 completions .* 1 have"):
        verify(task, task.train, rows.prompt_ids, ROLLOUTS._replace(log_probs=log_probs), rows.row_mask)


SCALES = [  # rewards of rows 0 to 2 and 4 to 6, the lowest of the scale as configured; what rows 3 (cut), 5 then have
    ([1, -1, 1, 1, None, -1], 0.0, -1.0),  # DAPO's, not said: the lowest that was given
    ([1, -1, 1, 1, None, -1], -1.0, -1.0),
    ([1, 1, 1, 1, None, 1], -1.0, -1.0),
    ([1, 1, 1, 1, None, 1], 0.0, 0.0),
    ([0.7, -0.2, 0.1, 1.3, None, -0.4], 0.0, -0.4),  # a weighted sum
    ([7, 3, 10, 5, None, 9], 0.0, 0.0),
    ([-1, -1, -1, -1, None, -1], 0.0, -1.0),
]


@pytest.mark.parametrize(("given", "lowest", "floor"), SCALES)
def test_no_wrong_answer_is_worse_than_none_on_any_scale(given, lowest, floor):
    """Row 3 is cut, row 5 fails: both have the lowest reward, and what failed makes no group live."""
    rewards = iter(given)

    def judge(question, completion, answer):
        reward = next(rewards)
        return Verdict(0.0, TIMED_OUT) if reward is None else reward

    step = scored_by(judge, lowest=lowest)
    reward = step.batch.reward
    assert reward[3] == reward[5] == np.float32(floor) <= reward[:7].min()
    np.testing.assert_array_equal(reward[[0, 1, 2, 4, 6]], np.float32([*given[:4], given[5]]))
    want = [len({*given[:3], floor}) > 1] * 4 + [given[3] != given[5]] * 3 + [False]
    np.testing.assert_array_equal(live_rows(step.batch), want)
    advantage = np.asarray(grpo.advantages(reward, step.batch.group_ids, step.batch.row_mask, num_groups=2,
                                           judged=step.batch.judged))  # fmt: skip
    assert advantage[3] <= advantage[:3].min()
    np.testing.assert_array_equal(advantage != 0, want)


def test_a_completion_beyond_a_verifiers_bounds_has_the_lowest_reward_too():
    verdicts = [Verdict(-1.0, "wrong"), Verdict(0.0, TOO_LONG), Verdict(0.0, ""), Verdict(1.0, "right")]
    np.testing.assert_array_equal(on_scale(np.float32([-1, 0, 0, 1]), verdicts, -2.0), [-1, -2, 0, 1])


def test_many_are_verified_at_once_and_a_task_has_one_verifier():
    asked = []

    def many(each):
        asked.append(len(each))
        return [REWARD[completion] for _, completion, _ in each]

    rows = make_rows()
    task = make_task(None)._replace(verify_many=many)
    verified = verify(task, task.train, rows.prompt_ids, ROLLOUTS, rows.row_mask)
    np.testing.assert_array_equal(verified.reward, scored().batch.reward)
    assert asked == [6]
    for wrong in (make_task(None), task._replace(verify=lambda q, c, a: 0.0)):
        with pytest.raises(ValueError, match="either `verify` or `verify_many`"):
            verify(wrong, task.train, rows.prompt_ids, ROLLOUTS, rows.row_mask)


def test_step_metrics_say_who_was_drawn_and_what_came_of_it():
    row = step_metrics(scored())
    assert row["prompt_ids"] == [2, 0]
    assert row["num_rollouts"] == [4, 3]
    assert row["num_correct"] == [2, 2]
    assert row["reward"] == pytest.approx((1 + 0.5 + 0.49 + 0 + 1 + 0 + 1) / 7)
    assert row["live_share"] == row["effective_share"] == 1
    assert row["fill"] == 7 / 8
    assert row["truncated_share"] == pytest.approx(1 / 7)
    assert row["completion_tokens"] == pytest.approx((2 + 2 + 2 + 3 + 2 + 2 + 2) / 7)
    same = scored_by(lambda q, c, a: float(q == "a" and c == "x"))
    assert step_metrics(same)["live_share"] == pytest.approx(3 / 7)
    assert step_metrics(same)["effective_share"] == 1 / 2
