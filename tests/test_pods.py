"""A pod on paper: sizes against the model's own, and a schedule, a bound and a share worked out by hand."""

import json
import math

import jax
import numpy as np
import pods
import pytest

from cero_jax.model import ModelConfig, abstract_params

CHIP = pods.Target("tpu", "", 4, 1e9, flops=1000.0, bandwidth=10.0, link=5.0)
TINY = pods.Model(layers=2, width=3, kv_heads=1, parameters=50, products=40, cache=1, attention=0)


@pytest.mark.parametrize("name", ["qwen3_4b", "qwen2_5_32b"])
def test_a_models_numbers_are_those_of_its_parameters(name):
    shape, vocab = pods.SHAPES[name]
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(ModelConfig(**shape), vocab))]
    assert pods.model_of(name).parameters == pytest.approx(sum(sizes), rel=1e-3)  # norms and biases are left out
    kept = 2 * shape["num_layers"] * shape["num_kv_heads"] * shape["head_dim"]
    assert pods.model_of(name).cache == 2 * kept


def test_a_slot_that_falls_free_takes_the_next_row():
    lengths = np.array([30, 10, 10, 20])
    # two slots, half a one a chip: 30 | 10 + 10 + 20 steps; 80 bytes of weights, half a row's places, 10 a second
    places = pods.PROMPT + pods.LIMIT
    seconds, busy, cache = pods.decode(TINY, CHIP, 1, lengths, 2)
    assert seconds == pytest.approx(40 * (80 + places / 2) / 10)
    assert busy == pytest.approx(70 / 80)
    assert cache == pytest.approx(places / 2 / (80 + places / 2))
    # all at once: as long as the longest, in a cache that is half full on average
    seconds, busy, _ = pods.decode(TINY, CHIP, 1, lengths, 4)
    assert seconds == pytest.approx(30 * (80 + pods.PROMPT + pods.LIMIT / 2) / 10)
    assert busy == pytest.approx(70 / 120)


def test_the_gradient_is_of_live_rows_cut_to_their_length():
    limit = pods.LIMIT
    lengths = np.array([limit, 10, 10, 10, limit // 2, 10, 10, 10] + [limit] * 8)
    # half of 16 rows are live; micro-batches of four: one up to T / 4, one up to T
    places = 2 * pods.PROMPT + limit // 4 + limit
    computed, sent = 4 * 2 * 40 * places / 1000, 2 * 8 * 50 / 5
    seconds, gathering = pods.learn(TINY, CHIP, 1, lengths, live=0.5)
    assert seconds == pytest.approx(computed + sent)
    assert gathering == pytest.approx(sent / (computed + sent))


def test_groups_that_are_all_alike_are_not_live(tmp_path):
    rows = [{"group_size": 8, "num_correct": [0, 3, 8]}, {"group_size": 4, "num_correct": [4, 1, 0]}]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, rows)))
    assert pods.live_share(tmp_path / "log") == pytest.approx(1 / 3)
    (tmp_path / "texts").write_text('{"solution": "aaa"}\n{"solution": "a"}')
    assert pods.relative_lengths(tmp_path / "texts").tolist() == [1.5, 0.5]
