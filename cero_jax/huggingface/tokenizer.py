"""The tokenizer and the chat template of a Hugging Face model folder.

The packages `tokenizers` and `jinja2` are imported when a FolderTokenizer first needs them.
"""

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path

from cero_jax.huggingface.families import read_json
from cero_jax.tokenizer import text_ids


class FolderTokenizer:
    """The tokenizer of a Hugging Face model folder: its tokenizer.json, run by the `tokenizers` library.

    Raises FileNotFoundError where tokenizer.json or config.json is missing, ValueError where a file is broken or no
    end-of-sequence token is named.
    """

    def __init__(self, folder: str | Path):
        from tokenizers import Tokenizer as Backend

        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file: the folder must hold a tokenizer in this format")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"{path}: not a tokenizer ({error}): download it again") from error
        model = read_json(self.folder / "config.json")
        stops, self._settings = (
            read_json(self.folder / name) if (self.folder / name).is_file() else {}
            for name in ("generation_config.json", "tokenizer_config.json")
        )
        self.vocab_size: int = model["vocab_size"]  # rows of the embedding table: often more than there are tokens
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
        self.pad_id: int = self.eos_ids[0] if pad is None else pad
        """The first eos where the folder names no pad token; padding is known by lengths, never by this id."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, after a BOS if the folder's tokenizer adds one and `text` does not already begin with it.

        Raises ValueError for a token whose id is not below vocab_size.
        """
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self._adds_bos and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        if max(ids, default=0) >= self.vocab_size:
            raise ValueError(
                f"{text!r} holds a token of id {max(ids)}, but the model has vocab_size={self.vocab_size}: take "
                "tokenizer.json and config.json from the same model"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first eos. Special tokens and ids without a token add nothing to it."""
        return self._backend.decode(text_ids(ids, self), skip_special_tokens=True)

    @property
    def chat(self) -> Callable[[list[dict[str, str]]], str] | None:
        """Renders messages, each {"role": ..., "content": ...}, by the folder's chat template; None: it has none.

        The function raises ValueError where the template refuses the messages.
        """
        return None if self._template is None else self._render

    def _render(self, messages: list[dict[str, str]]) -> str:
        tokens = {name: self._token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        tokens = {name: token for name, token in tokens.items() if token is not None}
        assert self._template is not None
        try:
            return self._template(messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens)
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"{self.folder}: its chat template refuses {messages!r}: {error}") from error

    @cached_property
    def _template(self) -> Callable[..., str] | None:
        """The template's render function, None without one. A template is untrusted, so it runs in Jinja's sandbox.

        Whitespace, filters and functions are set as transformers sets them.
        """
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        path = self.folder / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else self._settings.get("chat_template")
        if isinstance(source, list):  # several templates, each with a name
            source = {each["name"]: each["template"] for each in source}.get("default")
        if source is None:
            return None

        def raise_exception(message: str):
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(source).render

    def _token(self, name: str) -> str | None:
        """The text of a token that tokenizer_config.json names, as a string or as an object with key "content"."""
        token = self._settings.get(name)
        return token["content"] if isinstance(token, dict) else token

    def _special(self, name: str, otherwise: int | None) -> int | None:
        """The id of a token that tokenizer_config.json names; `otherwise` where it names none."""
        token = self._token(name)
        return otherwise if token is None else self._backend.token_to_id(token)
