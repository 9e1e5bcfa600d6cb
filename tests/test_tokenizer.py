"""Text to ids and back; a folder's tokenizer is compared with transformers (tests/make_fixtures.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cero_jax.huggingface.tokenizer import FolderTokenizer
from cero_jax.tokenizer import AlphabetTokenizer, ByteTokenizer

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = ["qwen2", "llama"]
TOKENIZERS = [
    ByteTokenizer(),
    AlphabetTokenizer("0123456789="),
    *(FolderTokenizer(FIXTURES / name) for name in FOLDERS),
]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_bytes_gives_the_text_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 256 for i in ids)


@given(st.text("0123456789="))
def test_decoding_ids_of_the_alphabet_gives_the_text_back(text):
    tokenizer = AlphabetTokenizer("0123456789=")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    assert all(i not in (tokenizer.pad_id, *tokenizer.eos_ids) for i in ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_decode_skips_pad_and_stops_at_eos(tokenizer):
    pad, eos = [tokenizer.pad_id] * (tokenizer.pad_id not in tokenizer.eos_ids), tokenizer.eos_ids[0]
    three, seven = tokenizer.encode("37")[-2:]  # a BOS may come first
    ids = np.array([*pad, *pad, three, *pad, seven, eos, three, eos, *pad], np.int32)
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


# --- a model folder's own ---


def folder_of(name, tmp_path, settings=None, generation=None, config=None):
    """A copy of a fixture with some keys of its files changed; None as a value removes a key."""
    folder = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    for file, changes in (("tokenizer_config", settings), ("generation_config", generation), ("config", config)):
        path = folder / f"{file}.json"
        content = json.loads(path.read_text()) | (changes or {})
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_encodes_decodes_and_chats_as_transformers_does(name):
    tokenizer, want = FolderTokenizer(FIXTURES / name), json.loads((FIXTURES / f"{name}.json").read_text())
    for text, ids, decoded in zip(want["texts"], want["ids"], want["decoded"], strict=True):
        assert tokenizer.encode(text) == ids
        if not set(ids) & set(tokenizer.eos_ids):  # transformers decodes beyond an eos
            assert tokenizer.decode(ids) == decoded
    assert tokenizer.chat(want["messages"]) == want["chat"]
    assert tokenizer.encode(want["chat"]) == want["chat_ids"]  # the template's BOS is the only one


def test_special_ids_come_from_the_folders_own_files(tmp_path):
    qwen, llama = (FolderTokenizer(FIXTURES / name) for name in FOLDERS)
    assert (qwen.eos_ids, qwen.pad_id, qwen.vocab_size) == ((2, 0), 0, 320)
    assert (llama.eos_ids, llama.pad_id) == ((4,), 4)  # no pad there: the first eos
    bare = {"eos_token": None, "pad_token": None}
    only_config = folder_of("qwen2", tmp_path, bare, {"eos_token_id": None}, {"eos_token_id": 1, "pad_token_id": 5})
    tokenizer = FolderTokenizer(only_config)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((1,), 5)
    as_object = folder_of("llama", tmp_path, {"pad_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"})
    assert (FolderTokenizer(as_object).eos_ids, FolderTokenizer(as_object).pad_id) == ((4, 2), 0)


def test_a_folder_without_an_eos_is_refused(tmp_path):
    folder = folder_of("qwen2", tmp_path, {"eos_token": None}, {"eos_token_id": None}, {"eos_token_id": None})
    with pytest.raises(ValueError, match=r"end-of-sequence ids \(\): at least one.*add it"):
        FolderTokenizer(folder)


def test_add_bos_token_adds_the_bos_once(tmp_path):
    folder = folder_of("qwen2", tmp_path, {"bos_token": "<|begin_of_text|>", "add_bos_token": True})
    tokenizer = FolderTokenizer(folder)
    ids = FolderTokenizer(FIXTURES / "qwen2").encode("x = 3")
    assert tokenizer.encode("x = 3") == [3, *ids]
    assert tokenizer.encode("<|begin_of_text|>x = 3") == [3, *ids]


def test_ids_without_a_token_decode_to_nothing_and_ids_of_no_embedding_are_refused(tmp_path):
    tokenizer = FolderTokenizer(FIXTURES / "qwen2")
    assert tokenizer.decode([319, *tokenizer.encode("ab"), 318]) == "ab"
    with pytest.raises(ValueError, match="id 320 is outside the vocabulary of 320"):
        tokenizer.decode([320])
    small = FolderTokenizer(folder_of("qwen2", tmp_path, config={"vocab_size": 10}))
    with pytest.raises(ValueError, match=r"'ab' holds a token of id \d+, but the model has vocab_size=10: take"):
        small.encode("ab")


def test_a_template_that_attacks_or_refuses_is_an_error(tmp_path):
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    for template, message in ((attack, "refuses .* unsafe"), ("{% set x = messages.append(1) %}", "refuses")):
        tokenizer = FolderTokenizer(folder_of("qwen2", tmp_path / str(template)[:5], {"chat_template": template}))
        with pytest.raises(ValueError, match=message):
            tokenizer.chat([{"role": "user", "content": "x"}])
    assert FolderTokenizer(folder_of("qwen2", tmp_path / "plain", {"chat_template": None})).chat is None
    with pytest.raises(ValueError, match="unknown role robot"):
        FolderTokenizer(FIXTURES / "qwen2").chat([{"role": "robot", "content": "x"}])


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file"):
        FolderTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        FolderTokenizer(tmp_path)


def test_importing_the_modules_imports_nothing_heavy():
    code = """
import sys
import cero_jax.tokenizer
assert not {"tokenizers", "jinja2", "jax", "numpy"} & set(sys.modules)
import cero_jax.huggingface.tokenizer
assert not {"tokenizers", "jinja2"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
