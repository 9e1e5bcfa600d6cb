"""Held-out accuracy: a mean over prompts and samples, whatever number of rows is drawn at once."""

import json

import jax
import numpy as np
import pytest

from cero_jax import model, sharding
from cero_jax.data import Task, encode_prompts
from cero_jax.evaluate import write_samples
from cero_jax.evaluation import EvaluationConfig, evaluate, scores_table
from cero_jax.model import ModelConfig
from cero_jax.rewards import RIGHT, WRONG, Verdict
from cero_jax.rewards.pool import Pool
from cero_jax.sampler import EVAL_STEP, Rollouts, SamplerConfig, make_sampler
from cero_jax.tokenizer import AlphabetTokenizer
from cero_jax.verify import verify

TOKENIZER = AlphabetTokenizer("0123456789")
QUESTIONS = ("3", "14", "159", "26", "5")
LABELS = ("short", "long", "long", "long", "short")
LIMIT = 3


def make_task(verify):
    prompts = encode_prompts(QUESTIONS, [f"gold {q}" for q in QUESTIONS], LABELS, TOKENIZER, 3)
    return Task(prompts, prompts, TOKENIZER, verify, None)


def stub_sampler(calls, drawn=None):
    """Completes with the prompt's id and the sample's number, in digits: what evaluate makes of them is known."""

    drawn = [] if drawn is None else drawn

    def sample(params, seed, step, batch):
        calls.append((params, int(seed), int(step), {name: np.shape(x) for name, x in batch._asdict().items()}))
        drawn.append(batch.prompt_ids[batch.row_mask].tolist())
        assert len(set(batch.prompt_of_row[batch.row_mask])) == len(set(drawn[-1]))  # each prompt is read once
        tokens = np.full((len(batch.row_mask), LIMIT), TOKENIZER.pad_id, np.int32)
        for row in np.flatnonzero(batch.row_mask):
            prompt = batch.prompt_ids[row]
            visit = batch.prompt_of_row[row]
            length = batch.prompt_lengths[visit]
            assert TOKENIZER.decode(batch.prompt_tokens[visit, :length]) == QUESTIONS[prompt]
            assert (batch.prompt_tokens[visit, length:] == 0).all()
            text = f"{prompt}{batch.rollout_index[row]}"
            tokens[row] = [*TOKENIZER.encode(text), TOKENIZER.eos_ids[0]]
        lengths = np.where(batch.row_mask, LIMIT, 0)
        return Rollouts(tokens, np.zeros(tokens.shape, np.float32), lengths, np.zeros(len(tokens), bool))

    return sample


def verify_table(question, completion, answer):
    """Prompt i is right in its first i samples."""
    assert answer == f"gold {question}"
    prompt, sample = int(completion[0]), int(completion[1])
    assert QUESTIONS[prompt] == question
    return float(sample < prompt)


def test_of_a_reward_in_parts_correctness_alone_is_the_accuracy():
    def in_parts(question, completion, answer):
        right = verify_table(question, completion, answer)
        return Verdict(right + 5.0, RIGHT if right else WRONG, "", {"correct": right, "format": 0.25})

    config = EvaluationConfig(samples=3, rows=15)
    plain, found = (evaluate(stub_sampler([]), {}, make_task(each), config, 11) for each in (verify_table, in_parts))
    assert found.scores == plain.scores
    assert found.accuracy == plain.accuracy == pytest.approx(9 / 15)
    assert found.metrics() == plain.metrics() | {"rewards": {"correct": pytest.approx(9 / 15), "format": 0.25}}
    assert found.samples[4] == plain.samples[4] | {"rewards": {"correct": 0.0, "format": 0.25}}


