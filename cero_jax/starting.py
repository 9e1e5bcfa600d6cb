"""Before a command's slow imports: how it ends where a package is missing, in one line that says what to install.

The allocator needs jax and numpy; all else that is here, an extra. Nothing of either is imported here.
"""

import signal
import sys
from pathlib import Path
from types import TracebackType


def install(extra: str) -> str:
    """The command that brings an extra: of the clone that this file lies in, or else of the installed package."""
    clone = Path(__file__).resolve().parent.parent
    return f"pip install '{clone if (clone / 'pyproject.toml').is_file() else 'cero_jax'}[{extra}]'"


def what_to_install(error: BaseException | None) -> str | None:
    """The line about a package that this package, or the command, wanted and did not find.

    None for any other error, as of a file of the user's that imports what is not there.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None or error.__traceback__ is None:
        return None
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    who, what = (name.partition(".")[0] for name in (last.tb_frame.f_globals.get("__name__", ""), error.name))
    if who not in ("cero_jax", "__main__") or what == "cero_jax":
        return None
    return f"{what} is not installed: {install('train')}"


def name_what_is_missing() -> None:
    """From now on this process ends in that line, where it would end in a traceback about a missing package."""
    sys.excepthook = _say


def without_traceback() -> None:
    """The same, and Ctrl-C ends it without a traceback too. Where a shell has Ctrl-C ignored, it stays so."""
    name_what_is_missing()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    line = what_to_install(error)
    if line is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"error: {line}", file=sys.stderr)
