"""SIGINT, SIGTERM and SIGHUP as requests: finish the step, save, leave.

A second SIGINT leaves at once, but not in the middle of a save.
"""

from __future__ import annotations

import enum
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Activity(enum.Enum):
    """What the run is in the middle of, and what a stop waits for."""

    STEP = "the step"
    VALIDATION = "the validation"
    SAVE = "the save"


class StopRequest:
    """Whether somebody asked this process to stop, how, and what the stop waits for."""

    def __init__(self, *, verbose: bool = False) -> None:
        """`verbose`: write the notice to standard error when a signal comes, unless `in_panel`."""
        self._aloud = verbose
        self.in_panel = False
        """A live panel shows the notice. Text written beside it would tear it."""
        self.signal: signal.Signals | None = None
        self.presses = 0
        """The first signal of any kind, and every SIGINT after it."""
        self.activity = Activity.STEP
        self.since = time.monotonic()
        """When the activity began."""

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """The run is in the middle of this inside the block, and of a step after it."""
        self.activity, self.since = activity, time.monotonic()
        try:
            yield
        finally:
            self.begin_step()

    def begin_step(self) -> None:
        """The run is in the middle of another step."""
        self.activity, self.since = Activity.STEP, time.monotonic()

    @property
    def notice(self) -> str:
        """What happens next and what another Ctrl-C would do, in at most 80 columns; empty where nobody asked to
        stop."""
        if self.signal is None:
            return ""
        if self.activity is not Activity.SAVE:
            return "stopping after this step, then saving (Ctrl-C again leaves without saving)"
        if self.presses == 1:
            return "saving, then stopping (Ctrl-C twice more leaves without it)"
        return "saving, then leaving (Ctrl-C again leaves without it)"

    @property
    def name(self) -> str:
        """SIGINT, SIGTERM or SIGHUP."""
        return "a signal to another process" if self.signal is None else self.signal.name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.presses >= (2 if self.activity is Activity.SAVE else 1):
                raise KeyboardInterrupt
            self.presses += 1
        self.presses = max(1, self.presses)
        self.signal = signal.Signals(number)
        if self._aloud and not self.in_panel:
            with suppress(
                OSError
            ):  # nobody may be left to read it; an error raised here would come out of any line of the run
                os.write(2, f"\n{self.notice}\n".encode())  # print() is not safe in a handler


@contextmanager
def stop_on_signals(*, verbose: bool = True) -> Iterator[StopRequest]:
    """Listen for the signals inside the block; the handlers from before come back after it. `verbose`: say so on
    standard error.

    SIGHUP is left alone where it is ignored, as under nohup.
    """
    request = StopRequest(verbose=verbose)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request._receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