@pytest.mark.parametrize("rows", [1, 4, 7, 15, 64])
def test_accuracy_is_the_mean_over_prompts_and_samples(rows):
    """Three samples of five prompts: right in 0, 1, 2, 3 and 3 of them; rows that divide neither."""
    calls, drawn = [], []
    config = EvaluationConfig(samples=3, rows=rows)
    result = evaluate(stub_sampler(calls, drawn), "params", make_task(verify_table), config, seed=11)
    assert result.accuracy == pytest.approx((0 + 1 + 2 + 3 + 3) / 15)
    assert result.accuracy_by_label == pytest.approx({"short": (0 + 3) / 6, "long": (1 + 2 + 3) / 9})
    assert result.example == {"question": "3", "completion": "00", "answer": "gold 3", "reward": 0.0}
    score = result.scores["all"]
    assert list(result.scores) == ["all", "long", "short"]
    assert (score.prompts, score.accuracy) == (5, result.accuracy)
    assert score.low < score.accuracy < score.high
    # of 0, 1, 2, 3 and 3 right in three: two drawn hold a right one but for the pairs of wrong ones
    assert score.pass_at == pytest.approx({"1": 9 / 15, "2": (0 + 2 / 3 + 1 + 1 + 1) / 5})
    assert score.status == {"right": 9, "wrong": 6, "no answer": 0, "too long": 0, "timed out": 0, "error": 0}
    assert result.scores["short"].prompts == 2
    assert [(s["prompt_id"], s["sample"], s["completion"]) for s in result.samples] == [
        (i, j, f"{i}{j}") for i in range(5) for j in range(3)
    ]
    assert result.samples[4] == {
        "prompt_id": 1, "sample": 1, "label": "long", "question": "14", "answer": "gold 14", "completion": "11",
        "extracted": "", "status": "wrong", "reward": 0.0, "length": LIMIT,
    }  # fmt: skip
    whole_prompts = rows // 3 * 3 or rows  # so that each is read once, where there is room for one's samples
    assert len(calls) == -(-15 // whole_prompts)
    assert all(call == calls[0] for call in calls)  # one shape, so one program
    assert calls[0][:3] == ("params", 11, EVAL_STEP)
    order = [prompt for some in drawn for prompt in some]
    assert [len(QUESTIONS[i]) for i in order] == sorted((len(q) for q in QUESTIONS for _ in range(3)), reverse=True)
    if rows >= 3:  # all samples of a prompt are drawn together
        assert all(some.count(i) == 3 for some in drawn for i in some)


def test_the_number_of_rows_does_not_change_what_a_policy_draws():
    config = ModelConfig(num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: model.init_params(config, TOKENIZER.vocab_size, 0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(x.dtype), shapes)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    sample = make_sampler(config, SamplerConfig(LIMIT), TOKENIZER.eos_ids, TOKENIZER.pad_id, mesh)
    texts = {}

    def verify(question, completion, answer):
        texts.setdefault(rows, []).append((question, completion))
        return float(len(completion))  # an arbitrary figure that hangs on the draw

    results = []
    for rows in (4, 20):
        task, settings = make_task(verify), EvaluationConfig(samples=4, rows=rows)
        results.append(evaluate(sample, params, task, settings, seed=0))
        assert evaluate(sample, params, task, settings, seed=0) == results[-1]
        assert evaluate(sample, params, task, settings, seed=1).accuracy != results[-1].accuracy
    assert texts[4] == texts[20]
    assert len(set(texts[4])) > 4  # a cut completion is wrong unread
    assert results[0] == results[1]


def test_decode_reads_each_rows_own_length():
    tokens = np.array([[2, 3, 1], [4, 5, 6], [0, 0, 0]], np.int32)
    rollouts = Rollouts(tokens, np.zeros((3, 3), np.float32), np.array([3, 2, 0]), np.zeros(3, bool))
    task, real = make_task(lambda q, c, a: 0.0), np.array([True, True, False])
    assert verify(task, task.heldout, np.zeros(3, int), rollouts, real).completions == ["01", "23", ""]


def test_each_status_of_a_pool_and_a_cut_completion_is_counted():
    """Prompt 0 times out, 1 raises, 2 is right, 3 has no answer; the second sample of each is cut, and unread."""

    def sample(params, seed, step, batch):
        rollouts = stub_sampler([])(params, seed, step, batch)
        return rollouts._replace(truncated=batch.row_mask & (batch.rollout_index == 1))

    pool = Pool("user_verifiers:by_prompt", seconds=0.5, workers=1)
    task = make_task(None)
    heldout = encode_prompts(QUESTIONS[:4], ["hang", "raise", "right", "none"], LABELS[:4], TOKENIZER, 3)
    result = evaluate(
        sample,
        None,
        task._replace(heldout=heldout, verify=None, verify_many=pool.many),
        EvaluationConfig(samples=2, rows=3),
        0,
    )
    pool.close()
    assert result.scores["all"].status == {
        "right": 1, "wrong": 0, "no answer": 1, "too long": 4, "timed out": 1, "error": 1
    }  # fmt: skip
    assert result.accuracy == 1 / 8
    assert [each["status"] for each in result.samples[::2]] == ["timed out", "error", "right", "no answer"]
    lines = scores_table(result.scores).splitlines()
    assert [line.split()[0] for line in lines] == ["all", "long", "short"]
    assert "avg@2  12.5 (" in lines[0]
    assert "12.5 % no answer, 50.0 % too long, 12.5 % timed out, 12.5 % error" in lines[0]
    json.dumps(result.metrics())


@pytest.mark.parametrize("lowest", [0.0, -1.0])
@pytest.mark.parametrize(
    ("right", "wrong", "line"),
    [
        (1, -1, "avg@3 -0.3333 (-1 to "),  # 9 of 15 are right, of which 4 are cut
        (-1, -1, "avg@3    -1 (-1 to 0.04365)"),  # five prompts all wrong: 1 - 0.025^(1/5) of the scale, from -1 to 1
        (10, 0, "avg@3 3.333 (0 to "),
    ],
)
def test_a_table_holds_on_any_scale_and_what_was_cut_is_no_better_than_wrong(right, wrong, line, lowest):
    def sample(params, seed, step, batch):  # the first sample of each is cut
        rollouts = stub_sampler([])(params, seed, step, batch)
        return rollouts._replace(truncated=batch.row_mask & (batch.rollout_index == 0))

    judge = lambda q, c, a: float(right if verify_table(q, c, a) else wrong)  # noqa: E731
    result = evaluate(sample, None, make_task(judge), EvaluationConfig(samples=3), 0, lowest_reward=lowest)
    rewards = np.array([each["reward"] for each in result.samples]).reshape(5, 3)
    floor = min(wrong, lowest)
    np.testing.assert_array_equal(rewards[:, 0], floor)
    assert rewards.min() == floor
    assert result.accuracy == pytest.approx(rewards.mean())
    score = result.scores["all"]
    assert floor <= score.low <= score.accuracy <= score.high <= max(right, 1)
    table = scores_table(result.scores)
    assert "nan" not in table
    if wrong < 0 or lowest == 0:
        assert line in table.splitlines()[0]
    assert ("scale" in result.metrics()["scores"]["all"]) == (score.scale != (0, 1))
    json.dumps(result.metrics(), allow_nan=False)


@pytest.mark.parametrize(("lowest", "all_get", "threshold"), [(2.0, 2.0, 5.0), (0.0, 0.0, 10.0), (1.0, 1.0, 1.5)])
def test_where_all_rewards_are_the_lowest_the_interval_reaches_towards_the_threshold(lowest, all_get, threshold):
    task, config = make_task(lambda q, c, a: all_get), EvaluationConfig(samples=3)
    score = evaluate(stub_sampler([]), None, task, config, 0, threshold, lowest).scores["all"]
    assert (score.accuracy, score.low) == (all_get, lowest)
    # five prompts, none of them right: Clopper and Pearson, 1 - 0.025^(1/5) of the scale
    assert score.high == pytest.approx(lowest + (threshold - lowest) * (1 - 0.025 ** (1 / 5)))


def test_a_policy_that_is_not_a_number_is_not_measured():
    def sample(params, seed, step, batch):
        rollouts = stub_sampler([])(params, seed, step, batch)
        return rollouts._replace(log_probs=np.full_like(rollouts.log_probs, np.nan))

    with pytest.raises(FloatingPointError, match="the policy is not a number: of 15 completions"):
        evaluate(sample, None, make_task(verify_table), EvaluationConfig(samples=3), 0)


def test_samples_are_written_a_line_each(tmp_path):
    samples = evaluate(stub_sampler([]), None, make_task(verify_table), EvaluationConfig(samples=2), 0).samples
    write_samples(tmp_path / "samples.jsonl", samples)
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == samples


@pytest.mark.parametrize("field", ["every_rollouts", "samples", "rows"])
def test_settings_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        EvaluationConfig(**{field: 0})
