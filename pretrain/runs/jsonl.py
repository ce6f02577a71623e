"""Reading and appending to the record files of a run: one JSON object per line.

The files only grow, so a crash can damage only the last line: a line without its newline was never written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pydantic import ValidationError

from data_pipeline.atomic import write_atomic
from data_pipeline.errors import StorageError, unreadable_error
from pretrain.errors import UserError
from pretrain.runs.schema import Event, Metrics, RunRecord, StepRecord, ValidationRecord

R = TypeVar("R", bound=RunRecord)


class RecordFile:
    """A record file opened for appending. Each record is passed to the operating system immediately, as one line."""

    def __init__(self, path: Path) -> None:
        """Open the file; create it if it does not exist. StorageError if that is not possible."""
        self.path = path
        try:
            _remove_incomplete_line(path)
            # Unbuffered: bytes that Python buffered and the disk refused would be written again on close.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error

    def append(self, record: RunRecord) -> None:
        """Write one record.

        StorageError if the disk does not take it; the file then still ends with the previous record.
        """
        line, written = record.line().encode(), 0
        try:
            while written < len(line):  # on a nearly full disk the first write is partial, and the second raises
                written += self._file.write(line[written:])
        except OSError as error:
            os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - written)
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> Metrics:
    """Read a `metrics.jsonl`; empty if it does not exist. UserError names a line that is not a record."""
    steps: dict[int, StepRecord] = {}
    validations: dict[int, ValidationRecord] = {}
    for number, line in enumerate(complete_lines(path), 1):
        if '"val_loss"' in line:
            validation = _parse(ValidationRecord, line, path, number)
            validations[validation.step] = validation
        else:
            step = _parse(StepRecord, line, path, number)
            steps[step.step] = step
    return Metrics([steps[k] for k in sorted(steps)], [validations[k] for k in sorted(validations)])


def read_events(path: Path) -> list[Event]:
    """Read an `events.jsonl` in file order; empty if it does not exist. UserError names a line that is not a record."""
    return [_parse(Event, line, path, number) for number, line in enumerate(complete_lines(path), 1)]


def truncate_after(path: Path, step: int) -> None:
    """Drop the records of later steps than `step`, so that a run resumed there records each step once.

    Call it before the file is opened for appending. One rename replaces the file: a crash leaves the old or the new
    one.
    """
    lines = complete_lines(path)
    kept = [line for number, line in enumerate(lines, 1) if _step_of_line(line, path, number) <= step]
    if len(kept) < len(lines):
        write_atomic(path, "".join(line + "\n" for line in kept).encode())


def backup_records(path: Path, attempt: int) -> None:
    """Copy a record file to `NAME.before-attempt-N`, beside it. An existing copy is kept."""
    copy = path.with_name(f"{path.stem}.before-attempt-{attempt}{path.suffix}")
    if path.exists() and not copy.exists():
        write_atomic(copy, path.read_text(encoding="utf-8", errors="replace").encode())


def complete_lines(path: Path) -> list[str]:
    """Return the lines of a file that end with a newline; text after the last newline is an incomplete write.

    Empty if the file does not exist. StorageError if it cannot be read now.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable_error(path, error, "read") from error


def _parse(kind: type[R], line: str, path: Path, number: int) -> R:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise _not_a_record(path, number) from error


def _step_of_line(line: str, path: Path, number: int) -> int:
    """Return the `step` of a line without validating its other keys."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise _not_a_record(path, number) from error


def _not_a_record(path: Path, number: int) -> UserError:
    return UserError(f"{path}: line {number} is not a record of a run; restore the file or delete that line")


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be written ({error.strerror or error}): make room or make it writable, and start the same "
        "command again; it resumes from the latest checkpoint"
    )


def _remove_incomplete_line(path: Path) -> None:
    """Truncate a file after its last newline: the next record must not continue a line that a crash cut short."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            file.truncate(complete)
            os.fsync(file.fileno())
