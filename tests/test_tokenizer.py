"""Text to ids and back; a folder's tokenizer is compared with transformers (tests/make_fixtures.py)."""

import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cero_jax.huggingface import chat_template
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
    assert tokenizer.chat([want["messages"]] * 2) == [want["chat"]] * 2
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
            tokenizer.chat([[{"role": "user", "content": "x"}]])
    assert FolderTokenizer(folder_of("qwen2", tmp_path / "plain", {"chat_template": None})).chat is None
    with pytest.raises(ValueError, match=r"refuses \[{'role': 'robot'.*: unknown role robot"):
        FolderTokenizer(FIXTURES / "qwen2").chat([ASKED, [{"role": "robot", "content": "x"}]])


def test_truncation_padding_and_dropout_in_the_file_are_off(tmp_path):
    """What the last user of a tokenizer switched on is saved in its file; every prompt is read whole."""
    folder = folder_of("qwen2", tmp_path)
    path, text = folder / "tokenizer.json", "Natalia sold 48 clips in April."
    saved = json.loads(path.read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    saved["model"]["dropout"] = 0.9
    path.write_text(json.dumps(saved))
    tokenizer, want = FolderTokenizer(folder), FolderTokenizer(FIXTURES / "qwen2")
    assert [tokenizer.encode(text) for _ in range(5)] == [want.encode(text)] * 5
    assert len(want.encode(text)) > 4
    assert tokenizer.decode(tokenizer.encode(text)) == text


ASKED = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7"}]


def with_template(tmp_path, template, **more):
    return folder_of("qwen2", tmp_path, {"chat_template": template} | more)


def test_the_generation_tag_renders_as_without_it_and_the_date_is_the_starts(tmp_path):
    tagged = (
        "{{ strftime_now('%d %b %Y') }}\n{%- for m in messages %}\n  {%- if m.role == 'assistant' %}\n"
        "    {% generation %}\n{{ m.content }}!\n    {% endgeneration %}\n  {% else %}<{{ m.content }}>{% endif %}\n"
        "{%- endfor %}"
    )
    plain = tagged.replace("    {% generation %}\n", "").replace("    {% endgeneration %}\n", "")
    started = datetime(2024, 2, 29, 23, 59)
    found = [
        FolderTokenizer(with_template(tmp_path / name, template), started).chat([ASKED])
        for name, template in (("tagged", tagged), ("plain", plain))
    ]
    assert found == [["29 Feb 2024<What is 3 + 4?>7!\n"]] * 2
    assert FolderTokenizer(FIXTURES / "llama").chat([ASKED])  # without a date given, today's


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }", r"line 2: unexpected '}'"),
        ("\n{% nonsense %}", r"line 2: Encountered unknown tag 'nonsense'"),
        ("{% generation %}{{ 1 }}", r"line 1: Unexpected end of template"),
        ("{{ raise_exception('no\n\x1b[31mroom') }}", r"refuses \[.*\]: no \\x1b\[31mroom$"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"maximum recursion depth exceeded"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not ended after 0.2 s of"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "more than 128 MB",
        ),
        ("{{ 'x' * 10**10 }}", "more than 128 MB"),
        ("{{ 'x' * (10**7 + 1) }}", r"a prompt of 10,000,001 characters, more than 10,000,000"),
    ],
)
def test_a_broken_or_boundless_template_is_one_line(tmp_path, monkeypatch, template, message):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2 if "0.2 s" in message else 5.0)
    monkeypatch.setattr(chat_template, "MEMORY_MB", 128)
    tokenizer = FolderTokenizer(with_template(tmp_path, template))
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.chat([ASKED])
    assert str(caught.value).startswith(f"{tokenizer.folder / 'tokenizer_config.json'}: its chat template refuses ")
    assert str(caught.value).isprintable()


def test_a_template_that_was_ended_renders_the_next_messages(tmp_path):
    tokenizer = FolderTokenizer(
        with_template(tmp_path, "{{ messages[0].content }}{% if messages[1] %}{{ 'x' * 10**10 }}{% endif %}")
    )
    with pytest.raises(ValueError, match="more than 512 MB"):  # among others, and then alone
        tokenizer.chat([ASKED[:1]] * 70 + [ASKED])
    assert tokenizer.chat([ASKED[:1]] * 70) == ["What is 3 + 4?"] * 70
    process = tokenizer._template[1]._process
    del tokenizer
    assert process.wait(20) == 0  # it ends with what asked it


