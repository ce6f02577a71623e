"""Send what happens in a run to the record files, the display and the loggers. Only rank 0 records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from rich.console import Console

from pretrain.runs.directory import RunDirectory
from pretrain.runs.jsonl import RecordFile
from pretrain.runs.schema import Event, StepRecord, ValidationRecord
from pretrain.streams import TolerantStream, error_text
from pretrain.tracking.display import Display
from pretrain.tracking.loggers import Logger

SILENT_CONSOLE = Console(quiet=True, force_terminal=False)
"""The console of the ranks other than 0."""


@dataclass
class RunRecorder:
    """Sends events and metrics to the two record files, the display and the loggers."""

    metrics: RecordFile
    events: RecordFile
    display: Display
    attempt: int
    loggers: Sequence[Logger] = ()
    output: TolerantStream | None = None
    """The stream of the display, if it may fail."""
    _failed: list[Logger] = field(default_factory=list)
    """Loggers that raised. They receive nothing more."""
    _output_lost: bool = False

    def event(self, kind: str, text: str, step: int | None = None, **more: str | int | None) -> None:
        """Record that something happened."""
        event = Event.model_validate({"time": time.time(), "kind": kind, "text": text, "step": step, **more})
        self.events.append(event)
        self.display.event(event)
        self._report_lost_output(step)

    def log(self, record: StepRecord | ValidationRecord) -> None:
        """Write a record to the file and pass it to the loggers. (The loop updates the display: it knows the average.)

        A logger that raises is removed, with an event.
        """
        self.metrics.append(record)
        for logger in self.loggers:
            if logger not in self._failed:
                try:
                    logger.log(record)
                except Exception as error:  # any failure of a disk or a remote service: the run does not need it
                    self._remove_logger(logger, error, record.step)
        self._report_lost_output(record.step)

    def close_loggers(self) -> None:
        """Close all loggers. One that raises is recorded as an event and does not hide an error that ends the run."""
        for logger in self.loggers:
            try:
                logger.close()
            except Exception as error:
                if logger not in self._failed:
                    self._remove_logger(logger, error)

    def _remove_logger(self, logger: Logger, error: Exception, step: int | None = None) -> None:
        self._failed.append(logger)
        self.event(
            "logger_failed",
            f"{type(logger).__name__}: {type(error).__name__}: {error_text(error)}; the run continues without it",
            step,
        )

    def _report_lost_output(self, step: int | None) -> None:
        """Record once that the display cannot be written any more.

        The failing write may be one of the thread that draws the panel, so it is noticed here, afterwards.
        """
        if not self._output_lost and self.output is not None and self.output.error is not None:
            self._output_lost = True
            self.event(
                "output_lost",
                f"the display cannot be written ({error_text(self.output.error)}): the run continues without it",
                step,
            )


@contextmanager
def open_recorder(
    run_dir: RunDirectory, display: Display, loggers: Sequence[Logger], output: TolerantStream | None = None
) -> Iterator[RunRecorder]:
    """Open the recorder of one attempt. After the block its files, loggers and display are closed.

    `output`: what the display is written to.
    """
    with ExitStack() as stack:
        metrics, events = (stack.enter_context(RecordFile(path)) for path in (run_dir.metrics, run_dir.events))
        recorder = RunRecorder(metrics, events, display, run_dir.attempt, loggers, output)
        stack.callback(recorder.close_loggers)
        stack.enter_context(display)
        yield recorder
