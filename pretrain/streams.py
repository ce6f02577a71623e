"""Standard output and error that stop taking text: the reader ended (`| head`), the terminal closed, the disk is full.

Work that leaves its results on the disk must not end because nobody reads what it says. A command whose output is its
result ends.
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
    """Standard output cannot be written, and what was written there is what the command is for."""

    def __init__(self, error: OSError | ValueError) -> None:
        super().__init__(f"standard output cannot be written: {error_text(error)}")
        self.reader_left = isinstance(error, OSError) and error.errno == errno.EPIPE


class TolerantStream(io.TextIOBase):
    """Passes text on to `stream`. The first write that fails sets `error`; nothing is written after it, and nothing
    more fails.

    A file descriptor that fails is turned to /dev/null: otherwise what is left in buffers would fail again when Python
    ends (exit code 120). A character that the encoding does not have becomes `?`.

    Args:
        stream: any text file.
        name: of the stream, for the line that tells of the loss.
        needed: raise OutputLost instead of telling of the loss and going on.
        tell: say on standard error that the stream was lost.
    """

    def __init__(self, stream: TextIO, name: str, *, needed: bool, tell: bool = True) -> None:
        super().__init__()
        self._stream = stream
        self._name = name
        self.needed = needed
        self._tell = tell
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write, or do nothing once the stream is lost."""
        if self._is_there():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: the file is closed
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing once the stream is lost."""
        if self._is_there():
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _is_there(self) -> bool:
        """Whether it can still be written.

        Where it is needed it says so each time: typer drops the errors of a first try.
        """
        if self.error is not None and self.needed:
            raise OutputLost(self.error)
        return self.error is None

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.error is None and self._stream.isatty()

    def fileno(self) -> int:
        """The file descriptor."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """True, also when the stream is lost."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute there
        """Of the stream."""
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]  # a plain attribute there
        """Of the stream."""
        return self._stream.errors

    @property
    def buffer(self) -> io.BufferedIOBase:
        """Of the stream."""
        return cast("io.BufferedIOBase", self._stream.buffer)

    def _lose(self, error: OSError | ValueError) -> None:
        self.error = error
        with suppress(OSError, ValueError, AttributeError):  # not every file has a descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(null, self._stream.fileno())
            finally:
                os.close(null)
        if self._tell and not self.needed:
            line = f"warning: {self._name} cannot be written ({error_text(error)}): nothing more is shown there, the work goes on\n"
            with suppress(OSError):
                os.write(2, line.encode())  # no print: it could be this stream that print writes to
        if self.needed:
            raise OutputLost(error) from error


def error_text(error: Exception) -> str:
    """`Broken pipe` rather than `[Errno 32] Broken pipe`."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Standard output and error as TolerantStreams.

    Losing the output raises OutputLost, until `output_is_extra` is called.
    """
    _open_closed_ones()
    before = sys.stdout, sys.stderr
    output = TolerantStream(sys.stdout, "standard output", needed=True)
    problems = TolerantStream(sys.stderr, "standard error", needed=False, tell=False)
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", problems)
    try:
        yield
    finally:
        output.needed = False
        output.flush()
        problems.flush()
        sys.stdout, sys.stderr = before


def allow_output_loss() -> None:
    """The result of this command lies on the disk: it goes on when standard output is lost."""
    if isinstance(sys.stdout, TolerantStream):
        sys.stdout.needed = False


@contextmanager
def tolerant_console(console: Console) -> Iterator[TolerantStream]:
    """Inside the block, `console` goes quiet instead of raising when its file cannot be written.

    Gives what it writes to.
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


def _open_closed_ones() -> None:
    """Open what the caller closed (`>&-`) to /dev/null: else the next file would get its number, and the output of C
    libraries."""
    if sys.stdout is not None and sys.stderr is not None:
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
