r"""Where in a text its answer stands: one rule for the verifiers that look for one.

Only what follows the last </think> counts, and of that the last 65,536 characters. The answer stands in the last
\boxed{} (\fbox{}, \framebox{}, \boxed 5), on the line of the last "####" or in the last <answer>, whichever begins
last; without these, after the last "answer is", "answer:" or a heading that ends in "answer", there or on the next
line. Boxes side by side ("\boxed{1} and \boxed{2}") are one list, so that none of them counts alone. A "####" before
words, with more text below, is a heading. The time it takes grows linearly with the text.
"""

import re
from typing import NamedTuple

MAX_CHARS = 65_536  # only the end of the text, this long, is searched
MAX_PLACE = 4096  # characters in which an answer must end
MAX_BOXES = 16  # in one list

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_UNBRACED = re.compile(r"-?[^\s{}$\\,;]{0,200}")
# Between the boxes of one list: signs, "and", "or", the next name as in "x = \boxed{1}, y = \boxed{2}".
_BETWEEN = re.compile(
    r"(?:[\s$,;&*]|\\[()\[\],;:! ]|\\q?quad|\\(?:text|mbox)\{ *(?:and|or|,) *\}|(?:and|or)\b"
    r"|[A-Za-z](?:_\{?[0-9]\}?)? *=)*"
)
_HEADING = re.compile(r"[\s*_]*(?!\\)[A-Za-z]{2}[^\n]*\n\s*\S")
_PHRASE = re.compile(
    r"\b(?:answer[ *_:#]*\n|(?:answers?|ans|choice|option) ?"
    r"(?:\**[:=]\**|(?:(?:to|for|of) [^\n.:?]{1,60}? )?(?:is|are|equals|(?:would|must|should|will) be)\b:?"
    r"(?!\s+(?:in)?(?:right|correct|wrong|valid|reasonable|consistent|verified|confirmed)\b)))",
    re.IGNORECASE,
)
_DISPLAY = re.compile(r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)[^\n]*", re.DOTALL)
# What begins the words after an answer that are no part of it.
_REST = re.compile(
    r"(?<!\\)[.!?](?=\s|\*|$)|[,;]?\s\(?(?:because|since|as|so|where|which|when|given|thus|therefore|hence|due|not)\b"
    r"|\s[\u2013\u2014-]+\s+[A-Za-z]{2}",
    re.IGNORECASE,
)
_NOT = re.compile(r"(?:\s*(?:not|never|neither|nor)\b|n['\u2019]t)", re.IGNORECASE)


class Place(NamedTuple):
    """A part of a text in which its answer stands."""

    text: str  # "" where the text ended before its answer did
    prose: bool  # the answer comes first, and words may follow that are no part of it


def find(text: str) -> Place | None:
    """Where the answer of `text` is marked; None where no mark is."""
    text = after_thought(text)
    box, hashes, tag = [-1, *_box_starts(text)][-1], _hashes_at(text), text.rfind("<answer>")
    if box > max(hashes, tag):
        return Place(boxes(text)[-1], False)
    if max(hashes, tag) >= 0:
        return Place(_line(text, hashes) if hashes > tag else _tag(text, tag), False)
    ends = [found.end() for found in _PHRASE.finditer(text)]
    return Place(_after(text[ends[-1] : ends[-1] + MAX_PLACE]), True) if ends else None


def boxes(text: str) -> list[str]:
    """What stands in the last 16 boxes of `text`, those of one list as one; "" for a box that holds nothing."""
    lists, ends = [], -1
    for start in _box_starts(text)[-MAX_BOXES:]:
        inside, end = _box(text, start)
        if not (inside and 0 <= ends <= start and between(text[ends:start])):
            lists.append([])
        lists[-1].append(inside)
        ends = end if inside else -1
    return [joined(each) for each in lists]


def after_thought(text: str) -> str:
    """The end of `text` that is searched: what follows the last </think>, at most 65,536 characters."""
    return text[-MAX_CHARS:].rpartition("</think>")[2]


def without_reason(prose: str) -> str:
    """What comes first in a sentence: "5" of "5 because x = 3. Then"; "" where it says what the answer is not."""
    if _NOT.match(prose):
        return ""
    rest = _REST.search(prose)
    return prose[: rest.start()] if rest else prose


def last_line(text: str) -> str:
    """The last line of `text` that is not empty."""
    return after_thought(text).strip().rpartition("\n")[2].strip()


def joined(parts: list[str]) -> str:
    """Parts of one list as a text, each once."""
    return ", ".join(dict.fromkeys(parts))


def between(text: str) -> bool:
    """Whether what stands before and after `text` belongs to one list."""
    return len(text) <= 60 and _BETWEEN.fullmatch(text) is not None


def _hashes_at(text: str) -> int:
    """Where the last "####" is that is not a heading; -1 where none is."""
    at = text.rfind("####")
    for _ in range(MAX_BOXES):
        if at < 0 or not _HEADING.match(text[at + 4 : at + 4 + MAX_PLACE].lstrip("#")):
            return at
        at = text.rfind("####", 0, at)
    return -1


def _box_starts(text: str) -> list[int]:
    return [found.start() for found in _BOX.finditer(text)]


def _box(text: str, start: int) -> tuple[str, int]:
    """(what stands in the box that begins at `start`, where it ends); "" where a brace is missing."""
    found = _BOX.match(text, start)
    assert found
    if text[found.end() : found.end() + 1] != "{":
        inside = _UNBRACED.match(text, found.end())
        assert inside
        return inside[0].rstrip("."), inside.end()
    depth = 0
    for end in range(found.end(), min(len(text), found.end() + MAX_PLACE)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[found.end() + 1 : end].strip(), end + 1
    return "", len(text)


def _line(text: str, at: int) -> str:
    return text[at : at + MAX_PLACE].lstrip("#").strip().partition("\n")[0].strip()


def _tag(text: str, at: int) -> str:
    return text[at + len("<answer>") : at + MAX_PLACE].partition("</answer>")[0].strip()


def _after(text: str) -> str:
    """The first line of `text`, or the whole of a formula that stands apart."""
    text = text.lstrip(" \t\n\r:#*_}")
    display = _DISPLAY.match(text)
    return display[0] if display else text.partition("\n")[0].strip()
