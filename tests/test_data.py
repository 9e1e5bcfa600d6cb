"""Prompts by id, the widths that they are padded to, their hash, and the order of a pass."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cero_jax.data import encode_prompts, epoch_order, prompt_widths, prompts_hash
from cero_jax.tokenizer import AlphabetTokenizer, ByteTokenizer

TOKENIZER = AlphabetTokenizer("0123456789=")


def test_prompts_lie_behind_each_other_and_are_padded_as_rows_only():
    prompts = encode_prompts(["3=", "141=", "59"], ["3", "456", ""], ["a", "b", "b"], TOKENIZER, 1000)
    np.testing.assert_array_equal(prompts.tokens, [5, 12, 3, 6, 3, 12, 7, 11])
    np.testing.assert_array_equal(prompts.offsets, [0, 2, 6, 8])
    np.testing.assert_array_equal(prompts.lengths, [2, 4, 2])
    assert prompts.tokens.dtype == prompts.lengths.dtype == np.int32
    assert prompts.longest == 4
    assert prompts.questions == ("3=", "141=", "59")
    assert prompts.labels == ("a", "b", "b")
    tokens, lengths = prompts.rows(np.array([2, 0, 1, 2]), 5)
    np.testing.assert_array_equal(tokens, [[7, 11, 0, 0, 0], [5, 12, 0, 0, 0], [3, 6, 3, 12, 0], [7, 11, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [2, 2, 4, 2])
    assert tokens.dtype == lengths.dtype == np.int32


def test_no_prompts_have_no_tokens():
    prompts = encode_prompts([], [], [], TOKENIZER, 5)
    assert (len(prompts.tokens), len(prompts.lengths)) == (0, 0)


def test_prompts_without_a_limit_may_be_of_any_length():
    assert encode_prompts(["1" * 3000], [""], [""], TOKENIZER).longest == 3000


def test_a_prompt_of_the_wrong_length_is_named():
    with pytest.raises(ValueError, match=r"prompt 1: a prompt of 4 tokens, max_prompt_tokens=3: raise .* to 4 or more"):
        encode_prompts(["3=", "141="], ["3", "456"], ["a", "a"], TOKENIZER, 3)
    with pytest.raises(ValueError, match=r"rows.jsonl:7: a prompt of 0 tokens"):
        encode_prompts([""], ["3"], ["a"], ByteTokenizer(), 3, sources=["rows.jsonl:7"])


def test_hash_sees_order_text_and_tokens():
    def digest(questions, answers, length=4, tokenizer=ByteTokenizer()):  # noqa: B008
        return prompts_hash(encode_prompts(questions, answers, ["all"] * len(questions), tokenizer, length))

    base = digest(["a", "bc"], ["1", "2"])
    assert base == digest(["a", "bc"], ["1", "2"])
    assert base == digest(["a", "bc"], ["1", "2"], length=5)  # a limit changes nothing that it does not drop
    others = [
        digest(["bc", "a"], ["2", "1"]),
        digest(["ab", "c"], ["1", "2"]),
        digest(["a", "bc"], ["12", ""]),
        digest(["a", "bc"], ["1", "3"]),
        digest(["a", "bc"], ["1", "2"], tokenizer=AlphabetTokenizer("abc")),
    ]
    assert len({base, *others}) == 6


def test_widths_are_those_of_the_data():
    """One where more would spare little; else where the lengths lie, with the longest of all."""
    short, long = np.full(90, 20), np.full(10, 200)
    assert prompt_widths(short, 10) == (20,)
    assert prompt_widths(np.concatenate([short, long]), 10) == (20, 200)
    assert prompt_widths(np.concatenate([short, long]), 10_000) == (
        200,
    )  # next to such completions prompts are nothing
    assert prompt_widths(np.repeat([20, 200, 1000], [100, 80, 10]), 1) == (20, 200, 1000)
    assert prompt_widths(np.array([7]), 1) == (7,)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=300), st.integers(1, 300))
def test_widths_pad_no_more_than_any_others_do(lengths, behind):
    """Against all pairs and triples of lengths; what is padded counted for each prompt and each eight, in float64."""
    lengths, widths = np.array(lengths), prompt_widths(np.array(lengths), behind)
    assert widths[-1] == lengths.max()
    assert set(widths) <= set(lengths.tolist())
    assert len(widths) <= 3
    assert list(widths) == sorted(set(widths))

    def padded(widths):
        up_to = [(lengths <= width).mean() for width in widths]
        return sum(
            (width + behind) * ((share - below) + (share**8 - below**8)) / 2
            for width, share, below in zip(widths, up_to, [0, *up_to], strict=False)
        )

    levels = sorted(set(lengths.tolist()))[:-1]
    if len(lengths) <= 30:  # so that each length is among the 64 levels looked at
        fewer = [padded([lengths.max()])]
        for number in (1, 2):
            fewer.append(min((padded([*some, lengths.max()]) for some in combinations(levels, number)), default=1e9))
        assert padded(widths) == pytest.approx(fewer[len(widths) - 1])
        assert all(fewer[k + 1] <= 0.9 * fewer[k] + 1e-6 for k in range(len(widths) - 1))


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
