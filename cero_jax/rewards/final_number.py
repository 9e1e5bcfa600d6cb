r"""Reward 1 for the right final number: GSM8K's rule, with exact arithmetic and safe on any string.

The last number counts of the line after the last "####" or of the last \boxed{}, whichever comes later; without either,
of the last 4,096 characters. These forms are read: 1,234  $72  72.0  -3  3/4  2 1/2  1e3  50% (as 50) and \frac{3}{4}.
A number that is an operand (10-7, x/72, 2^{10}, 5:30) is no answer, nor is one of more than 100 characters. The text is
matched against patterns and never executed; the time that takes grows linearly with the text.
"""

import re
from fractions import Fraction

from cero_jax.rewards import NO_ANSWER, Verdict, compared

MAX_CHARS = 4096  # characters of the text that are searched
MAX_NUMBER_CHARS = 100  # of a number: converting a longer one could take long

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![A-Za-z0-9_.)}])\.[0-9]+"
_NUMBER = re.compile(
    rf"""
    (?P<operator>  # what makes the number an operand; the 2 of a unit (cm^2) does not match as a number at all
        (?<=[0-9)])\^\{{? | \\sqrt\{{? | (?<=[0-9A-Za-z)}}])/ | (?<=[0-9)}}])(?:\*\*?|[-+:]) | (?<=\}})\{{
    )?
    (?:(?<![A-Za-z0-9_)}}])(?P<sign>[-+]))? \$?
    (?:(?<![A-Za-z0-9_^])(?<!\^\{{) | (?<=[0-9)]\^) | (?<=[0-9)]\^\{{))
    (?:(?P<whole>[0-9]+)\ (?=[0-9]+/[0-9]))?
    (?P<number>{_DECIMAL})
    (?P<exponent>[eE][-+]?[0-9]+)?
    (?:/(?P<denominator>[0-9]+))?
    (?:(?=(?P<power>\ ?\^|\*\*[0-9])))?
    """,
    re.VERBOSE,
)
_MIXED = re.compile(r"(?<=[0-9])(?=\\[dt]?frac)")
_FRACTION = re.compile(r"(?<!-)\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}|\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
# LaTeX and typographic signs around a number -> plain characters
_PLAIN = (
    ("\u2212", "-"),
    ("\u2013", "-"),
    ("\u2012", "-"),
    ("\\$", "$"),
    ("{,}", ","),
    ("\\!", ""),
    ("^\\circ", ""),
    ("^{\\circ}", ""),
    ("$-", "-$"),
)


def final_number(question: str, completion: str, answer: str) -> Verdict:
    """Right where the completion's final number equals the gold answer's, exactly."""
    del question
    given, gold = read_final_number(completion), read_final_number(answer)
    if given is None:
        return Verdict(0.0, NO_ANSWER)
    return compared(given == gold, _text(given))


def read_final_number(text: str) -> Fraction | None:
    """The final number that the module's rule finds in `text`; None where it finds none."""
    found = list(_NUMBER.finditer(_plain(_answer_text(text))))
    return _value(found[-1]) if found else None


def _text(number: Fraction) -> str:
    """The number as text, for the verdict; one of thousands of digits, which no one reads, is not written out."""
    return str(number) if max(abs(number.numerator), number.denominator) < 10**MAX_NUMBER_CHARS else "a huge number"


def _answer_text(text: str) -> str:
    """The part of `text` that the final number is looked for in."""
    hashes, boxed = text.rfind("####"), text.rfind("\\boxed{")
    if hashes < 0 and boxed < 0:
        # The cut may go through a number, whose rest would be read as another one; a letter before it prevents that.
        return text if len(text) <= MAX_CHARS else "x" + text[-MAX_CHARS:]
    if hashes > boxed:
        return text[hashes + 4 : hashes + 4 + MAX_CHARS].strip().partition("\n")[0]
    start = boxed + len("\\boxed{")
    depth = 1
    for end, character in enumerate(text[start : start + MAX_CHARS], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:end]
    return ""  # a brace that is never closed: the completion ended before its answer did


def _plain(text: str) -> str:
    r"""LaTeX and typographic signs as plain characters: \frac{3}{4} is 3/4."""
    for written, plain in _PLAIN:
        text = text.replace(written, plain)
    return _FRACTION.sub(r"\1\3/\2\4", _MIXED.sub(" ", text))


def _value(found: re.Match[str]) -> Fraction | None:
    """The number that _NUMBER matched; None for an operand, one that is too long, or a division by zero."""
    if found["operator"] or found["power"] or len(found[0]) > MAX_NUMBER_CHARS or len(found["exponent"] or "") > 4:
        return None
    denominator = int(found["denominator"] or 1)
    if denominator == 0:
        return None
    value = Fraction(found["number"].replace(",", "") + (found["exponent"] or "")) / denominator
    value += int(found["whole"] or 0)
    return -value if found["sign"] == "-" else value
