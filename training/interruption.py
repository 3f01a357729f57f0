"""SIGINT and SIGTERM as a wish that the training loop asks for, so that it stops where its state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether a signal came, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def is_asked(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    @property
    def name(self) -> str:
        """The signal's name; where another process got it, `stopped`."""
        return "stopped" if self.signal is None else self.signal.name

    @property
    def exit_code(self) -> int:
        """What the shell expects of a process that this signal ended: 130 or 143."""
        return 128 + (self.signal or signal.SIGTERM)


@contextmanager
def stop_signals() -> Iterator[Interruption]:
    """Has the first SIGINT or SIGTERM noted; a second one ends the process as it usually would."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield interruption
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        interruption.signal = signal.Signals(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
