"""Ragged-group advantages, token weights and the clipped loss, against tables by hand and float64 loops."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cero_jax import grpo

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KINDS = ("grpo", "dr_grpo", "rloo")
AGGREGATIONS = ("token", "sequence", "prompt")
ROWS, TOKENS = 16, 5
ABSURD = (np.inf, -np.inf, np.nan, 1e38, -1e38)

jit_advantages = jax.jit(grpo.advantages, static_argnames=("num_groups", "kind"))
jit_token_weights = jax.jit(grpo.token_weights, static_argnames=("num_groups", "aggregation"))


def rows(*values):
    return jnp.asarray(values, jnp.float32)


def ids(*values):
    return jnp.asarray(values, jnp.int32)


# --- advantages ---


# rewards 1 0 0 | 1 1: the second group has no variance
@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [
        ("grpo", [math.sqrt(2), -math.sqrt(1 / 2), -math.sqrt(1 / 2), 0, 0]),  # over the population's sqrt(2)/3
        ("dr_grpo", [2 / 3, -1 / 3, -1 / 3, 0, 0]),  # minus the group's mean
        ("rloo", [1, -1 / 2, -1 / 2, 0, 0]),  # minus the mean of the others
        ("reward", [1, 0, 0, 1, 1]),  # minus nothing
    ],
)
def test_advantages_by_hand(kind, by_hand):
    got = grpo.advantages(rows(1, 0, 0, 1, 1), ids(0, 0, 0, 1, 1), jnp.ones(5, bool), num_groups=2, kind=kind)
    np.testing.assert_allclose(got, by_hand, rtol=1e-6)


def loop_advantages(reward, group_ids, row_mask, kind):
    out = np.zeros(len(reward))
    for row in np.flatnonzero(row_mask):
        members = [i for i in np.flatnonzero(row_mask) if group_ids[i] == group_ids[row]]
        group = [float(reward[i]) for i in members]
        if max(group) == min(group):
            continue
        others = [float(reward[i]) for i in members if i != row]
        mean = math.fsum(group) / len(group)
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / len(group))
        out[row] = {
            "grpo": (reward[row] - mean) / spread,
            "dr_grpo": reward[row] - mean,
            "rloo": reward[row] - math.fsum(others) / max(len(others), 1),
        }[kind]
    return out


@st.composite
def ragged_groups(draw):
    """Groups of any size, the rows in any order, some of them padding: rewards, group ids, row mask."""
    group_ids = draw(st.lists(st.integers(0, 5), min_size=ROWS, max_size=ROWS))
    reward = draw(st.lists(st.sampled_from([0.0, 1.0, 0.1, 0.7, -2.5, 40.0]), min_size=ROWS, max_size=ROWS))
    row_mask = draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
    return np.array(reward, np.float32), np.array(group_ids, np.int32), np.array(row_mask)


@pytest.mark.parametrize("kind", KINDS)
@given(ragged_groups())
@settings(max_examples=60, deadline=None)
def test_advantages_equal_float64_loops(kind, groups):
    reward, group_ids, row_mask = groups
    want = loop_advantages(reward.astype(np.float64), group_ids, row_mask, kind)
    reward = np.where(row_mask, reward, np.nan)  # what padding holds is nobody's business
    got = np.asarray(jit_advantages(reward, group_ids, row_mask, num_groups=ROWS, kind=kind))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert not got[~row_mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_exactly_zero(kind):
    # the float32 mean of three 0.1 is another number than 0.1, and a quotient of the residues would be about 1
    sizes = list(range(2, 33))
    group_ids = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    for value in (0.1, 0.7, 1 / 3):
        reward = np.full(len(group_ids), value, np.float32)
        mean = np.array([reward[group_ids == g].sum(dtype=np.float32) / np.float32(n) for g, n in enumerate(sizes)])
        assert (mean != np.float32(value)).any()
        mask = np.ones(len(reward), bool)
        np.testing.assert_array_equal(grpo.advantages(reward, group_ids, mask, num_groups=len(sizes), kind=kind), 0.0)


@pytest.mark.parametrize("kind", [*KINDS, "reward"])
def test_padding_rows_neither_influence_nor_receive(kind):
    reward, group_ids, mask = rows(1, 0, 0, 1, 1), ids(0, 0, 0, 1, 1), jnp.ones(5, bool)
    alone = grpo.advantages(reward, group_ids, mask, num_groups=2, kind=kind)
    for absurd in (*ABSURD, 0.5):
        padded = grpo.advantages(
            jnp.append(reward, jnp.float32([absurd, absurd])), jnp.append(group_ids, ids(0, 1)),
            jnp.append(mask, jnp.zeros(2, bool)), num_groups=2, kind=kind,
        )  # fmt: skip
        np.testing.assert_array_equal(padded, [*alone, 0, 0])


@pytest.mark.parametrize("prompt_success", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("size", [2, 8, 32])
@pytest.mark.parametrize("kind", [*KINDS, "reward"])
def test_expected_coefficient_on_the_gradient_of_p(kind, size, prompt_success):
    """Every outcome S of Binomial(n, p) is a group of its own, weighed by its probability."""
    p, n = prompt_success, size
    successes = np.arange(n + 1)
    reward = (np.arange(n)[None, :] < successes[:, None]).astype(np.float32)
    group_ids = np.repeat(successes, n).astype(np.int32)
    advantage = grpo.advantages(
        jnp.asarray(reward.reshape(-1)), group_ids, jnp.ones(reward.size, bool), num_groups=n + 1, kind=kind
    )
    advantage = np.asarray(advantage, np.float64).reshape(n + 1, n)
    # d log P(row) / dp is 1 / p for a success and -1 / (1 - p) for a failure
    coefficient = (advantage * np.where(reward > 0, 1 / p, -1 / (1 - p))).mean(axis=1)
    chance = np.array([math.comb(n, s) * p**s * (1 - p) ** (n - s) for s in successes])
    expected = (chance * coefficient).sum()
    want = {
        "rloo": 1.0,
        "reward": 1.0,
        "dr_grpo": (n - 1) / n,
        "grpo": (chance * np.sqrt(successes * (n - successes))).sum() / (n * p * (1 - p)),
    }[kind]
    assert expected == pytest.approx(want, rel=1e-5)
    if kind == "grpo" and p == 0.02:
        assert round(expected, 1) == {2: 1.0, 8: 2.6, 32: 4.8}[n]  # as the module's docstring says


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="advantage kind='ppo' must be one of"):
        grpo.advantages(rows(1, 0), ids(0, 0), jnp.ones(2, bool), num_groups=1, kind="ppo")  # pyright: ignore
    with pytest.raises(ValueError, match="aggregation='row' must be one of"):
        grpo.token_weights(jnp.ones((2, 3), bool), ids(0, 0), jnp.ones(2, bool), num_groups=1, aggregation="row")  # pyright: ignore


# --- token weights ---


# groups of rows with 2 and 1 tokens | 4 tokens | padding
@pytest.mark.parametrize(
    ("aggregation", "by_hand"),
    [
        ("token", [1 / 7, 1 / 7, 1 / 7, 0]),  # 7 tokens in all
        ("sequence", [1 / 6, 1 / 3, 1 / 12, 0]),  # 3 rows of 2, 1 and 4 tokens
        ("prompt", [1 / 6, 1 / 6, 1 / 8, 0]),  # 2 prompts of 3 and 4 tokens
    ],
)
def test_token_weights_by_hand(aggregation, by_hand):
    lengths = np.array([2, 1, 4, 3])
    mask = np.arange(4)[None, :] < lengths[:, None]
    row_mask = np.array([True, True, True, False])
    got = grpo.token_weights(mask, ids(0, 0, 1, 0), row_mask, num_groups=4, aggregation=aggregation)
    np.testing.assert_allclose(got, mask * np.array(by_hand)[:, None], rtol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(ragged_groups(), st.lists(st.integers(1, TOKENS), min_size=ROWS, max_size=ROWS))
@settings(max_examples=40, deadline=None)
def test_token_weights_equal_loops_and_sum_to_one(aggregation, groups, lengths):
    _, group_ids, row_mask = groups
    mask = np.arange(TOKENS)[None, :] < np.array(lengths)[:, None]
    got = np.asarray(jit_token_weights(mask, group_ids, row_mask, num_groups=ROWS, aggregation=aggregation))
    real = np.flatnonzero(row_mask)
    tokens_of = {g: sum(lengths[i] for i in real if group_ids[i] == g) for g in set(group_ids[real].tolist())}
    want = np.zeros((ROWS, TOKENS))
    for row in real:
        denominator = {
            "token": sum(lengths[i] for i in real),
            "sequence": len(real) * lengths[row],
            "prompt": len(tokens_of) * tokens_of[group_ids[row]],
        }[aggregation]
        want[row, : lengths[row]] = 1 / denominator
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got.sum() == pytest.approx(1.0 if len(real) else 0.0, abs=1e-5)


@pytest.mark.parametrize(("aggregation", "share"), [("token", 4 / 10), ("sequence", 1 / 2), ("prompt", 1 / 2)])
def test_rows_of_advantage_zero_count_in_the_denominators(aggregation, share):
    """A dead group beside a live one makes the live one's loss smaller by its share: no renormalising."""
    lengths, reward, group_ids = np.array([1, 3, 2, 4]), rows(1, 0, 1, 1), ids(0, 0, 1, 1)
    mask = np.arange(4)[None, :] < lengths[:, None]

    first = np.linspace(-0.1, 0.1, 16).reshape(4, 4)[:2]
    log_probs = jnp.asarray(np.concatenate([first, first]), jnp.float32)
    both = jnp.ones(4, bool)
    advantage = grpo.advantages(reward, group_ids, both, num_groups=2)
    weights = grpo.token_weights(mask, group_ids, both, num_groups=2, aggregation=aggregation)
    with_dead = grpo.policy_loss(log_probs, jnp.zeros_like(log_probs), advantage, weights)[0]
    alone_weights = grpo.token_weights(mask[:2], group_ids[:2], both[:2], num_groups=2, aggregation=aggregation)
    alone = grpo.policy_loss(log_probs[:2], jnp.zeros((2, 4), jnp.float32), advantage[:2], alone_weights)[0]
    assert abs(float(alone)) > 1e-3
    assert float(with_dead) == pytest.approx(share * float(alone), rel=1e-5)


