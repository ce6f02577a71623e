"""SIGINT and SIGTERM as a wish: finish the step, save, leave. A second SIGINT leaves at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked this process to stop, and how."""

    def __init__(self, *, aloud: bool = True) -> None:
        self._aloud = aloud
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._aloud:
            os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once, without saving\n")  # print() is not safe in a handler

    @property
    def name(self) -> str:
        """SIGINT or SIGTERM."""
        return "a signal to another process" if self.signal is None else self.signal.name


@contextmanager
def stop_on_signals(*, aloud: bool = True) -> Iterator[StopRequest]:
    """Listen for the two signals inside the block; the handlers from before come back after it. `aloud`: say so on stderr."""
    request = StopRequest(aloud=aloud)
    before = {number: signal.signal(number, request._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
