"""The run's books: appending to its two record files, cutting them back on resume, and the clock behind tokens/s and MFU."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from data_pipeline.atomic import write_atomic
from data_pipeline.errors import StorageError
from pretrain.estimate.hardware import Accelerator
from pretrain.runs.records import Record, step_of_line, whole_lines


class RecordFile:
    """A record file opened for appending. Every record reaches the operating system as one line, at once."""

    def __init__(self, path: Path) -> None:
        """Open it, and make it where there is none. StorageError where that is not possible."""
        self.path = path
        try:
            _cut_torn_line(path)
            self._file = path.open(
                "ab", buffering=0
            )  # what Python buffered and the disk refused would be written again when closed
        except OSError as error:
            raise _unwritable(path, error) from error

    def append(self, record: Record) -> None:
        """Write one record. StorageError where the disk does not take it; the file then ends with the record before."""
        line, written = record.line().encode(), 0
        try:
            while written < len(
                line
            ):  # of a disk that is nearly full the first write takes a part, the second says why
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


def truncate_after(path: Path, step: int) -> None:
    """Drop the records of later steps than `step`, so that a run resumed from there tells each step once.

    Call it before the file is opened for appending. The file is replaced by one rename: a crash leaves the old or the new one.
    """
    lines = whole_lines(path)
    kept = [line for number, line in enumerate(lines, 1) if step_of_line(line, path, number) <= step]
    if len(kept) < len(lines):
        write_atomic(path, "".join(line + "\n" for line in kept).encode())


def copy_aside(path: Path, attempt: int) -> None:
    """Keep a copy of a record file as it was before this attempt, beside it; one that is there already stays."""
    aside = path.with_name(f"{path.stem}.before-attempt-{attempt}{path.suffix}")
    if path.exists() and not aside.exists():
        write_atomic(aside, path.read_text(encoding="utf-8", errors="replace").encode())


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be written ({error.strerror or error}): make room or make it writable, and start the same command again; "
        f"it goes on from the newest checkpoint"
    )


def _cut_torn_line(path: Path) -> None:
    """What a crash left of a line must not become the head of the next one."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Speed:
    """One step by the clock."""

    step_s: float
    tokens_per_s: float
    mfu: float | None
    """Model FLOPs over peak FLOPs of the step; None where the peak is not known."""


@dataclass(frozen=True)
class Pace:
    """The last steps together, and what follows from them."""

    tokens_per_s: float
    mfu: float | None
    seconds_left: float


class Meter:
    """Times the steps. What happens inside `paused()` (evaluation, saving) belongs to no step.

    The first step of an attempt compiles and warms up: it is told as it was, but the pace is that of the steps after it.
    """

    def __init__(
        self,
        *,
        total_tokens: int,
        tokens_done: int = 0,
        peak_flops: float | None,
        window: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start timing the first step now.

        total_tokens: of the whole run. tokens_done: before this attempt. peak_flops: of all devices together, FLOP/s; None shows no
        MFU. window: steps the pace looks back on.
        """
        self._tokens_left = total_tokens - tokens_done
        self._peak_flops = peak_flops
        self._clock = clock
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=window)
        self._warm = False
        self._step_began = clock()

    def step(self, tokens: int, flops_per_token: float) -> Speed:
        """End a step, and begin the next.

        tokens: that it consumed. flops_per_token: forward and backward, at its sequence length, by the convention in `mfu_statement`.
        """
        now = self._clock()
        seconds, self._step_began = now - self._step_began, now
        self._tokens_left -= tokens
        if self._warm:
            self._recent.append((tokens, tokens * flops_per_token, seconds))
        self._warm = True
        rate = tokens / seconds
        return Speed(seconds, rate, self._mfu(rate * flops_per_token))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take what runs inside out of the current step."""
        began = self._clock()
        try:
            yield
        finally:
            self._step_began += self._clock() - began

    def pace(self) -> Pace | None:
        """Mean over the last steps; None until a second step has ended."""
        if not self._recent:
            return None
        tokens, flops, seconds = (sum(column) for column in zip(*self._recent, strict=True))
        rate = tokens / seconds
        return Pace(rate, self._mfu(flops / seconds), max(0, self._tokens_left) / rate)

    def _mfu(self, flops_per_s: float) -> float | None:
        return None if self._peak_flops is None else flops_per_s / self._peak_flops


def mfu_statement(flops_per_token: float, device_name: str, accelerator: Accelerator | None, devices: int = 1) -> str:
    """One sentence: what MFU counts and what it divides by, or why there is none. `devices`: how many there are."""
    if accelerator is None:
        return f"No MFU: the peak of {device_name} at this precision is not known for certain"
    times = f"{devices} x " if devices > 1 else ""
    peak = f"{times}{accelerator.bf16_flops / 1e12:,.0f} TFLOP/s ({accelerator.label}, dense bf16)"
    return (
        f"MFU counts {flops_per_token / 1e9:.3g} GFLOP a token (6 N_matmul + causal attention, forward and backward, no recomputation) "
        f"against {peak}"
    )
