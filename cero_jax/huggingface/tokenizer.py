"""The tokenizer and the chat template of a Hugging Face model folder.

The packages `tokenizers` and `jinja2` are imported when a FolderTokenizer first needs them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from cero_jax.huggingface.chat_template import ChatTemplate
from cero_jax.huggingface.families import read_json, what_it_must_be
from cero_jax.terminal import one_line
from cero_jax.tokenizer import text_ids

RENDERED_AT_ONCE = 64  # conversations


class FolderTokenizer:
    """The tokenizer of a Hugging Face model folder: its tokenizer.json, run by the `tokenizers` library.

    started: what a chat template that asks for the time is told; None: now. A resumed run gives that of its start, or
    its prompts would be others tomorrow.

    Raises FileNotFoundError where tokenizer.json or config.json is missing, ValueError where a file is broken, a value
    in it is of a wrong type, or no end-of-sequence token is named.
    """

    def __init__(self, folder: str | Path, started: datetime | None = None):
        self.folder = Path(folder)
        self._started = started or datetime.now()
        self._backend = _backend(self.folder / "tokenizer.json")
        model = self._read("config.json")
        self.vocab_size: int = model.get("vocab_size")  # type: ignore[assignment] (checked now)
        """Rows of the embedding table: often more than there are tokens."""
        if must_be := what_it_must_be("vocab_size", self.vocab_size):
            raise ValueError(f"{self.folder / 'config.json'}: vocab_size={self.vocab_size!r:.80} must be {must_be}")
        stops = self._read("generation_config.json", optional=True)
        self._settings = self._read("tokenizer_config.json", optional=True)
        self._bos = self._special("bos_token", stops.get("bos_token_id", model.get("bos_token_id")))
        adds_bos = self._backend.encode("").ids[:1] == [self._bos]
        self._adds_bos = self._bos is not None and (adds_bos or self._settings.get("add_bos_token") is True)
        listed = stops.get("eos_token_id", model.get("eos_token_id"))
        eos = [*(listed if isinstance(listed, list) else [listed]), self._special("eos_token", None)]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in eos if i is not None))
        """The ids listed in generation_config.json (else in config.json), then tokenizer_config.json's eos_token."""
        if not self.eos_ids or not all(0 <= i < self.vocab_size for i in self.eos_ids):
            raise ValueError(
                f"{self.folder}: end-of-sequence ids {self.eos_ids}: at least one, each under vocab_size="
                f"{self.vocab_size}, must be in generation_config.json, config.json or tokenizer_config.json: add it"
            )
        pad = self._special("pad_token", stops.get("pad_token_id", model.get("pad_token_id")))
        # Some folders name a pad token that was added after the embedding table, and some say -1 for none.
        self.pad_id: int = self.eos_ids[0] if pad is None or not 0 <= pad < self.vocab_size else pad
        """The first eos where the folder names no pad token; padding is known by lengths, never by this id."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, after a BOS if the folder's tokenizer adds one and `text` does not already begin with it.

        Raises ValueError for text that the tokenizer has no tokens for, or one whose id is not below vocab_size.
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises no narrower class
            raise ValueError(
                f"{self.folder}: its tokenizer cannot read {text[:80]!r}: {one_line(str(error))}"
            ) from error
        if self._adds_bos and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        if max(ids, default=0) >= self.vocab_size:
            raise ValueError(
                f"{text[:200]!r} holds a token of id {max(ids)}, but the model has vocab_size={self.vocab_size}: take "
                "tokenizer.json and config.json from the same model"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first eos. Special tokens and ids without a token add nothing to it."""
        return self._backend.decode(text_ids(ids, self), skip_special_tokens=True)

    @property
    def chat(self) -> Callable[[Sequence[list[dict[str, str]]]], list[str]] | None:
        """Renders conversations, each messages {"role": ..., "content": ...}, by the folder's chat template, if any.

        Raises ValueError where what is there is no template; the function where it is broken, refuses messages, or
        takes too long or too much memory.
        """
        return None if self._template is None else self._render

    def _render(self, conversations: Sequence[list[dict[str, str]]]) -> list[str]:
        assert self._template is not None
        (source, template), prompts = self._template, []
        for start in range(0, len(conversations), RENDERED_AT_ONCE):
            some = conversations[start : start + RENDERED_AT_ONCE]
            try:
                prompts += template(some)
            except ValueError as error:
                if len(conversations) == 1:
                    shown = one_line(repr(some[0]), 200)
                    raise ValueError(f"{source}: its chat template refuses {shown}: {one_line(str(error))}") from None
                for each in some:  # which it was, and whether it is one alone
                    prompts += self._render([each])
        return prompts

    @cached_property
    def _template(self) -> tuple[Path, ChatTemplate] | None:
        """The file that holds the folder's chat template, and what renders it; None without one."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            try:
                source = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 ({error}): download it again") from error
        else:
            path, source = self.folder / "tokenizer_config.json", self._settings.get("chat_template")
        if isinstance(source, list):  # several templates, each with a name
            named = [each for each in source if isinstance(each, dict)]
            source = {each.get("name"): each.get("template") for each in named if isinstance(each.get("name"), str)}
        if isinstance(source, dict):
            source = source.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"{path}: chat_template is {source!r:.80}, no text: download it again")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: token for name in names if (token := self._token(name)) is not None}
        return path, ChatTemplate(source, tokens, self._started)

    def _read(self, name: str, optional: bool = False) -> dict[str, Any]:
        """The object in a file of the folder; {} where it need not be there. Raises ValueError where an id is none."""
        path = self.folder / name
        if optional and not path.is_file():
            return {}
        content = read_json(path)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = content.get(key)
            ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
            if not all(each is None or _is_whole(each) for each in ids):
                raise ValueError(f"{path}: {key}={value!r:.80} must be the id of a token, a whole number: correct it")
        if not isinstance(content.get("add_bos_token", False), bool | None):
            raise ValueError(
                f"{path}: add_bos_token={content['add_bos_token']!r:.80} must be true or false: correct it"
            )
        return content

    def _token(self, name: str) -> str | None:
        """The text of a token that tokenizer_config.json names, as a string or as an object with key "content"."""
        token = self._settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if token is None or isinstance(text, str):
            return text
        raise ValueError(
            f"{self.folder / 'tokenizer_config.json'}: {name}={token!r:.80} must be text, or an object that "
            "holds it as content: correct it"
        )

    def _special(self, name: str, otherwise: int | None) -> int | None:
        """The id of a token that tokenizer_config.json names; `otherwise` where it names none."""
        token = self._token(name)
        return otherwise if token is None else self._backend.token_to_id(token)


def _backend(path: Path) -> Any:
    """The tokenizer in a tokenizer.json, without what its last user had switched on: every prompt whole and alike."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: the folder must hold a tokenizer in this format")
    _check_merges(path)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{path}: not a tokenizer ({one_line(str(error))}): download it again") from error
    backend.no_truncation()
    backend.no_padding()
    if (
        getattr(backend.model, "dropout", None) is not None
    ):  # of merges, at random: no text would have the same ids twice
        backend.model.dropout = None
    return backend


def _check_merges(path: Path) -> None:
    """Raise ValueError at merges without the prefix of what continues a word: the library ends the process at them."""
    if not re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', path.read_bytes()):
        return
    model = read_json(path).get("model")
    prefix, merges = (
        (model.get(key) for key in ("continuing_subword_prefix", "merges")) if isinstance(model, dict) else ("", ())
    )
    for merge in merges if isinstance(merges, list) else ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(parts, list) and len(parts) == 2 and str(parts[1]).startswith(str(prefix))):
            raise ValueError(
                f"{path}: merge {merge!r:.80} lacks continuing_subword_prefix={prefix!r:.80}: download it again"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
