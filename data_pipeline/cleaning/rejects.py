"""Dropped documents with their reasons, for people to inspect: one zstd-compressed jsonl file for each chunk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from data_pipeline.text.sources import Document

if TYPE_CHECKING:
    import zstandard

REJECTS = "rejects"


class RejectWriter:
    """Writes `{"id", "source", "reason", "text", "metadata"}` lines.

    Does nothing if `file` is None, and creates the file with the first line.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self.written = file, 0
        self._raw: BinaryIO | None = None
        self._stream: zstandard.ZstdCompressionWriter | None = None

    def __enter__(self) -> RejectWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None and self._raw is not None:
            with self._raw:
                self._stream.close()  # type: ignore[no-untyped-call]  # zstandard has no types here
                os.fsync(self._raw.fileno())

    def write(self, document: Document, reason: str) -> None:
        """Append a document and the reason why it is dropped."""
        if self.file is None:
            return
        row = {
            "id": document.id,
            "source": document.source,
            "reason": reason,
            "text": document.text,
            "metadata": dict(document.metadata),
        }
        line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
        # An id may be a file name that is not valid Unicode.
        self._open(self.file).write(line.encode(errors="backslashreplace"))
        self.written += 1

    def _open(self, file: Path) -> zstandard.ZstdCompressionWriter:
        if self._stream is None:
            import zstandard

            file.parent.mkdir(parents=True, exist_ok=True)
            self._raw = file.open("wb")
            self._stream = zstandard.ZstdCompressor().stream_writer(self._raw, closefd=False)
        return self._stream
