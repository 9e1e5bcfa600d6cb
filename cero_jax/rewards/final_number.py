r"""Reward 1 for the right final number: GSM8K's rule, with exact arithmetic and safe on any string.

Where an answer is marked (`cero_jax.rewards.find`: a box, "####", "answer is"), one number must stand there, behind the
last "=" if there is one; words around it do not count, nor does a reason that follows. Without a mark the last number
counts of the last 4,096 characters. These forms are read: 1,234  12 000  12,34,567  $72  72.0  -3  3/4  2 1/2  1e3  5cm
3 \times 10^5  0.\overline{3}  50% (as 50)  \frac{3}{4}. A number that is part of something larger (10-7, x/72, 2^{10},
5:30, 2\pi, 5x, 40_9, "5 or 7") is no answer, nor is one of more than 100 characters. A gold answer that is not marked
must be one number. The text is matched against patterns and never executed; the time that takes grows linearly with it.
"""

import re
from fractions import Fraction

from cero_jax.rewards import ERROR, NO_ANSWER, Verdict, compared
from cero_jax.rewards.find import after_thought, boxes, find, without_reason
from cero_jax.rewards.plain import plain

MAX_CHARS = 4096  # characters that are searched where nothing is marked
MAX_NUMBER_CHARS = 100  # of a number: converting a longer one could take long

_NUMBER = re.compile(  # of a token, without the punctuation around it
    r"(?P<sign>[-+]?)(?:US)?\$?(?P<second>[-+]?)(?:(?P<whole>[0-9]+)&)?"
    r"(?P<number>(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3})(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,3})?(?:/(?P<denominator>[0-9]+))?"
    r"%?(?:(?:[-/]?[A-Za-z]{2,}|/?[mgshLlJNWVCFd])(?:\^\{?[23]\}?|/[A-Za-z]+)*)?"
)
_MADE_PLAIN = (  # what is written -> tokens between blanks; in this order
    (re.compile(r"\s+"), " "),
    (re.compile(r"<<[^<>\n]*>>"), " "),  # GSM8K's notes of its calculator
    (re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}(?:\^(?:[0-9]|\{-?[0-9]\}))?"), r" \1 "),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[()\[\]]|\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(?<=\{)\s+|\s+(?=\})|(?<=\})\s+(?=\{)|\s*(?=\^)|(?<=\^)\s*|(?<=[A-Za-z])\s+(?=\{)"), ""),
    (re.compile(r"(?<=[0-9])\s*(?:\\times|\\cdot|[x*])\s*10\^(?:\{([-+]?[0-9]+)\}|([-+]?[0-9]+))"), r"e\1\2"),
    (re.compile(r"(?<=[0-9])\s?(?=\\frac\{[0-9])"), "&"),
    (re.compile(r"(?<![0-9A-Za-z.,/])([0-9]{1,20}) (?=[0-9]{1,20}/[0-9])"), r"\1&"),
    (re.compile(r"\\frac\{(-?[0-9]+)\}\{([0-9]+)\}(?![0-9{])"), r"\1/\2"),
    (re.compile(r"\bnegative\s+(?=\$?\.?[0-9])", re.IGNORECASE), "-"),
    (re.compile(r"[!<>]=|=[<>]"), " < "),
    (re.compile(r"(?<=[A-Za-z])[:=]|[=\u2248]|\\approx(?![a-z])"), " = "),
    (re.compile(r"(?<=\.[0-9])([0-9]*)(?:\.\.+|\u2026)"), r"\1\\dots"),
    (re.compile(r"\.\.+|[^\x00-\x7f]"), " "),
)
_BEFORE, _AFTER = "([{*'\"`$:;,!?", ")]}*'\"`$%.,;:!?"  # around a token, and no part of it
_WORD = re.compile(r"[^0-9]*|[A-Za-z]+[0-9]{0,3}[A-Za-z]*(?:\^\{?-?[0-9]\}?)?")  # H2O, cm^2
_DIGIT = re.compile("[0-9]")
_NAMES = re.compile(r"(?:[,;]|\b(?:and|or)\b)[\s$]*[A-Za-z](?:_?\{?[0-9]\}?)?\s*=\s")  # x = 5, y = 6
_SIGN_APART = re.compile(r"^\s*([-+])\s+(?=\$?\.?[0-9])")
_OPERATOR = re.compile(r"[-+*/^<>|~x]+")  # before a number, after something: the number is an operand
_LARGER = re.compile(r"[*/^|_(\[]+|.*\\.*|[xyznkibejqruvw]|pi|sqrt|squared|cubed|factorial")  # after a number
_RELATION = re.compile(
    r"[+*/^<>|~]+|.*\\.*|or|not|than|least|most|except|over|under|above|below|ln|log|sin|cos|tan|sqrt|pi|minus|plus|root|half|twice|double|triple",
    re.IGNORECASE,
)


