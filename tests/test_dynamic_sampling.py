"""Live groups collected over several steps: whole, in order, with the advantages that they had."""

import jax
import numpy as np
import pytest

from cero_jax import grpo
from cero_jax.dynamic_sampling import collect, nothing_held, pack_live
from cero_jax.learner import Batch, live_rows

LIMIT, WIDTH = 3, 4  # tokens of a completion, of a prompt


def random_batch(seed, num_rows=16, num_groups=5):
    """Rows of groups in any order, some of them padding, rewards often alike; each row carries its number."""
    rng = np.random.default_rng(seed)
    number = np.arange(num_rows, dtype=np.int32) + 100 * seed
    return Batch(
        prompt_tokens=np.repeat(number[:, None], WIDTH, axis=1),
        prompt_lengths=number,
        tokens=np.repeat(number[:, None], LIMIT, axis=1),
        lengths=number,
        log_probs=np.repeat(number[:, None], LIMIT, axis=1).astype(np.float32),
        reward=rng.choice([0.0, 0.0, 0.3, 1.0], num_rows).astype(np.float32),
        group_ids=np.sort(rng.integers(0, num_groups, num_rows)).astype(np.int32),
        row_mask=rng.random(num_rows) < 0.9,
        row_weight=rng.random(num_rows).astype(np.float32),
    )


@pytest.mark.parametrize("seed", range(20))
def test_live_rows_are_those_of_a_group_with_two_rewards(seed):
    batch = random_batch(seed)
    rewards = {}
    for group, reward, real in zip(batch.group_ids, batch.reward, batch.row_mask, strict=True):
        if real:
            rewards.setdefault(group, set()).add(float(reward))
    want = [real and len(rewards[g]) > 1 for g, real in zip(batch.group_ids, batch.row_mask, strict=True)]
    np.testing.assert_array_equal(live_rows(batch), want)
    judged = np.random.default_rng(seed).random(len(want)) < 0.7
    for each in (None, judged):
        columns = batch.reward, batch.group_ids, batch.row_mask
        on_device = grpo.has_variance(*columns, num_groups=len(want), judged=each)
        np.testing.assert_array_equal(live_rows(batch._replace(judged=each)), on_device)


@pytest.mark.parametrize("seed", range(0, 20, 2))
def test_packed_steps_hold_whole_live_groups_with_the_advantages_they_had(seed):
    batches = [random_batch(seed), random_batch(seed + 1)]
    packed, full = pack_live(batches, min_group=2)
    live = [batch.lengths[live_rows(batch) & (batch.group_ids == g)] for batch in batches for g in range(5)]
    kept, room, fits_not = [], 16, False
    for group in filter(len, live):
        if len(group) <= room:
            kept.append(group)
            room -= len(group)
        else:
            fits_not = True
    used = 16 - room
    np.testing.assert_array_equal(packed.lengths[:used], np.concatenate(kept))
    np.testing.assert_array_equal(packed.group_ids[:used], np.repeat(np.arange(len(kept)), [len(g) for g in kept]))
    np.testing.assert_array_equal(packed.row_mask, np.arange(16) < used)
    assert full == (fits_not or room < 2)
    before = {}
    for batch in batches:
        advantage = grpo.advantages(batch.reward, batch.group_ids, batch.row_mask, num_groups=16)
        before |= dict(zip(batch.lengths.tolist(), np.asarray(advantage).tolist(), strict=True))
    after = grpo.advantages(packed.reward, packed.group_ids, packed.row_mask, num_groups=16)
    np.testing.assert_allclose(after[:used], [before[number] for number in packed.lengths[:used]], rtol=1e-5)
    sources = {number: (batch, row) for batch in batches for row, number in enumerate(batch.lengths.tolist())}
    for place in range(used):  # whole rows move: every column with the others
        batch, row = sources[int(packed.lengths[place])]
        for name in ("prompt_tokens", "prompt_lengths", "tokens", "log_probs", "reward", "row_weight"):
            np.testing.assert_array_equal(getattr(packed, name)[place], getattr(batch, name)[row])
    for got, given in zip(jax.tree.leaves(packed), jax.tree.leaves(batches[0]), strict=True):
        assert (got.shape, got.dtype) == (given.shape, given.dtype)


def test_a_step_is_full_only_where_no_group_fits_any_more():
    def batch(*rewards):  # groups of four in rows of eight
        reward = np.zeros(8, np.float32)
        reward[: len(rewards)] = rewards
        return random_batch(0, num_rows=8)._replace(
            reward=reward, group_ids=np.repeat(np.int32([0, 1]), 4), row_mask=np.ones(8, bool)
        )

    live, dead = [1, 0, 0, 0], [1, 1, 1, 1]
    assert pack_live([batch(*dead, *dead)], 4)[0].row_mask.sum() == 0
    assert not pack_live([batch(*dead, *dead)], 4)[1]
    packed, full = pack_live([batch(*live, *dead)], 4)
    assert (packed.row_mask.sum(), full) == (4, False)
    assert pack_live([batch(*live, *dead)], 5)[1]  # four places are too few for a group of five
    packed, full = pack_live([batch(*live, *dead), batch(*dead, *live)], 4)
    assert (packed.row_mask.sum(), full) == (8, True)
    first = batch(*live, *dead)._replace(judged=np.ones(8, bool))
    held = nothing_held(8, WIDTH, LIMIT)
    for got, given in zip(jax.tree.leaves(held), jax.tree.leaves(first), strict=True):
        assert (got.shape, got.dtype) == (given.shape, given.dtype)
    for _ in range(50):  # batches without a live group take no room
        held, whole = collect(held, batch(*dead, *dead)._replace(judged=first.judged), 4)
        assert (whole, held.row_mask.sum(), len(held.reward)) == (None, 0, 8)
    held, whole = collect(held, first, 4)
    assert (whole, held.row_mask.sum()) == (None, 4)
    held, whole = collect(held, batch(*dead, *live)._replace(judged=first.judged), 4)
    np.testing.assert_array_equal(whole.reward, packed.reward)
    assert not held.row_mask.any()
