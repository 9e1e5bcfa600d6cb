r"""Reward 1 for the right mathematical answer, by math-verify: LaTeX, fractions, sets, intervals, matrices, equations.

The answer stands where it is marked (`cero_jax.rewards.find`: a box, "####", "answer is"); without a mark in the last
line, if it is nothing but a formula, a number or words in bold; without that inside the last $...$ or \(...\). A reason
that follows in the sentence does not count, and formulas side by side ("$1$ and $2$") are one list. The answer is
compared as mathematics with the gold answer: numbers exactly, words as words, the rest as math-verify does. An answer
beyond the limits below is not parsed; any other is parsed by a LaTeX grammar and never executed as code. Some answers
within the limits still take forever, so this verifier must run in a `Pool`, which kills it after a time. Math-verify's
own time limits are off: they work by signals, and call an answer that takes too long wrong.

Math-verify is lenient, and accepts: 50 % as 50 and as 0.5; 0.333333 as 1/3 (six decimals, where one side is a decimal
and the other is not); 5 cm, y = 5 and 8 = 5 as 5 (the right-hand side counts, and no unit); 40 as 40_9 where the gold
answer names the base; 5, 5 as 5; and 1, 2 in either order.
"""

import logging
import math
import re
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from cero_jax.rewards import ERROR, NO_ANSWER, TOO_LONG, Verdict, compared
from cero_jax.rewards.final_number import one_number
from cero_jax.rewards.find import after_thought, between, boxes, find, joined, last_line, without_reason
from cero_jax.rewards.plain import plain
from cero_jax.starting import install

try:
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import nan, zoo
except ImportError as error:
    raise ImportError(f"verifier 'math' needs math-verify: {install('train')}") from error

logging.getLogger("math_verify").setLevel(logging.ERROR)  # silence its warning that its time limits are off

MAX_CHARS = 4096  # only the end of a text without a mark, this long, is searched for a formula
MAX_ANSWER_CHARS = 200  # the longest gold answer of MATH-500 has 53
MAX_DEPTH = 12  # of nested brackets
MAX_DIGITS = 40  # in a row