def final_number(question: str, completion: str, answer: str) -> Verdict:
    """Right where the completion's final number equals the gold answer's, exactly; an error without a gold number."""
    del question
    gold, given = read_gold(answer), read_final_number(completion)
    if gold is None:
        return Verdict(0.0, ERROR, "the gold answer is not one number: give that alone, or mark it as in #### 72")
    if given is None:
        return Verdict(0.0, NO_ANSWER)
    return compared(given == gold, _text(given))


def read_final_number(text: str) -> Fraction | None:
    """The final number that the module's rule finds in `text`; None where it finds none."""
    place = find(text)
    if place is None:
        return _last_number(after_thought(text))
    if not place.prose:
        return one_number(place.text)
    prose = without_reason(place.text)
    return one_number(prose) if not prose or _DIGIT.search(plain(prose)) else _last_number(after_thought(text))


def read_gold(answer: str) -> Fraction | None:
    """The number of a gold answer: the one that is marked, else the only one; None for none, or for different boxes."""
    if "####" not in answer and len({one_number(box) for box in boxes(answer)}) > 1:
        return None
    return read_final_number(answer) if find(answer) else one_number(answer)


def one_number(place: str) -> Fraction | None:
    """The number of a place, behind its last "="; None where it holds another one, or more than numbers and words."""
    text = _made_plain(place[:MAX_CHARS])
    if _NAMES.search(text):
        return None
    text = text.rpartition(" = ")[2]
    tokens = _tokens(_SIGN_APART.sub(r"\1", text))
    at = [i for i, token in enumerate(tokens) if not _WORD.fullmatch(token)]
    values = {None if _is_part(tokens, i) else _value(tokens[i]) for i in at}
    return values.pop() if len(values) == 1 and "!" not in text and not any(map(_RELATION.fullmatch, tokens)) else None


def _last_number(text: str) -> Fraction | None:
    """The last number of the last line that has one; None where it cannot be read, or is a part of something larger."""
    # The cut may go through a number, whose rest would be read as another one; a letter before it prevents that.
    text = text if len(text) <= MAX_CHARS else "x" + text[-MAX_CHARS:]
    for line in reversed(text.splitlines()):
        for i, segment in enumerate(reversed(parts := _made_plain(line).split(" = "))):
            tokens = _tokens(_SIGN_APART.sub(r"\1", segment) if i < len(parts) - 1 else segment)
            for at in reversed(range(len(tokens))):
                if not _WORD.fullmatch(tokens[at]):
                    return None if _is_part(tokens, at) else _value(tokens[at])
    return None


def _made_plain(text: str) -> str:
    r"""LaTeX as tokens between blanks: \frac{3}{4} \text{ cm} is 3/4 cm, x=5 is x = 5."""
    text = plain(text)
    for written, read in _MADE_PLAIN:
        text = written.sub(read, text)
    return text


def _tokens(text: str) -> list[str]:
    """What stands between the blanks, without the punctuation around it, unless it is nothing else."""
    return [token.lstrip(_BEFORE).rstrip(_AFTER) or token for token in text.split()]


def _is_part(tokens: list[str], at: int) -> bool:
    """Whether the token is a part of something larger: an operand, one of two, a factor."""
    before, after, then = (tokens[i] if 0 <= i < len(tokens) else "" for i in (at - 1, at + 1, at + 2))
    if "\\" in before or _LARGER.fullmatch(after) or (after in ("+", "-") and (len(then) == 1 or "\\" in then)):
        return True
    if before == "or":
        return not all(map(_WORD.fullmatch, tokens[:at]))
    if before == "not" or (before == "-" and len(tokens) == 2):  # alone, "-" may be a bullet or a sign
        return True
    return at >= 2 and _OPERATOR.fullmatch(before) is not None  # a sign that begins a longer line is a bullet


def _value(token: str) -> Fraction | None:
    """The number that a token is; None where it is none, too long a one, or divided by zero."""
    found = _NUMBER.fullmatch(token) if len(token) <= MAX_NUMBER_CHARS else None
    if not found or (found["sign"] and found["second"]) or int(found["denominator"] or 1) == 0:
        return None
    value = Fraction(found["number"].replace(",", "") + (found["exponent"] or "")) / int(found["denominator"] or 1)
    value += int(found["whole"] or 0)
    return -value if "-" in (found["sign"], found["second"]) else value


def _text(number: Fraction) -> str:
    """The number as text, for the verdict; one of thousands of digits, which no one reads, is not written out."""
    return str(number) if max(abs(number.numerator), number.denominator) < 10**MAX_NUMBER_CHARS else "a huge number"
