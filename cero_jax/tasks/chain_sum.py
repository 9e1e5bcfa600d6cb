"""Chain sums: the embedded task, which needs no download and spans solved to hopeless, as real data does.

A question is a row of digits in a field of fixed width and "=", its answer the running sums modulo 10, a digit each:
"3141....................=" -> "3489". (The width is what makes it quick to learn: a digit then stands equally far from
its sum in every row. With the "=" right behind the row, a 2-layer policy was still near chance after 2,000 steps.)
Demonstrations are noisy, so that a policy warm-started on them succeeds less the longer the row.
"""

from dataclasses import dataclass

import numpy as np

from cero_jax.data import Prompts, Task, encode_prompts
from cero_jax.rewards.exact import exact
from cero_jax.settings import check
from cero_jax.tokenizer import AlphabetTokenizer, Tokenizer

EASY = (2, 4)  # digits of the shortest and longest row
HARD = (8, 24)
BANDS = ((2, 4), (8, 12), (13, 18), (19, 24))  # the labels of a report
MAX_PROMPT_TOKENS = HARD[1] + 1  # a row and "="

_STREAM = 2  # keeps these draws apart from other uses of the same seed


@dataclass(frozen=True)
class ChainSum:
    """Running sums modulo 10 of a row of digits, some of them with a wrong gold answer."""

    num_prompts: int = 512
    """Training prompts, all distinct."""
    easy_share: float = 0.5
    """Share of the training prompts, right and wrong alike, with 2 to 4 digits; the rest have 8 to 24."""
    wrong_share: float = 0.4
    """Share of the training prompts, easy and hard alike, whose gold answer is wrong: no rollout can solve them."""
    num_heldout: int = 256
    """Held-out prompts, half of them easy, all with right answers, none of them a training prompt."""
    demonstration_error_rate: float = 0.15
    """Probability that a step of a demonstration is wrong; the sum goes on from the digit written."""

    def build(self, seed: int, tokenizer: Tokenizer | None = None) -> Task:
        """Draw the task: a function of these settings and `seed`.

        Raises ValueError on a setting out of range, and for a tokenizer: this task has an alphabet of its own.
        """
        if tokenizer is not None:
            raise ValueError(
                "ChainSum has a tokenizer of its own and cannot use the model folder's: give the run a task of text, "
                "like Dataset, or no model_folder"
            )
        self._check()
        rng = np.random.default_rng((seed, _STREAM))
        tokenizer = AlphabetTokenizer("0123456789.=")
        easy, heldout_easy = round(self.easy_share * self.num_prompts), self.num_heldout // 2
        short = _distinct_rows(rng, EASY, easy + heldout_easy)
        long = _distinct_rows(rng, HARD, self.num_prompts - easy + self.num_heldout - heldout_easy)

        wrong_easy = round(self.wrong_share * easy)
        wrong_hard = round(self.wrong_share * self.num_prompts) - wrong_easy
        rows = short[:easy] + long[: self.num_prompts - easy]
        wrong = [i < wrong_easy or easy <= i < easy + wrong_hard for i in range(self.num_prompts)]
        answers = [_wrong_sums(rng, row) if bad else running_sums(row) for row, bad in zip(rows, wrong, strict=True)]
        labels = ["wrong gold" if bad else _band(row) for row, bad in zip(rows, wrong, strict=True)]
        order = rng.permutation(self.num_prompts)  # an id says nothing of the prompt

        def encode(rows, answers, labels) -> Prompts:
            return encode_prompts([question(row) for row in rows], answers, labels, tokenizer, MAX_PROMPT_TOKENS)

        heldout = short[easy:] + long[self.num_prompts - easy :]
        return Task(
            train=encode(*([column[i] for i in order] for column in (rows, answers, labels))),
            heldout=encode(heldout, [running_sums(row) for row in heldout], [_band(row) for row in heldout]),
            tokenizer=tokenizer,
            verify=exact,
            demonstrations=_demonstrations(frozenset(heldout), self.demonstration_error_rate),
        )

    def _check(self):
        check(self)
        for name in ("easy_share", "wrong_share", "demonstration_error_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 0..1")
        for name in ("num_prompts", "num_heldout"):
            if not 1 <= getattr(self, name) <= 10**7:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, and at most {10**7}")
        easy = round(self.easy_share * self.num_prompts) + self.num_heldout // 2
        there_are = sum(10**length for length in range(EASY[0], EASY[1] + 1))
        if easy > there_are:
            raise ValueError(
                f"{easy} distinct rows of 2 to 4 digits are asked for and {there_are:,} exist: "
                f"lower num_prompts={self.num_prompts}, easy_share={self.easy_share} or num_heldout={self.num_heldout}"
            )


def question(row: str) -> str:
    """The prompt of a row of digits."""
    return row.ljust(HARD[1], ".") + "="


def running_sums(row: str) -> str:
    """The right answer: "3141" -> "3489"."""
    return _text(np.cumsum(_digits(row)) % 10)


def _wrong_sums(rng: np.random.Generator, row: str) -> str:
    """The sums of some other row of this length: no digit right, and none that follows from the digit before.

    The second keeps off what a policy writes after a slip, when it goes on from the wrong digit.
    """
    sums, before = [], 0
    for digit, right in zip(_digits(row), _digits(running_sums(row)), strict=True):
        before = rng.choice([d for d in range(10) if d not in (right, (before + digit) % 10)])
        sums.append(before)
    return _text(np.array(sums))


def _distinct_rows(rng: np.random.Generator, lengths: tuple[int, int], count: int) -> list[str]:
    """`count` rows, no two alike, their lengths uniform, in random order.

    A row drawn before is drawn again, length and all: so two digits, of which there are 100 rows, are somewhat rarer.
    """
    rows = {}
    while len(rows) < count:
        length = rng.integers(lengths[0], lengths[1] + 1)
        rows[_text(rng.integers(0, 10, length))] = None  # a dict keeps the order of drawing, a set would not
    drawn = list(rows)
    return [drawn[i] for i in rng.permutation(count)]  # the early draws hold more of the short rows


def _demonstrations(heldout: frozenset[str], error_rate: float):
    """A drawer of noisy demonstrations with 2 to 24 digits, lengths uniform, held-out rows left out."""

    def demonstrations(rng: np.random.Generator, batch_size: int) -> tuple[list[str], list[str]]:
        questions, completions = [], []
        while len(questions) < batch_size:
            lengths = rng.integers(EASY[0], HARD[1] + 1, batch_size)
            digits = rng.integers(0, 10, (batch_size, HARD[1]))
            slips = rng.integers(1, 10, digits.shape) * (rng.random(digits.shape) < error_rate)
            written = np.cumsum(digits + slips, axis=1) % 10  # a slip stays in the sum: it goes on from what is written
            for length, row, sums in zip(lengths, digits, written, strict=True):
                if (text := _text(row[:length])) not in heldout:
                    questions.append(question(text))
                    completions.append(_text(sums[:length]))
        return questions[:batch_size], completions[:batch_size]

    return demonstrations


def _band(row: str) -> str:
    low, high = next(band for band in BANDS if band[0] <= len(row) <= band[1])
    return f"length {low}-{high}"


def _digits(row: str) -> np.ndarray:
    return np.frombuffer(row.encode("ascii"), np.uint8).astype(int) - ord("0")


def _text(digits: np.ndarray) -> str:
    return (digits + ord("0")).astype(np.uint8).tobytes().decode("ascii")