# --- the loss ---


def loop_loss(log_probs, old, advantage, weights, clip_low, clip_high):
    """Loss, its gradient on log_probs and the share of clipped weight, in float64."""
    loss, gradient, clipped = 0.0, np.zeros(log_probs.shape), 0.0
    for (i, t), weight in np.ndenumerate(weights):
        if weight == 0:
            continue
        ratio = math.exp(log_probs[i, t] - old[i, t])
        bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
        if bounded * advantage[i] < ratio * advantage[i]:  # the pessimistic side: constant, so no gradient
            loss -= weight * bounded * advantage[i]
            clipped += weight
        else:
            loss -= weight * ratio * advantage[i]
            gradient[i, t] = -weight * ratio * advantage[i]
    return loss, gradient, clipped / weights.sum()


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_float64_loops(seed):
    rng = np.random.default_rng(seed)
    old, advantage = rng.normal(-2, 1, (ROWS, TOKENS)), rng.normal(size=ROWS)
    log_probs = old + rng.normal(0, 0.3, old.shape)
    weights = np.where(rng.random(old.shape) < 0.7, rng.random(old.shape) / old.size, 0)
    want, want_gradient, clipped = loop_loss(log_probs, old, advantage, weights, 0.2, 0.28)
    arrays = [jnp.asarray(x, jnp.float32) for x in (log_probs, old, advantage, weights)]
    loss = partial(grpo.policy_loss, clip_low=0.2, clip_high=0.28)
    (got, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(*arrays)
    assert float(got) == pytest.approx(want, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-7)
    assert float(metrics["clip_share"]) == pytest.approx(clipped, rel=1e-4)
    mismatch = (weights * np.abs(log_probs - old)).sum() / weights.sum()
    assert float(metrics["log_prob_mismatch"]) == pytest.approx(mismatch, rel=1e-4)
    assert "kl" not in metrics


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    rng = np.random.default_rng(0)
    log_probs, advantage, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 4), (6,), (6, 4))
    )
    weights = jnp.abs(weights)
    gradient = jax.grad(lambda x: grpo.policy_loss(x, log_probs, advantage, weights)[0])(log_probs)
    np.testing.assert_allclose(gradient, -weights * advantage[:, None], rtol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "gain", "slope"),
    [
        (1, 1.5, 1.3, 0),  # good enough already: held at 1 + clip_high
        (1, 1.25, 1.25, 1.25),  # within the high clip, beyond the low one
        (1, 0.5, 0.5, 0.5),  # a good token grown unlikely may always come back
        (-1, 0.5, -0.8, 0),  # bad enough already: held at 1 - clip_low
        (-1, 0.9, -0.9, -0.9),
        (-1, 1.5, -1.5, -1.5),  # a bad token grown likely is always pushed down
    ],
)
def test_clip_sides_by_hand(advantage, ratio, gain, slope):
    def loss(log_prob):
        old = jnp.full((1, 1), -1.0, jnp.float32)
        return grpo.policy_loss(
            log_prob.reshape(1, 1), old, rows(advantage), jnp.ones((1, 1), jnp.float32), clip_low=0.2, clip_high=0.3
        )

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.float32(-1 + math.log(ratio)))
    assert float(-value) == pytest.approx(gain, rel=1e-6)
    assert float(-gradient) == pytest.approx(slope, rel=1e-6)
    assert float(metrics["clip_share"]) == float(slope == 0)


