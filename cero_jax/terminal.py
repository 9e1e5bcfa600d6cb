"""What is said to a person: on a terminal that may be gone, in text that others wrote."""

import contextlib
import sys
from typing import Any


def say(text: str) -> None:
    """Write to stderr, above the line that moves. Where nobody can read it any more, the run goes on all the same."""
    from tqdm import tqdm  # only here: the allocator's own commands do without

    with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stderr)


class Stderr:
    """stderr, for a bar that moves: what it cannot take is lost, and nothing raises."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def printable(text: str) -> str:
    r"""The text with every character that may steer a terminal written out, as \x1b; line ends and tabs stay.

    Questions, answers, labels and completions may hold escape sequences, which move the cursor, hide text or worse.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str, limit: int = 300) -> str:
    """The same on one line, of at most `limit` characters; a longer one loses its end."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."
