"""Prompts by id, the task that they belong to, and the order in which an epoch visits them."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from cero_jax.rewards import Verifier, VerifyMany
from cero_jax.tokenizer import Tokenizer


class Prompts(NamedTuple):
    """N prompts; a prompt's id is its place. Tp: max_prompt_tokens."""

    questions: tuple[str, ...]  # [N] exactly the text that `tokens` encode
    answers: tuple[str, ...]  # [N] gold answers, as the verifier takes them
    tokens: np.ndarray  # [N, Tp] int32, left-padded with pad_id
    lengths: np.ndarray  # [N] int32 in 1..Tp, tokens
    labels: tuple[str, ...]  # [N] what a report groups by; "all" where the task knows nothing


class Task(NamedTuple):
    """What a run learns from and is judged on."""

    train: Prompts
    heldout: Prompts
    tokenizer: Tokenizer
    verify: Verifier | None = None  # one completion at a time; or else `verify_many`
    # (rng, number) -> questions exactly as in a prompt, completions without eos: for a supervised warm start
    demonstrations: Callable[[np.random.Generator, int], tuple[list[str], list[str]]] | None = None
    verify_many: VerifyMany | None = None  # many at a time; or else `verify`


@runtime_checkable
class TaskConfig(Protocol):
    """What the `task` of a config may be: any frozen dataclass of settings that knows how to build its task."""

    def build(self, seed: int, tokenizer: Tokenizer | None = None) -> Task:
        """The task, a pure function of the settings, `seed` and the tokenizer: a resumed run builds it again.

        tokenizer: the model folder's; None: the task brings its own. Raises ValueError where it cannot use it, or for
        settings that make no sense, before any work is done.
        """
        ...


def encode_prompts(
    questions: Sequence[str],
    answers: Sequence[str],
    labels: Sequence[str],
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    sources: Sequence[str] | None = None,
    drop_long: bool = False,
) -> Prompts:
    """Tokenize N questions to rows of `max_prompt_tokens` tokens, padded on the left.

    sources: where each row came from ("file:line"), for the message; by default its place.
    drop_long: leave out the prompts longer than `max_prompt_tokens`: fewer than N come back.
    Raises ValueError at an empty prompt, or, without drop_long, one longer than `max_prompt_tokens`.
    """
    encoded = [tokenizer.encode(question) for question in questions]
    if drop_long:
        kept = [i for i, ids in enumerate(encoded) if len(ids) <= max_prompt_tokens]
        encoded = [encoded[i] for i in kept]
        questions, answers, labels = ([column[i] for i in kept] for column in (questions, answers, labels))
        sources = [sources[i] for i in kept] if sources else None
    tokens = np.full((len(questions), max_prompt_tokens), tokenizer.pad_id, np.int32)
    lengths = np.zeros(len(questions), np.int32)
    for i, ids in enumerate(encoded):
        if not 1 <= len(ids) <= max_prompt_tokens:
            where = sources[i] if sources else f"prompt {i}"
            mend = f"raise max_prompt_tokens to {len(ids)} or more, or drop the row" if ids else "give it text"
            raise ValueError(f"{where}: a prompt of {len(ids)} tokens, max_prompt_tokens={max_prompt_tokens}: {mend}")
        tokens[i, max_prompt_tokens - len(ids) :] = ids
        lengths[i] = len(ids)
    return Prompts(tuple(questions), tuple(answers), tokens, lengths, tuple(labels))


def prompts_hash(prompts: Prompts) -> str:
    """Sha256 (hex) of the ordered questions, answers and tokens: a resume on other prompts is refused by it."""
    digest, texts = hashlib.sha256(), (*prompts.questions, *prompts.answers)
    for start in range(0, len(texts), _HASHED_AT_ONCE):
        encoded = [text.encode("utf-8") for text in texts[start : start + _HASHED_AT_ONCE]]
        # the length keeps "ab", "c" apart from "a", "bc"
        digest.update(b"".join(part for each in encoded for part in (len(each).to_bytes(8, "little"), each)))
    digest.update(repr(prompts.tokens.shape).encode())
    digest.update(np.ascontiguousarray(prompts.tokens, "<i4").data)
    return digest.hexdigest()


def epoch_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the prompts: [N] int, a permutation of their ids, by (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch, _ORDER_STREAM)).permutation(num_prompts)


_HASHED_AT_ONCE = 10_000  # texts, so that no copy of all of them is made
_ORDER_STREAM = 1  # keeps the orders apart from the tasks' own draws under the same seed
