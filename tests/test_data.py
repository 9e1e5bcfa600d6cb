"""Prompts by id, their hash, and the order of a pass."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cero_jax.data import encode_prompts, epoch_order, prompts_hash
from cero_jax.tokenizer import AlphabetTokenizer, ByteTokenizer

TOKENIZER = AlphabetTokenizer("0123456789=")


def test_prompts_are_padded_on_the_left():
    prompts = encode_prompts(["3=", "141="], ["3", "456"], ["a", "b"], TOKENIZER, 5)
    np.testing.assert_array_equal(prompts.tokens, [[0, 0, 0, 5, 12], [0, 3, 6, 3, 12]])
    np.testing.assert_array_equal(prompts.lengths, [2, 4])
    assert prompts.tokens.dtype == prompts.lengths.dtype == np.int32
    assert prompts.questions == ("3=", "141=")
    assert prompts.labels == ("a", "b")


def test_no_prompts_keep_their_shape():
    assert encode_prompts([], [], [], TOKENIZER, 5).tokens.shape == (0, 5)


def test_a_prompt_of_the_wrong_length_is_named():
    with pytest.raises(ValueError, match=r"prompt 1: a prompt of 4 tokens, max_prompt_tokens=3: raise .* to 4 or more"):
        encode_prompts(["3=", "141="], ["3", "456"], ["a", "a"], TOKENIZER, 3)
    with pytest.raises(ValueError, match=r"rows.jsonl:7: a prompt of 0 tokens"):
        encode_prompts([""], ["3"], ["a"], ByteTokenizer(), 3, sources=["rows.jsonl:7"])


def test_hash_sees_order_text_and_tokens():
    def digest(questions, answers, length=4):
        return prompts_hash(encode_prompts(questions, answers, ["all"] * len(questions), ByteTokenizer(), length))

    base = digest(["a", "bc"], ["1", "2"])
    assert base == digest(["a", "bc"], ["1", "2"])
    others = [
        digest(["bc", "a"], ["2", "1"]),
        digest(["ab", "c"], ["1", "2"]),
        digest(["a", "bc"], ["12", ""]),
        digest(["a", "bc"], ["1", "3"]),
        digest(["a", "bc"], ["1", "2"], length=5),
    ]
    assert len({base, *others}) == 6


@given(st.integers(0, 200), st.integers(0, 2**40), st.integers(0, 1000))
def test_epoch_order_is_a_pure_permutation(num_prompts, seed, epoch):
    order = epoch_order(num_prompts, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_prompts))
    np.testing.assert_array_equal(order, epoch_order(num_prompts, seed, epoch))


def test_passes_and_seeds_differ_and_places_are_fair():
    orders = [tuple(epoch_order(50, seed, k)) for seed in range(4) for k in range(4)]
    assert len(set(orders)) == 16
    first = np.bincount([epoch_order(5, 0, k)[0] for k in range(2000)], minlength=5)
    assert np.all(abs(first - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8))
