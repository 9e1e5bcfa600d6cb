"""Prompts by id, the task that they belong to, and the order in which an epoch visits them."""

import hashlib
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, combinations
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from cero_jax.rewards import Verifier, VerifyMany
from cero_jax.tokenizer import Tokenizer


class Prompts(NamedTuple):
    """N prompts; a prompt's id is its place. Their tokens are stored behind each other, so none is padded."""

    questions: tuple[str, ...]  # [N] exactly the text that `tokens` encode
    answers: tuple[str, ...]  # [N] gold answers, as the verifier takes them
    tokens: np.ndarray  # [all] int32, of all prompts: prompt i has tokens[offsets[i] : offsets[i + 1]]
    offsets: np.ndarray  # [N + 1] int64, rising from 0
    labels: tuple[str, ...]  # [N] what a report groups by; "all" where the task knows nothing
    longest: int  # tokens of the longest prompt, at least 1: Tp, the width that rows of any of them fit
    pass_rates: np.ndarray | None = None  # [N] float32, share of another model's rollouts that was right; NaN: unknown

    @property
    def lengths(self) -> np.ndarray:
        """[N] int32 >= 1, tokens of each prompt."""
        return np.diff(self.offsets).astype(np.int32)

    def rows(self, ids: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The prompts `ids` [R] as rows: tokens [R, width] int32 with zeros behind them, and their lengths [R] int32.

        width: at least the longest of these has.
        """
        start, lengths = self.offsets[ids], (self.offsets[np.add(ids, 1)] - self.offsets[ids]).astype(np.int32)
        place = np.arange(width)
        tokens = self.tokens[np.minimum(start[:, None] + place, len(self.tokens) - 1)]
        return np.where(place < lengths[:, None], tokens, 0).astype(np.int32), lengths


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
    max_prompt_tokens: int | None = None,
    sources: Sequence[str] | None = None,
    drop_long: bool = False,
    pass_rates: Sequence[float] | None = None,
) -> Prompts:
    """Tokenize N questions.

    max_prompt_tokens: of one prompt; None: no limit.
    sources: where each row came from ("file:line"), for the message; by default its place.
    drop_long: leave out the prompts longer than `max_prompt_tokens`: fewer than N come back.
    pass_rates: N, where they are known at all; NaN where one is not.
    Raises ValueError at an empty prompt, or, without drop_long, one longer than `max_prompt_tokens`.
    """
    encoded = [tokenizer.encode(question) for question in questions]
    limit = max(map(len, encoded), default=1) if max_prompt_tokens is None else max_prompt_tokens
    if drop_long:
        kept = [i for i, ids in enumerate(encoded) if len(ids) <= limit]
        encoded = [encoded[i] for i in kept]
        questions, answers, labels = ([column[i] for i in kept] for column in (questions, answers, labels))
        sources = [sources[i] for i in kept] if sources else None
        pass_rates = [pass_rates[i] for i in kept] if pass_rates is not None else None
    for i, ids in enumerate(encoded):
        if not 1 <= len(ids) <= limit:
            where = sources[i] if sources else f"prompt {i}"
            mend = f"raise max_prompt_tokens to {len(ids)} or more, or drop the row" if ids else "give it text"
            raise ValueError(f"{where}: a prompt of {len(ids)} tokens, max_prompt_tokens={limit}: {mend}")
    offsets = np.fromiter(accumulate(map(len, encoded), initial=0), np.int64, len(encoded) + 1)
    tokens = np.fromiter(chain.from_iterable(encoded), np.int32, offsets[-1])
    longest = max(map(len, encoded), default=1)
    rates = None if pass_rates is None else np.array(pass_rates, np.float32)
    return Prompts(tuple(questions), tuple(answers), tokens, offsets, tuple(labels), longest, rates)


def prompts_hash(prompts: Prompts) -> str:
    """Sha256 (hex) of the ordered questions, answers, tokens and pass rates: a resume on others is refused by it."""
    digest, texts = hashlib.sha256(), (*prompts.questions, *prompts.answers)
    for start in range(0, len(texts), _HASHED_AT_ONCE):
        encoded = [text.encode("utf-8") for text in texts[start : start + _HASHED_AT_ONCE]]
        # the length keeps "ab", "c" apart from "a", "bc"
        digest.update(b"".join(part for each in encoded for part in (len(each).to_bytes(8, "little"), each)))
    digest.update(np.ascontiguousarray(prompts.offsets, "<i8").data)
    digest.update(np.ascontiguousarray(prompts.tokens, "<i4").data)
    if prompts.pass_rates is not None:
        digest.update(np.ascontiguousarray(prompts.pass_rates, "<f4").data)
    return digest.hexdigest()


def prompt_widths(lengths: np.ndarray, completion_tokens: int) -> tuple[int, ...]:
    """The few widths that prompts are padded to, rising; every program that reads prompts is compiled for each.

    One to three of the lengths, the longest among them: those that pad the data least, and one more only where it
    spares a tenth of what a row is long. What is read at once is as wide as its longest, so half of the weight lies on
    single prompts, half on the longest of eight.

    lengths: [N] int, tokens of the prompts. completion_tokens: that a row has behind its prompt, at most.
    """
    levels, counts = np.unique(lengths, return_counts=True)
    share = np.cumsum(counts) / len(lengths)  # of the prompts that are no longer
    share = (share + share**8) / 2
    few = np.unique(np.searchsorted(share, np.linspace(0, 1, 65)[1:] - 1e-9))  # 64 levels, as much between each two
    levels, share = levels[few], share[few]

    def padded(chosen: tuple[int, ...]) -> float:
        below = np.diff(share[list(chosen)], prepend=0.0)
        return float(below @ (levels[list(chosen)] + completion_tokens))

    last = len(levels) - 1
    best = (last,)
    for more in (1, 2):
        chosen = min(((*some, last) for some in combinations(range(last), more)), key=padded, default=best)
        if padded(chosen) > 0.9 * padded(best):
            break
        best = chosen
    return tuple(levels[list(best)].tolist())


def epoch_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the prompts: [N] int, a permutation of their ids, by (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch, _ORDER_STREAM)).permutation(num_prompts)


_HASHED_AT_ONCE = 10_000  # texts, so that no copy of all of them is made
_ORDER_STREAM = 1  # keeps the orders apart from the tasks' own draws under the same seed
