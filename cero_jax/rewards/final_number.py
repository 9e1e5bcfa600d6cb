r"""Reward 1 for the right final number: GSM8K's rule, exact and safe on any string.

The number is looked for on the line after the last "####" or inside the last \boxed{}, whichever comes later, else in
the last 4,096 characters, and the last one found counts. Read are 1,234  $72  72.0  -3  3/4  2 1/2  1e3  50% (the sign
is ignored: 50) and \frac{3}{4}. A number that is an operand (10-7, x/72, 2^{10}, 5:30) is no answer, nor is one of more
than 100 characters. Nothing is evaluated; the work is linear in the text.
"""

import re
from fractions import Fraction

from cero_jax.rewards import NO_ANSWER, Verdict, compared

MAX_CHARS = 4096  # of the text that is searched
MAX_NUMBER_CHARS = 100  # so that no conversion takes long

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![A-Za-z0-9_.)}])\.[0-9]+"
_NUMBER = re.compile(
    rf"""
    (?P<operator>  # what makes the number an operand; a unit's power (cm^2) is no number at all
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
# LaTeX and typography around a number, as plain characters
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
    """Right where the completion's final number equals the answer's, exactly."""
    del question
    given, gold = read_final_number(completion), read_final_number(answer)
    if given is None:
        return Verdict(0.0, NO_ANSWER)
    return compared(given == gold, _text(given))


def read_final_number(text: str) -> Fraction | None:
    """The final number of `text` by the rule above; None where there is none."""
    found = list(_NUMBER.finditer(_plain(_answer_text(text))))
    return _value(found[-1]) if found else None


def _text(number: Fraction) -> str:
    """The number for a reader; one of thousands of digits would take the time of a conversion and the page."""
    return str(number) if max(abs(number.numerator), number.denominator) < 10**MAX_NUMBER_CHARS else "a huge number"


def _answer_text(text: str) -> str:
    hashes, boxed = text.rfind("####"), text.rfind("\\boxed{")
    if hashes < 0 and boxed < 0:
        # a number cut in two would read as another: a letter before it makes it none
        return text if len(text) <= MAX_CHARS else "x" + text[-MAX_CHARS:]
    if hashes > boxed:
        return text[hashes + 4 : hashes + 4 + MAX_CHARS].strip().partition("\n")[0]
    start = boxed + len("\\boxed{")
    depth = 1
    for end, character in enumerate(text[start : start + MAX_CHARS], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:end]
    return ""  # never closed: cut short, so not an answer yet


def _plain(text: str) -> str:
    for written, plain in _PLAIN:
        text = text.replace(written, plain)
    return _FRACTION.sub(r"\1\3/\2\4", _MIXED.sub(" ", text))


def _value(found: re.Match[str]) -> Fraction | None:
    if found["operator"] or found["power"] or len(found[0]) > MAX_NUMBER_CHARS or len(found["exponent"] or "") > 4:
        return None
    denominator = int(found["denominator"] or 1)
    if denominator == 0:
        return None
    value = Fraction(found["number"].replace(",", "") + (found["exponent"] or "")) / denominator
    value += int(found["whole"] or 0)
    return -value if found["sign"] == "-" else value
