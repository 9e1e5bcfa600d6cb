"""Text to ids and back: what a run needs of a tokenizer, one for any text, and one for the embedded task."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What the job needs of a tokenizer. A model may stop at several end-of-sequence ids."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, pad and eos included."""
        ...

    @property
    def pad_id(self) -> int:
        """The id that fills a row up; it never stands for text."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a completion; the first is the one to train on."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an eos."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first eos, pad skipped."""
        ...

    @property
    def chat(self) -> Callable[[Sequence[list[dict[str, str]]]], list[str]] | None:
        """Renders conversations, each messages {"role": ..., "content": ...}, as prompts; None: without a template."""
        ...


class ByteTokenizer:
    """UTF-8 bytes 0..255, then pad (256) and eos (257): any text, nothing to download."""

    vocab_size = 258
    pad_id = 256
    eos_ids = (257,)
    chat = None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, one a byte."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8, which a policy may well sample, become U+FFFD."""
        return bytes(text_ids(ids, self)).decode("utf-8", errors="replace")


class AlphabetTokenizer:
    """Pad 0, eos 1, then one id for each character of `alphabet`, in its order."""

    pad_id = 0
    eos_ids = (1,)
    chat = None

    def __init__(self, alphabet: str):
        if len(set(alphabet)) != len(alphabet) or not alphabet:
            raise ValueError(f"alphabet={alphabet!r} must hold at least one character and none twice")
        self.alphabet = alphabet
        self.vocab_size = 2 + len(alphabet)
        self._ids = {character: 2 + i for i, character in enumerate(alphabet)}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises ValueError at a character outside the alphabet."""
        for character in text:
            if character not in self._ids:
                raise ValueError(f"character {character!r} in {text!r} is not in the alphabet {self.alphabet!r}")
        return [self._ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first eos, pad skipped."""
        return "".join(self.alphabet[i - 2] for i in text_ids(ids, self))


class EndsAlsoAt:
    """A tokenizer whose completions end at more ids than they did: at the end of a line, say."""

    def __init__(self, tokenizer: Tokenizer, ids: Iterable[int]):
        self._tokenizer = tokenizer
        self.vocab_size, self.pad_id, self.chat = tokenizer.vocab_size, tokenizer.pad_id, tokenizer.chat
        self.eos_ids = tuple(dict.fromkeys((*ids, *tokenizer.eos_ids)))

    def encode(self, text: str) -> list[int]:
        """As the tokenizer does."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """As the tokenizer does, up to the first of all ends."""
        return self._tokenizer.decode(text_ids(ids, self))


def text_ids(ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """`ids` up to the first eos, without pad. Raises ValueError outside the vocabulary."""
    kept = []
    for i in map(int, ids):
        if not 0 <= i < tokenizer.vocab_size:
            raise ValueError(f"id {i} is outside the vocabulary of {tokenizer.vocab_size} ids")
        if i in tokenizer.eos_ids:
            break
        if i != tokenizer.pad_id:
            kept.append(i)
    return kept
