"""Standard output and error that can no longer be written: the reader ended (`| head`), the terminal closed, the disk
is full.

A command that leaves its results on the disk continues without output. A command whose output is its result ends.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, cast

from rich.console import Console


class OutputLost(Exception):
    """Standard output cannot be written, and the output is the result of the command."""

    def __init__(self, error: OSError | ValueError) -> None:
        super().__init__(f"standard output cannot be written: {error_text(error)}")
        self.reader_left = isinstance(error, OSError) and error.errno == errno.EPIPE


class TolerantStream(io.TextIOBase):
    """Writes to `stream` until a write fails. The failure sets `error`, and later writes do nothing.

    A failing file descriptor is redirected to /dev/null: otherwise buffered text would fail again when Python exits
    (exit code 120). A character that the encoding lacks becomes `?`.

    Args:
        stream: any text file.
        name: of the stream, for the warning.
        needed: raise OutputLost instead of warning and continuing.
        warn: write a warning to standard error when the stream is lost.
    """

    def __init__(self, stream: TextIO, name: str, *, needed: bool, warn: bool = True) -> None:
        super().__init__()
        self._stream = stream
        self._name = name
        self.needed = needed
        self._warn = warn
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write, or do nothing if the stream is lost."""
        if self._is_usable():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: the file is closed
                self._mark_lost(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing if the stream is lost."""
        if self._is_usable():
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._mark_lost(error)

    def _is_usable(self) -> bool:
        """Return whether the stream can be written. Raise each time if it is needed: typer swallows the first error."""
        if self.error is not None and self.needed:
            raise OutputLost(self.error)
        return self.error is None

    def isatty(self) -> bool:
        """Return whether the stream is a terminal that works."""
        return self.error is None and self._stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Return True, even if the stream is lost."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]  # an attribute in the base class
        """Of the stream."""
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]  # an attribute in the base class
        """Of the stream."""
        return self._stream.errors

    @property
    def buffer(self) -> io.BufferedIOBase:
        """Of the stream."""
        return cast("io.BufferedIOBase", self._stream.buffer)

    def _mark_lost(self, error: OSError | ValueError) -> None:
        self.error = error
        with suppress(OSError, ValueError, AttributeError):  # not every stream has a descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(null, self._stream.fileno())
            finally:
                os.close(null)
        if self._warn and not self.needed:
            line = (
                f"warning: {self._name} cannot be written ({error_text(error)}): "
                "nothing more is shown there, but the work continues\n"
            )
            with suppress(OSError):
                os.write(2, line.encode())  # not print(), which may write to this very stream
        if self.needed:
            raise OutputLost(error) from error


def error_text(error: Exception) -> str:
    """Return the message in one line: `Broken pipe` rather than `[Errno 32] Broken pipe`."""
    message = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(message.splitlines())


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Replace standard output and error by TolerantStreams.

    Losing the output raises OutputLost, until `allow_output_loss` is called.
    """
    _open_closed_streams()
    before = sys.stdout, sys.stderr
    output = TolerantStream(sys.stdout, "standard output", needed=True)
    problems = TolerantStream(sys.stderr, "standard error", needed=False, warn=False)
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", problems)
    try:
        yield
    finally:
        output.needed = False
        output.flush()
        problems.flush()
        sys.stdout, sys.stderr = before


def allow_output_loss() -> None:
    """Let the command continue when standard output is lost, because its result is on the disk."""
    if isinstance(sys.stdout, TolerantStream):
        sys.stdout.needed = False


@contextmanager
def tolerant_console(console: Console) -> Iterator[TolerantStream]:
    """Inside the block, `console` becomes silent instead of raising if its file cannot be written.

    Yields its stream.
    """
    before = console.file
    stream = (
        before
        if isinstance(before, TolerantStream)
        else TolerantStream(cast("TextIO", before), "the display", needed=False)
    )
    stream.needed = False
    console.file = cast("TextIO", stream)
    try:
        yield stream
    finally:
        console.file = before


def _open_closed_streams() -> None:
    """Open standard streams that the caller closed (`>&-`) to /dev/null.

    Otherwise the next opened file would get their number, and the output of C libraries.
    """
    if sys.stdout is not None and sys.stderr is not None:
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
