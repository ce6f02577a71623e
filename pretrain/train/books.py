"""Everyone who hears of a run: the record files, the display, the loggers. Of several processes the main one keeps them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from rich.console import Console

from pretrain.report.records import Event, StepRecord, ValidationRecord
from pretrain.train.display import Display
from pretrain.train.loggers import Logger
from pretrain.train.metrics import RecordFile
from pretrain.train.rundir import RunDirectory

QUIET = Console(quiet=True, force_terminal=False)
"""The console of the processes that do not speak."""


@dataclass
class Books:
    """Everyone who hears of the run: the two record files, the display, the loggers."""

    metrics: RecordFile
    events: RecordFile
    display: Display
    attempt: int
    loggers: Sequence[Logger] = field(default=())

    def event(self, kind: str, text: str, step: int | None = None, **more: str | int | None) -> None:
        """Tell that something happened."""
        event = Event.model_validate({"time": time.time(), "kind": kind, "text": text, "step": step, **more})
        self.events.append(event)
        self.display.event(event)

    def log(self, record: StepRecord | ValidationRecord) -> None:
        """Pass a record to the file and the loggers; the display is told by the loop, which knows the pace."""
        self.metrics.append(record)
        for logger in self.loggers:
            logger.log(record)


@contextmanager
def open_books(run_dir: RunDirectory, display: Display, loggers: Sequence[Logger]) -> Iterator[Books]:
    """The books of one attempt; everything in them is closed after the block."""
    with ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.close)
        metrics, events = (stack.enter_context(RecordFile(path)) for path in (run_dir.metrics, run_dir.events))
        yield Books(metrics, events, stack.enter_context(display), run_dir.attempt, loggers)
