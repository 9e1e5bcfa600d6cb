r"""Reward 1 for the right letter of a multiple choice, A to Z.

The letter is looked for where an answer is marked (`cero_jax.rewards.find`: a box, "####", "answer is", "choice is");
without a mark in the last line, if it holds nothing but a letter. It must come first there. These forms are read: B
(B)  **B**  \text{B}  \( B \)  option B  B. 12 apples  (B) 12  B because  - B  > B. Two letters in one place ("A or B",
"A. 5 or B. 6") are no answer. The time it takes grows linearly with the text.
"""

import re

from cero_jax.rewards import ERROR, NO_ANSWER, Verdict, compared
from cero_jax.rewards.find import boxes, find, last_line, without_reason
from cero_jax.rewards.plain import plain

MAX_LINE = 16  # characters of a last line that is nothing but a letter, with signs around it: (**B**)
MAX_CHARS = 400  # of a place that are looked at

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathit|mathbf|mbox|bf|rm)\s*\{([^{}]*)\}")
_SIGNS = re.compile(r"\\[()\[\]]|\\(?:bf|rm)(?![A-Za-z])|[*$`\"{}\u201c\u201d]|(?<![A-Za-z])_|_(?![A-Za-z])")
_LETTER = re.compile(
    r"[\s(:]*(?:[>\u2022-]\s+\(?)?(?:(?:option|choice|letter)\s+\(?)?([A-Za-z])(?![A-Za-z0-9'])"
    r"(?:\s*[).:!?]+(?=\s|$)|,(?=\s[A-Za-z]{3})|\s*$|\s*\n|(?=\s+\()|(?=\s+(?:because|since|as|is|[-\u2014])\s))(.*)",
    re.DOTALL | re.IGNORECASE,
)
_ANOTHER = re.compile(  # right behind the letter, on a line of its own, or further on in brackets or before a full stop
    r"[\s*]*(?:or|and|,|/|&|;)[\s(\[]*[A-Za-z](?![A-Za-z0-9'])|\s*\n\s*\(?[A-Za-z][).]?\s*(?:\n|$)"
    r"|[^\n]*(?:\b(?:or|and)|[,/&;])\s*(?:\([A-Za-z]\)|[A-Z](?=[).:]|\s*$))"
)


def choice(question: str, completion: str, answer: str) -> Verdict:
    """Right where the completion's letter is the gold answer's; an error where that has none."""
    del question
    gold, given = read_choice(answer) or _letter(answer), read_choice(completion)
    if gold is None or len({_letter(box) for box in boxes(answer)}) > 1:
        return Verdict(0.0, ERROR, "the gold answer is not one letter: write it as B or (B)")
    if given is None:
        return Verdict(0.0, NO_ANSWER)
    return compared(given == gold, given)


def read_choice(text: str) -> str | None:
    """The letter that the module's rule finds in `text`, in upper case; None where it finds none."""
    place = find(text)
    if place:
        return _letter(place.text, place.prose)
    last = last_line(text)
    return _letter(last) if len(last) <= MAX_LINE else None


def _letter(place: str, prose: bool = False) -> str | None:
    """The one letter with which `place` begins, in upper case."""
    bare = _SIGNS.sub("", _WRAPPED.sub(r"\1", plain(place[:MAX_CHARS])))
    bare = re.sub(r"^\s*\[([A-Za-z])\]", r"(\1)", bare)
    found = _LETTER.match(bare)
    if not found or _ANOTHER.match(without_reason(found[2]) if prose else found[2]):
        return None
    return found[1].upper()