_MATHS = re.compile(
    r"\$\$((?:\\\$|[^$]){1,400})\$\$|(?<!\\)\$((?:\\\$|[^$\n]){1,400}?)(?<!\\)\$"
    r"|\\\(((?:[^\\]|\\(?!\))){1,400})\\\)|\\\[((?:[^\\]|\\(?!\])){1,400})\\\]"
)
_FORMULA = re.compile(r"\s*(?:\$|\\\(|\\\[)")
_BEGUN = re.compile(r"[^$\\]*[0-9=]")  # an answer before the first formula: "5 and $x = 3$"
_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z]+(?:[ '][A-Za-z]+)*")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_NO_WORDS = re.compile(_TEXT.pattern + r"|\\(?:begin|end)\{[a-z]+\}|\b(?:and|or)\b")
_PLAIN_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_INDIAN = re.compile(r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}")
_UNIT_POWER = re.compile(r"(?:\\(?:text|mbox|mathrm)\{[^{}]*\}|[0-9] ?[a-z]{2,})\s*\^\s*\{?([0-9])\}?$")  # cm^2
_TIME = re.compile(r"[0-9]{1,2}:[0-9]{2}(?![0-9])")  # a ratio to math-verify
_BRACKET = re.compile(r"^\s*(?:\\left)?\s*(\\\{|[(\[])")
_BASE = re.compile(r"[0-9]_\{?([0-9]{1,3})\}?$")
_SIDE_BY_SIDE = re.compile(r"(?<![_^0-9.])[0-9.]+ +[0-9]")  # a product to math-verify: "12 00" would be 0
_DECIMAL = re.compile(r"-?[0-9]*\.[0-9]{6,}")
_IRRATIONAL = re.compile(r"\\(?:pi|sqrt|ln|log|sin|cos|tan)|e\^")
_FOR_MATH_VERIFY = (  # what it would not read, or not as it is meant
    (re.compile(r"(?<=[0-9])[eE]([-+]?[0-9]+)(?![0-9A-Za-z])"), r" \\cdot 10^{\1}"),
    (re.compile(r"(?<![0-9./])([0-9]+) +([0-9]+)/([0-9]+)(?![0-9./])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"\\langle(?![a-z])"), "("),
    (re.compile(r"\\rangle(?![a-z])"), ")"),
    (re.compile(r"(?<=[0-9])\s*\\frac\{\\text\{[^{}]*\}\}\{\\text\{[^{}]*\}\}$"), ""),
    (re.compile(r"(?<![\\A-Za-z{])(pi|ln|log|sin|cos|tan)(?![A-Za-z])"), r"\\\1"),
)
_NOT_A_NUMBER = re.compile(r"[=%(\[<>]")
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"\b({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
# Short to write and huge to compute: long exponents, towers of powers, factorials and binomials of large numbers.
_EXPLOSIVE = re.compile(
    r"\^\s*\{?\s*[-+]?[0-9]{5,}"
    r"|[0-9]\s*\^\s*\{?\s*[0-9]+\s*\^"
    r"|\^\s*\{[^{}]*\^\s*\{[^{}]*\^"
    r"|[0-9]\s*[eE]\s*[-+]?\s*[0-9]{4,}|\([^()]*\^[^()]*\)\s*!"
    r"|[0-9]{4,}\s*\}?\s*!|\^\s*\{?\s*[0-9]+\s*\}?\s*!|!\s*!\s*!|!\s*[)}]\s*!"
    r"|binom[^a-z]{0,20}[0-9]{5,}"
)
_LATEX = [LatexExtractionConfig()]  # not ExprExtractionConfig: it reads an answer as a Python expression


def mathematics(question: str, completion: str, answer: str) -> Verdict:
    """Right where the completion's answer equals the gold answer; an error where that cannot be read.

    It may never return: run it in a `Pool`.
    """
    del question
    gold = read_gold(answer)
    why = unreadable(gold)
    if not why and "####" not in answer and not all(equal(gold, _bare(box)) for box in boxes(answer)):
        why = "stands in boxes that differ: leave one of them"
    if why:
        return Verdict(0.0, ERROR, f"the gold answer {why}")
    given = read_answer(completion)
    if not given:
        return Verdict(0.0, NO_ANSWER)
    if beyond_bounds(given):
        return Verdict(0.0, TOO_LONG, given[:MAX_ANSWER_CHARS])
    return compared(equal(gold, given), given)


@lru_cache(4096)
def unreadable(gold: str) -> str:
    """What is wrong with a gold answer, which no other answer could ever equal; "" where it can be read."""
    if not gold:
        return "is empty"
    if beyond_bounds(gold):
        return f"is too long or too large: at most {MAX_ANSWER_CHARS} characters and {MAX_DIGITS} digits in a row"
    if _INDIAN.fullmatch(gold):
        return "may be a list or one number: write 12, 34, 567 or 1,234,567"
    if _number(gold) is not None or _words(gold):
        return ""
    if len(_PLAIN_WORD.findall(_NO_WORDS.sub("", gold))) >= 3:
        return "is a sentence: leave the answer alone, or mark it as in \\boxed{72}"
    parsed = _parsed(gold) if gold.count("{") == gold.count("}") else []
    if not parsed or isinstance(parsed[0], str) or not verify(parsed, parsed, timeout_seconds=0):
        return "cannot be parsed as LaTeX"
    return "has no value: it divides by zero" if parsed[0].doit().has(nan, zoo) else ""


def warm_up() -> None:
    """Compare an answer of each kind once: math-verify builds its grammar at first use, which takes seconds."""
    for gold, given in (
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \sqrt{2})"),
        (r"[2, \infty) \cup \{1\}", r"x \ge 2"),
        (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ -3 \end{pmatrix}"),
        (r"3 + 4i", r"\sin(x^2) - \log 5"),
    ):
        equal(gold, given)


@lru_cache(4096)  # rollouts of one prompt often give the same answer
def equal(gold: str, given: str) -> bool:
    """Whether two answers are equal: as text, as numbers, as words, or as mathematics."""
    if gold == given:
        return True
    if any(_differ(sign.search(gold), sign.search(given)) for sign in (_BRACKET, _BASE, _UNIT_POWER)):
        return False
    one, other = _number(gold), _number(given)
    if one is not None and other is not None:
        return one == other or _rounds(gold, one, other) or _rounds(given, other, one)
    words, others = _words(gold), _words(given)
    if words and others and max(len(words), len(others)) > 3:
        return words == others
    if (_BASE.search(given) and not _BASE.search(gold)) or (_IRRATIONAL.search(gold) and _few_digits(given, other)):
        return False
    if _TIME.match(gold) or _TIME.match(given):
        one, other = sorted((_time(gold), _time(given)), key=len)
        return other.startswith(one)
    parsed = _parsed(given)
    return bool(parsed) and verify(_parsed(gold), parsed, timeout_seconds=0, allow_set_relation_comp=True)


def read_gold(answer: str) -> str:
    """The gold answer: where it is marked in `answer`, else all of it."""
    place = find(answer)
    return (read_answer(answer) or "") if place else _bare(answer)


def read_answer(text: str) -> str | None:
    """The answer that the module's rule finds; None where it finds none, or an empty one, or an unclosed \\boxed{."""
    place = find(text)
    if place and not place.prose:
        return _bare(place.text) or None
    if place:
        prose = place.text if _FORMULA.match(place.text) else without_reason(place.text)
        formula = "" if _BEGUN.match(prose) else _formulas(prose, 0)
        return _bare(formula or prose) or None
    line = last_line(text)
    if len(line) <= MAX_ANSWER_CHARS and _bare(line) and _stands_alone(line):
        return _bare(_formulas(line, 0) or line)
    return _bare(_formulas(after_thought(text)[-MAX_CHARS:], -1)) or None


def beyond_bounds(answer: str) -> bool:
    """Whether an answer is longer, deeper nested or larger than any real one, so that it must not be parsed."""
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    too_many_digits = re.search(rf"[0-9]{{{MAX_DIGITS + 1}}}", answer)
    return bool(len(answer) > MAX_ANSWER_CHARS or deepest > MAX_DEPTH or too_many_digits or _EXPLOSIVE.search(answer))


def _formulas(text: str, which: int) -> str:
    """The first formula (which = 0) or the last (-1) between dollars or brackets, with those of one list with it."""
    found = list(_MATHS.finditer(text))
    if not found:
        return ""
    lists = [[found[0]]]
    for before, formula in pairwise(found):
        if between(text[before.end() : formula.start()]):
            lists[-1].append(formula)
        else:
            lists.append([formula])
    return joined([next(filter(None, formula.groups())).strip() for formula in lists[which]])


def _stands_alone(line: str) -> bool:
    """Whether a line is an answer and no sentence: one word, a formula, a number and its unit, or all of it bold."""
    bare = _bare(line)
    words = _PLAIN_WORD.findall(_NO_WORDS.sub("", bare))
    bold = re.fullmatch(r"\*\*[^*]+\*\*\.?", line)
    measure = not bare[:1].isalpha() and _number(bare) is not None
    return bool(bold or not words or measure or (_WORDS.fullmatch(bare) and " " not in bare))


def _parsed(answer: str) -> list:
    """What math-verify makes of an answer, with the text as the last item; empty for digits side by side."""
    if _SIDE_BY_SIDE.search(answer):
        return []
    for written, read in _FOR_MATH_VERIFY:
        answer = written.sub(read, answer)
    return parse(rf"\boxed{{{answer}}}", _LATEX, parsing_timeout=0)


def _number(answer: str) -> Fraction | None:
    """The value of an answer that is one plain number, perhaps with a unit, or in millions; None for any other."""
    value = None if _NOT_A_NUMBER.search(answer) else one_number(answer)
    return None if value is None else value * math.prod(_SCALES[word.lower()] for word in _SCALE.findall(answer))


def _rounds(written: str, rounded: Fraction, exact: Fraction) -> bool:
    """Whether `rounded`, which is written as a decimal of six places or more, is `exact`, which has no end, rounded."""
    places = len(written.strip().partition(".")[2]) if _DECIMAL.fullmatch(written.strip()) else 0
    endless = exact.denominator // math.gcd(exact.denominator, 10 ** exact.denominator.bit_length()) > 1
    return bool(places) and endless and abs(rounded) >= Fraction(1, 10) and round(exact, places) == rounded


def _few_digits(written: str, value: Fraction | None) -> bool:
    """Whether a decimal is so small and short that math-verify, which compares six places, would see few digits."""
    return value is not None and "." in written and abs(value) < Fraction(1, 10) and (value * 10**6).denominator == 1


def _words(answer: str) -> str:
    """An answer that is words, in lower case; "" for any other."""
    words = _TEXT.sub(r"\1", answer).strip()
    return words.casefold() if _WORDS.fullmatch(words) else ""


def _time(answer: str) -> str:
    """An answer that is a time of day, as 12:30p."""
    return re.sub("[^0-9:ap]", "", answer.lower())


def _differ(one: re.Match[str] | None, other: re.Match[str] | None) -> bool:
    """Whether both are there and are not the same."""
    return one is not None and other is not None and one[1] != other[1]


def _bare(answer: str) -> str:
    """The answer in plain writing, without the white space, punctuation, dollar signs and stars around it."""
    bare = plain(answer).strip().rstrip(".,;:").strip("*`").strip().strip("$").strip().rstrip(".,;:\\")
    bare = re.sub(r"^(?:\\[(\[]|=|\\therefore(?![a-z]))|\\[)\]]$", "", bare).strip()
    if bare.endswith("}") and bare.count("}") > bare.count("{"):  # of \textbf{Answer: 5}
        bare = bare[:-1].strip()
    return bare[1:-1].strip() if re.fullmatch(r"\{[^{}]*\}", bare) else bare
