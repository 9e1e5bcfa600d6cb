r"""Reward 1 for the right letter of a multiple choice, A to Z.

The letter is looked for inside the last \boxed{}; without one, after the last "####"; without that, after the last
"answer is", "answer:" or "choice is"; without that, in the last line, if it holds nothing but a letter. These forms are
read: B  (B)  **B**  \text{B}  B. 12 apples. Two letters in one place ("A or B") are no answer. The time it takes grows
linearly with the text.
"""

import re

from cero_jax.rewards import NO_ANSWER, Verdict, compared

MAX_CHARS = 4096  # only the end of the text, this long, is searched
MAX_LINE = 8  # characters of a last line that is nothing but a letter, with signs around it: (**B**)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)?)\}")
_PHRASE = re.compile(r"(?:answer|choice)(?: is|:|\*\*:|:\*\*)[ \t]*([^\n]{0,80})", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_LETTER = re.compile(
    r"[\s(\[*$:]*([A-Za-z])(?![A-Za-z0-9'’])(?:[)\].:*$]+(?=\s|$)|,(?=\s[A-Za-z]{3})|\s*$|\s*\n"
    r"|(?=\s+(?:because|since|as|[-\u2013\u2014])\s))(.*)",
    re.DOTALL,
)
_ANOTHER = re.compile(r"[\s*]*(?:or|and|,|/|&)[\s(\[*]*[A-Za-z](?![A-Za-z0-9])")


def choice(question: str, completion: str, answer: str) -> Verdict:
    """Right where the completion's letter is the gold answer's."""
    del question
    given, gold = read_choice(completion), read_choice(answer)
    if given is None:
        return Verdict(0.0, NO_ANSWER)
    return compared(given == gold, given)


def read_choice(text: str) -> str | None:
    """The letter that the module's rule finds in `text`, in upper case; None where it finds none."""
    tail = text[-MAX_CHARS:]
    boxes = _BOX.findall(tail)
    if boxes:
        return _letter(boxes[-1])
    if "####" in tail:
        return _letter(tail.rpartition("####")[2].strip().partition("\n")[0])
    phrases = _PHRASE.findall(tail)
    if phrases:
        return _letter(phrases[-1])
    last = tail.strip().rpartition("\n")[2]
    return _letter(last) if len(last) <= MAX_LINE else None


def _letter(place: str) -> str | None:
    """The one letter with which `place` begins, in upper case."""
    found = _LETTER.match(_WRAPPED.sub(r"\1", place))
    if not found or _ANOTHER.match(found[2]):
        return None
    return found[1].upper()
