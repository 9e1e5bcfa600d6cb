r"""Reward 1 for the right mathematical answer, by math-verify: LaTeX, fractions, sets, intervals, matrices, equations.

The answer is what stands inside the last \boxed{}, else on the line behind the last "####", else behind the last
"answer is" or "answer:", else inside the last $...$; it is compared as mathematics with the gold answer. What is read
is cut and bounded before it is parsed, by a grammar and not as code; still some of it takes for ever, so this runs in
a `Pool` only, with math-verify's own time limits off: they are signals, and turn "too slow" into "wrong".

What math-verify lets pass, to know of it: 50 % as 50 and as 0.5, 0.333333 as 1/3 (six decimals, where one side is a
decimal), 5 cm and y = 5 and 8 = 5 as 5 (the right-hand side counts), 5, 5 as 5, and 1, 2 in either order.
"""

import logging
import re
from functools import lru_cache

from cero_jax.rewards import NO_ANSWER, TOO_LONG, Verdict, compared

try:
    from math_verify import LatexExtractionConfig, parse, verify
except ImportError as error:
    raise ImportError("verifier 'math' needs math-verify: pip install 'cero_jax[train]'") from error

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off

MAX_CHARS = 4096  # of the text that is searched
MAX_ANSWER_CHARS = 200  # the longest gold answer of MATH-500 has 53
MAX_DEPTH = 12  # of brackets
MAX_DIGITS = 40  # in a row

_PHRASE = re.compile(r"answer(?: is|:)(?:\*\*)?[ \t:]*([^\n]{1,400})", re.IGNORECASE)
_MATHS = re.compile(r"\$([^$\n]{1,400})\$")
_INTEGER = re.compile(r"-?[0-9]{1,40}")
# small to write and huge to compute: long exponents, towers of powers, factorials and binomials of large numbers
_EXPLOSIVE = re.compile(
    r"\^\s*\{?\s*[-+]?[0-9]{5,}"
    r"|[0-9]\s*\^\s*\{?\s*[0-9]+\s*\^"
    r"|\^\s*\{[^{}]*\^\s*\{[^{}]*\^"
    r"|[0-9]\s*[eE]\s*[-+]?\s*[0-9]{4,}|\([^()]*\^[^()]*\)\s*!"
    r"|[0-9]{4,}\s*\}?\s*!|\^\s*\{?\s*[0-9]+\s*\}?\s*!|!\s*!\s*!|!\s*[)}]\s*!"
    r"|binom[^a-z]{0,20}[0-9]{5,}"
)
_LATEX = [LatexExtractionConfig()]  # no plain expressions: math-verify reads those as Python


def mathematics(question: str, completion: str, answer: str) -> Verdict:
    """Right where the answer read equals the gold one. May never return: see above."""
    del question
    given, gold = read_answer(completion), read_gold(answer)
    if not given:
        return Verdict(0.0, NO_ANSWER)
    if beyond_bounds(given):
        return Verdict(0.0, TOO_LONG, given[:MAX_ANSWER_CHARS])
    return compared(equal(gold, given), given)


def warm_up() -> None:
    """Answers of the kinds there are: the grammar's tables are built at first use, which takes seconds."""
    for gold, given in (
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \sqrt{2})"),
        (r"[2, \infty) \cup \{1\}", r"x \ge 2"),
        (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ -3 \end{pmatrix}"),
        (r"3 + 4i", r"\sin(x^2) - \log 5"),
    ):
        equal(gold, given)


@lru_cache(4096)  # the rollouts of a group often agree
def equal(gold: str, given: str) -> bool:
    """Whether two answers are one: to the letter, as integers, or as mathematics."""
    if gold == given:
        return True
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(given):
        return int(gold) == int(given)
    parsed = parse(rf"\boxed{{{given}}}", _LATEX, parsing_timeout=0)
    if not parsed:
        return False
    return verify(parse(rf"\boxed{{{gold}}}", _LATEX, parsing_timeout=0), parsed, timeout_seconds=0)


def read_gold(answer: str) -> str:
    """The gold answer: as in a completion where it is marked there, else the whole text."""
    marked = "\\boxed{" in answer or "####" in answer
    return (read_answer(answer) if marked else None) or _bare(answer)


def read_answer(text: str) -> str | None:
    """The answer by the rule above; None where there is none, an empty one and a \\boxed{} never closed among it."""
    tail = text[-MAX_CHARS:]
    start = max(tail.rfind("\\boxed{"), tail.rfind("\\fbox{"))
    if start >= 0:
        return _bare(_braces(tail, tail.index("{", start))) or None
    if "####" in tail:
        return _bare(tail.rpartition("####")[2].strip().partition("\n")[0]) or None
    found = _PHRASE.findall(tail)
    if found:
        inside = _MATHS.search(found[-1])
        return _bare(inside[1] if inside else found[-1]) or None
    found = _MATHS.findall(tail)
    return (_bare(found[-1]) or None) if found else None


def beyond_bounds(answer: str) -> bool:
    """Whether an answer is longer, deeper or larger than any that a problem has, and so is not parsed at all."""
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    too_many_digits = re.search(rf"[0-9]{{{MAX_DIGITS + 1}}}", answer)
    return bool(len(answer) > MAX_ANSWER_CHARS or deepest > MAX_DEPTH or too_many_digits or _EXPLOSIVE.search(answer))


def _braces(text: str, start: int) -> str:
    """What stands between the brace at `start` and its partner; "" where that never comes."""
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + 1 : end]
    return ""


def _bare(answer: str) -> str:
    """Without the white space, full stop, dollars and stars around it."""
    return answer.strip().rstrip(".").strip("*").strip().strip("$").strip()
