r"""One way of writing for the many in which models write a number: what the verifiers read is made plain first.

Digits and signs of other scripts become ASCII or LaTeX, spaces of every kind a blank, digits in groups one number, and
\dfrac43, \frac 4{3} and vulgar fractions \frac{4}{3}. The time it takes grows linearly with the text.
"""

import re
import unicodedata

_SIGNS = {  # code point -> ASCII or LaTeX
    **dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\ufe63"), "-"),
    **dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " "),
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"), ""),  # invisible
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
    **dict.fromkeys(map(ord, "\u20ac\u00a3\u00a5\u20b9"), ""),  # euro, pound, yen, rupee
    **str.maketrans({"\u2215": "/", "\u2044": "/", "\u00f7": "/", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
        "\u00d7": r"\times ", "\u00b1": r"\pm ", "\u221a": r"\sqrt ", "\u221e": r"\infty ", "\u03c0": r"\pi ",
        "\u00b0": r"^\circ ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\neq ", "\u2208": r"\in ",
        "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2205": r"\emptyset ", "\u211d": r"\mathbb{R}", "\u2019": "'"}),
}  # fmt: skip
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-")
_OTHER = re.compile(r"[^\x00-\x7f]")
_LATEX = (  # what is written -> how it is read; in this order
    (re.compile(r"</?(?:b|i|u|p|br|em|strong|code|span|div)\s?/?>"), " "),
    (re.compile("(^|[\\s$(=])\u2014(?=[0-9])"), r"\1-"),
    (re.compile("([\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+)"), lambda found: f"^{{{found[1].translate(_RAISED)}}}"),
    (re.compile("((?:[0-9]\u0305)+)"), lambda found: rf"\overline{{{found[1]}}}".replace("\u0305", "")),
    (re.compile(r"\\!\s*|\\(?:displaystyle|textstyle|pounds|euro|texteuro)(?![A-Za-z])"), ""),
    (re.compile(r"\{\s*(,|\\,|\\ |~)\s*\}"), r"\1"),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\(?:q?quad|thinspace|enspace|space)(?![A-Za-z])"), " "),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:lt|gt)(?![A-Za-z])"), lambda found: {"l": "<", "g": ">"}[found[0][1]]),
    (re.compile(r"\\(?:degree|textdegree)(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]{0,100}\})\s*([0-9])"), r"\1{\2}"),
    (re.compile(r"\\frac\s*(\{[^{}]{0,100}\})\s*\{"), r"\\frac\1{"),
    # bold, and text that is a number
    (re.compile(r"\\(?:boldsymbol|bm|mathbf|underline|mathit)\s*\{((?:[^{}]|\{[^{}]*\}){0,200})\}"), r"\1"),
    (re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}A-Za-z]{1,100})\}"), r"\1"),
    (re.compile(r"(?<![0-9.,^_])([0-9]{1,3}(?:[ '][0-9]{3})+)(?![0-9])"), lambda found: re.sub("[ ']", "", found[1])),
    (re.compile(r"(?<![0-9.])(?P<whole>[0-9]{0,20})\.(?P<once>[0-9]{0,20})"
                r"(?:\\(?:overline|bar|dot)\s*(?:\{(?P<braced>[0-9]{1,20})\}|(?P<one>[0-9]))|\((?P<round>[0-9]{1,20})\))"),
     lambda found: _repeating(found)),
)  # fmt: skip


def plain(text: str) -> str:
    """`text` in the one way of writing."""
    text = _OTHER.sub(_ascii, text)
    for written, read in _LATEX:
        text = written.sub(read, text)
    return text


def _ascii(found: re.Match[str]) -> str:
    """A character that is not ASCII, as it is read."""
    digit = unicodedata.decimal(found[0], None)
    if digit is not None:
        return str(digit)
    above, slash, below = unicodedata.normalize("NFKC", found[0]).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}" if above and slash and below else _SIGNS.get(ord(found[0]), found[0])


def _repeating(found: re.Match[str]) -> str:
    r"""A decimal whose last digits repeat, as a fraction: 0.1\overline{6} is \frac{15}{90}."""
    once, again = found["once"], found["braced"] or found["one"] or found["round"]
    first = int((found["whole"] or "0") + once)
    return rf"\frac{{{int(f'{first}{again}') - first}}}{{{'9' * len(again)}{'0' * len(once)}}}"
