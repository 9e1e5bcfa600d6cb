"""Text that others wrote, made fit for a terminal."""


def printable(text: str) -> str:
    r"""The text with every character that may steer a terminal written out, as \x1b; line ends and tabs stay.

    Questions, answers, labels and completions may hold escape sequences, which move the cursor, hide text or worse.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str, limit: int = 300) -> str:
    """The same on one line, of at most `limit` characters; a longer one loses its end."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."
