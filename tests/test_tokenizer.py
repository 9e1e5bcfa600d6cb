"""Text to ids and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cero_jax.tokenizer import AlphabetTokenizer, ByteTokenizer

TOKENIZERS = [ByteTokenizer(), AlphabetTokenizer("0123456789=")]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_bytes(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 256 for i in ids)


@given(st.text("0123456789="))
def test_text_of_the_alphabet_survives(text):
    tokenizer = AlphabetTokenizer("0123456789=")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    assert all(i not in (tokenizer.pad_id, *tokenizer.eos_ids) for i in ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_decode_skips_pad_and_stops_at_eos(tokenizer):
    pad, eos = tokenizer.pad_id, tokenizer.eos_ids[0]
    three, seven = tokenizer.encode("37")
    ids = np.array([pad, pad, three, pad, seven, eos, three, eos, pad], np.int32)
    assert tokenizer.decode(ids) == "37"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_every_id_decodes_and_others_are_refused(tokenizer):
    for i in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([i]), str)
    for i in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {i} is outside the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([i])


def test_invalid_utf8_is_replaced():
    assert ByteTokenizer().decode([0xFF, ord("a"), 0xE2, 0x82]) == "\ufffda\ufffd"


def test_alphabet_names_the_unknown_character():
    with pytest.raises(ValueError, match=r"character 'x' in '3x' is not in the alphabet '0123'"):
        AlphabetTokenizer("0123").encode("3x")
    with pytest.raises(ValueError, match="none twice"):
        AlphabetTokenizer("00")