def test_k3_by_hand_and_in_expectation():
    half, quarter = jnp.float32(math.log(1 / 2)), jnp.float32(math.log(1 / 4))
    assert float(grpo.k3(half, quarter)) == pytest.approx(1 / 2 - 1 + math.log(2), rel=1e-6)
    assert float(grpo.k3(quarter, half)) == pytest.approx(2 - 1 - math.log(2), rel=1e-6)
    assert float(grpo.k3(half, half)) == 0
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    kl = (policy * np.log(policy / reference)).sum()
    log_policy, log_reference = (jnp.asarray(np.log(p), jnp.float32) for p in (policy, reference))
    assert (policy * np.asarray(grpo.k3(log_policy, log_reference))).sum() == pytest.approx(kl, rel=1e-5)


def test_k3_is_never_negative_and_exact_near_zero():
    """Where policy and reference nearly agree, as at the start: r - 1 - log r must not drown in r's rounding."""
    gap = np.concatenate([np.logspace(-7, 1, 2000), -np.logspace(-7, 1.5, 2000)])
    log_probs = np.zeros(gap.shape, np.float32)
    got = np.asarray(grpo.k3(log_probs, gap.astype(np.float32)), np.float64)
    assert (got >= 0).all()
    exact = gap.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(got, np.expm1(exact) - exact, rtol=1e-3, atol=1e-10)


