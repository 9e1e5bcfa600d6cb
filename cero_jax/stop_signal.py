"""Ctrl-C and SIGTERM: the first asks a run to stop and says so at once, the second ends it where it is.

Python runs a signal's handler in the main thread and between two of its instructions, so not while that waits for a
device or a compilation. A thread of its own reads what signals came from the interpreter's wake-up pipe instead.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cero_jax import hosts
from cero_jax.terminal import say

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag that the loop reads between batches, until `close`.

    A second one acts as it did before this object was made: where that is the system's default it ends the process at
    once and without a traceback.
    """

    def __init__(self):
        self.number = 0  # of the signal that came to this process; 0: none
        self._heard = 0
        self._before: dict[int, Any] = {number: signal.getsignal(number) for number in STOPPING}
        self._give_back = _listen(STOPPING, self._on_signal, self._note)

    def agreed(self) -> int:
        """The number of a signal that came to this process or, as all ask in the same place, to any; 0: none."""
        return max(hosts.each_has(lambda: self.number))

    def close(self) -> None:
        """Give the handlers back."""
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, once it can."""
        before = self._before[number]
        if self.number and callable(before):
            before(number, frame)
        self.number = number

    def _on_signal(self, number: int) -> None:
        """In the thread that listens, at once."""
        self._heard += 1
        if self._heard == 1:
            say(f"{signal.Signals(number).name}: stopping after this step; again to quit now")
        elif self._before[number] == signal.SIG_DFL:
            _quit(number, "quit: the same command goes on from the last checkpoint")


@contextmanager
def quit_while_starting() -> Iterator[None]:
    """Let Ctrl-C end the process at once, in one line."""
    text = "stopped while starting: the same command starts again"
    give_back = _listen((signal.SIGINT,), lambda number: _quit(number, text), lambda number, frame: None)
    try:
        yield
    finally:
        give_back()


def _quit(number: int, text: str) -> None:
    say(text)
    os._exit(128 + number)


def _listen(
    numbers: tuple[int, ...], on_signal: Callable[[int], None], handler: Callable[[int, FrameType | None], None]
) -> Callable[[], None]:
    """Call `on_signal` in a thread for each of these signals, and `handler` in the main one; returns what ends that.

    One that is ignored stays so, as Ctrl-C is in a job that a shell began in the background.
    """
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    fd_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def listen() -> None:
        while heard := os.read(reading, 1):  # nothing once the other end is closed
            if heard[0] in heeded:
                on_signal(heard[0])
        os.close(reading)

    threading.Thread(target=listen, daemon=True).start()

    def give_back() -> None:
        signal.set_wakeup_fd(fd_before)
        for number, each in before.items():
            signal.signal(number, each)
        os.close(writing)

    return give_back
