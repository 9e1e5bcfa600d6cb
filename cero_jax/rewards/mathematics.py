r"""Reward 1 for the right mathematical answer, by math-verify: LaTeX, fractions, sets, intervals, matrices, equations.

The answer is what stands inside the last \boxed{}; without one, on the line after the last "####"; without that, after
the last "answer is" or "answer:"; without that, inside the last $...$. It is compared as mathematics with the gold
answer. An answer beyond the limits below is not parsed; any other is parsed by a LaTeX grammar and never executed as
code. Some answers within the limits still take forever, so this verifier must run in a `Pool`, which kills it after a
time. Math-verify's own time limits are off: they work by signals, and call an answer that takes too long wrong.

Math-verify is lenient, and accepts: 50 % as 50 and as 0.5; 0.333333 as 1/3 (six decimals, where one side is a decimal);
5 cm, y = 5 and 8 = 5 as 5 (the right-hand side counts); 5, 5 as 5; and 1, 2 in either order.
"""

import logging
import re
from functools import lru_cache

from cero_jax.rewards import NO_ANSWER, TOO_LONG, Verdict, compared

try:
    from math_verify import LatexExtractionConfig, parse, verify
except ImportError as error:
    raise ImportError("verifier 'math' needs math-verify: pip install 'cero_jax[train]'") from error

logging.getLogger("math_verify").setLevel(logging.ERROR)  # silence its warning that its time limits are off

MAX_CHARS = 4096  # only the end of the text, this long, is searched
MAX_ANSWER_CHARS = 200  # the longest gold answer of MATH-500 has 53
MAX_DEPTH = 12  # of nested brackets
MAX_DIGITS = 40  # in a row

_PHRASE = re.compile(r"answer(?: is|:)(?:\*\*)?[ \t:]*([^\n]{1,400})", re.IGNORECASE)
_MATHS = re.compile(r"\$([^$\n]{1,400})\$")
_INTEGER = re.compile(r"-?[0-9]{1,40}")
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
    """Right where the completion's answer equals the gold answer. It may never return: run it in a `Pool`."""
    del question
    given, gold = read_answer(completion), read_gold(answer)
    if not given:
        return Verdict(0.0, NO_ANSWER)
    if beyond_bounds(given):
        return Verdict(0.0, TOO_LONG, given[:MAX_ANSWER_CHARS])
    return compared(equal(gold, given), given)


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
    """Whether two answers are equal: as text, as integers, or as mathematics."""
    if gold == given:
        return True
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(given):
        return int(gold) == int(given)
    parsed = parse(rf"\boxed{{{given}}}", _LATEX, parsing_timeout=0)
    if not parsed:
        return False
    return verify(parse(rf"\boxed{{{gold}}}", _LATEX, parsing_timeout=0), parsed, timeout_seconds=0)


def read_gold(answer: str) -> str:
    """The gold answer: what stands inside \\boxed{} or after "####" where `answer` has one of them, else all of it."""
    marked = "\\boxed{" in answer or "####" in answer
    return (read_answer(answer) if marked else None) or _bare(answer)


def read_answer(text: str) -> str | None:
    """The answer that the module's rule finds; None where it finds none, or an empty one, or an unclosed \\boxed{."""
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
    """Whether an answer is longer, deeper nested or larger than any real one, so that it must not be parsed."""
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    too_many_digits = re.search(rf"[0-9]{{{MAX_DIGITS + 1}}}", answer)
    return bool(len(answer) > MAX_ANSWER_CHARS or deepest > MAX_DEPTH or too_many_digits or _EXPLOSIVE.search(answer))


def _braces(text: str, start: int) -> str:
    """What stands between the brace at `start` and its closing brace; "" where that is missing."""
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + 1 : end]
    return ""


def _bare(answer: str) -> str:
    """The answer without the white space, full stop, dollar signs and stars around it."""
    return answer.strip().rstrip(".").strip("*").strip().strip("$").strip()