def test_kl_term_adds_its_weighted_mean():
    rng = np.random.default_rng(1)
    log_probs, ref, weights = (jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(3))
    weights, advantage = jnp.abs(weights), jnp.zeros(6, jnp.float32)
    loss, metrics = grpo.policy_loss(log_probs, log_probs, advantage, weights, kl_coef=0.5, ref_log_probs=ref)
    log_ratio = np.asarray(ref, np.float64) - np.asarray(log_probs)
    kl = (np.asarray(weights, np.float64) * (np.exp(log_ratio) - 1 - log_ratio)).sum()
    assert float(loss) == pytest.approx(0.5 * kl, rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(kl / float(weights.sum()), rel=1e-5)
    with pytest.raises(ValueError, match=r"kl_coef=0\.5 needs ref_log_probs"):
        grpo.policy_loss(log_probs, log_probs, advantage, weights, kl_coef=0.5)


@pytest.mark.parametrize("absurd", ABSURD)
@pytest.mark.parametrize("which", [0, 1, 2])  # log_probs, old_log_probs, ref_log_probs
def test_padding_with_absurd_log_probs_does_not_leak(which, absurd):
    rng = np.random.default_rng(2)
    arrays = [jnp.asarray(rng.normal(-1, 0.1, (4, 3)), jnp.float32) for _ in range(3)]
    weights, advantage = jnp.ones((4, 3), jnp.float32).at[2:, 1:].set(0.0), rows(1, -1, 2, 0)

    def loss(log_probs, old, ref):
        return grpo.policy_loss(log_probs, old, advantage, weights, kl_coef=0.1, ref_log_probs=ref)

    (want, want_metrics), want_gradient = jax.value_and_grad(loss, has_aux=True)(*arrays)
    arrays[which] = jnp.where(weights == 0, jnp.float32(absurd), arrays[which])
    (got, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(*arrays)
    assert float(got) == float(want)
    assert metrics == want_metrics
    np.testing.assert_array_equal(gradient, want_gradient)
    assert (np.asarray(gradient)[np.asarray(weights) == 0] == 0).all()


def test_a_reward_that_is_no_verdict_makes_no_group_live():
    """Groups 1 1 (0) | 1 0 (0) | (0) (0), those in brackets not judged: only the second has two rewards."""
    reward = np.float32([1, 1, 0, 1, 0, 0, 0, 0])
    groups, mask = np.int32([0, 0, 0, 1, 1, 1, 2, 2]), np.ones(8, bool)
    judged = np.array([1, 1, 0, 1, 1, 0, 0, 0], bool)
    got = grpo.advantages(reward, groups, mask, num_groups=8, kind="dr_grpo", judged=judged)
    np.testing.assert_allclose(got, [0, 0, 0, 2 / 3, -1 / 3, -1 / 3, 0, 0], rtol=1e-6)
    everything = grpo.advantages(reward, groups, mask, num_groups=8, kind="dr_grpo", judged=mask)
    np.testing.assert_array_equal(everything, grpo.advantages(reward, groups, mask, num_groups=8, kind="dr_grpo"))
    assert np.asarray(everything)[:3].any()
