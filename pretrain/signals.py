"""SIGINT, SIGTERM and SIGHUP request a stop: finish the step, save, exit.

A second SIGINT exits at once, except during a save.
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
    """What the run is doing, and therefore what a stop waits for."""

    STEP = "the step"
    VALIDATION = "the validation"
    SAVE = "the save"


class StopRequest:
    """Whether this process was asked to stop, by which signal, and what the stop waits for."""

    def __init__(self, *, verbose: bool = False) -> None:
        """`verbose`: write the notice to standard error when a signal arrives, unless `in_panel`."""
        self._verbose = verbose
        self.in_panel = False
        """Whether a live panel shows the notice. Other output would garble the panel."""
        self.signal: signal.Signals | None = None
        self.n_interrupts = 0
        """Counts the first signal of any kind, and every later SIGINT."""
        self.activity = Activity.STEP
        self.since = time.monotonic()
        """When the activity began, by time.monotonic()."""

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Set the activity inside the block; after it, the run is in a step again."""
        self.activity, self.since = activity, time.monotonic()
        try:
            yield
        finally:
            self.begin_step()

    def begin_step(self) -> None:
        """Set the activity to a new step."""
        self.activity, self.since = Activity.STEP, time.monotonic()

    @property
    def notice(self) -> str:
        """Say what happens next and what another Ctrl-C would do, in at most 80 columns; empty without a request."""
        if self.signal is None:
            return ""
        if self.activity is not Activity.SAVE:
            return "stopping after this step, then saving (Ctrl-C again leaves without saving)"
        if self.n_interrupts == 1:
            return "saving, then stopping (Ctrl-C twice more leaves without it)"
        return "saving, then leaving (Ctrl-C again leaves without it)"

    @property
    def name(self) -> str:
        """SIGINT, SIGTERM or SIGHUP."""
        return "a signal to another process" if self.signal is None else self.signal.name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.n_interrupts >= (2 if self.activity is Activity.SAVE else 1):
                raise KeyboardInterrupt
            self.n_interrupts += 1
        self.n_interrupts = max(1, self.n_interrupts)
        self.signal = signal.Signals(number)
        if self._verbose and not self.in_panel:
            # The terminal may be gone, and an error raised in a signal handler would surface anywhere in the run.
            with suppress(OSError):
                os.write(2, f"\n{self.notice}\n".encode())  # print() is not safe in a handler


@contextmanager
def stop_on_signals(*, verbose: bool = True) -> Iterator[StopRequest]:
    """Handle the signals inside the block, and restore the previous handlers after it.

    SIGHUP stays ignored if it was ignored before, as under nohup. `verbose` writes a notice to standard error.
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