def test_without_jinja_there_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"it needs jinja2: pip install '.*\[train\]'$"):
        FolderTokenizer(FIXTURES / "qwen2").chat([ASKED])


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config", "vocab_size", "320"), ("config", "vocab_size", 0), ("config", "vocab_size", True),
        ("config", "vocab_size", 320.0), ("config", "vocab_size", None), ("config", "eos_token_id", "2"),
        ("generation_config", "eos_token_id", [2, "0"]), ("generation_config", "eos_token_id", {"id": 2}),
        ("generation_config", "eos_token_id", True), ("generation_config", "bos_token_id", 1.0),
        ("generation_config", "pad_token_id", [0]), ("tokenizer_config", "eos_token", 2),
        ("tokenizer_config", "eos_token", {"text": "<|im_end|>"}), ("tokenizer_config", "pad_token", ["<|im_end|>"]),
        ("tokenizer_config", "add_bos_token", "true"), ("tokenizer_config", "chat_template", 7),
        ("tokenizer_config", "chat_template", {"default": ["x"]}),
    ],
)  # fmt: skip
def test_a_value_of_a_wrong_type_is_named(tmp_path, file, key, value):
    folder = folder_of("qwen2", tmp_path, **{{"config": "config", "generation_config": "generation"}.get(
        file, "settings"): {key: value}})  # fmt: skip
    with pytest.raises(ValueError, match=rf"{file}.json: {key}.*(must be|no text)") as caught:
        assert FolderTokenizer(folder).chat
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("templates", [[], ["x"], [{"name": "tool_use", "template": "x"}, {"name": ["default"]}], {}])
def test_a_list_of_templates_without_a_default_is_none(tmp_path, templates):
    assert FolderTokenizer(with_template(tmp_path, templates)).chat is None


@pytest.mark.parametrize("pad", [-1, 320, 2**70])
def test_a_pad_token_outside_the_embeddings_is_the_first_eos(tmp_path, pad):
    folder = folder_of("qwen2", tmp_path, {"pad_token": None}, {"pad_token_id": pad})
    assert FolderTokenizer(folder).pad_id == 2


def test_merges_that_make_the_library_end_the_process_are_named(tmp_path):
    folder = folder_of("qwen2", tmp_path)
    saved = json.loads((folder / "tokenizer.json").read_text())
    for merges in (saved["model"]["merges"], [7], [["a"]], [None], ["a"]):
        saved["model"] |= {"continuing_subword_prefix": "##", "merges": merges}
        (folder / "tokenizer.json").write_text(json.dumps(saved))
        with pytest.raises(ValueError, match=r"tokenizer.json: merge .* lacks continuing_subword_prefix='##'"):
            FolderTokenizer(folder)


def test_text_that_the_tokenizer_has_no_token_for_is_named(tmp_path):
    folder = folder_of("qwen2", tmp_path)
    words = {"type": "WordLevel", "vocab": {"yes": 0, "<|im_end|>": 2}, "unk_token": "none"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    with pytest.raises(ValueError, match=r"qwen2: its tokenizer cannot read 'no': WordLevel error"):
        FolderTokenizer(folder).encode("no")


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file"):
        FolderTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        FolderTokenizer(tmp_path)
    folder = folder_of("llama", tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja: not UTF-8"):
        assert FolderTokenizer(folder).chat
    for broken in (b"\xff", b"[" * 10**5, b"7"):
        (folder / "generation_config.json").write_bytes(broken)
        with pytest.raises(ValueError, match=r"generation_config.json: (broken JSON|not a JSON object)"):
            FolderTokenizer(folder)


def test_importing_the_modules_imports_nothing_heavy():
    code = """
import sys
import cero_jax.tokenizer
assert not {"tokenizers", "jinja2", "jax", "numpy"} & set(sys.modules)
import cero_jax.huggingface.tokenizer
assert not {"tokenizers", "jinja2"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
