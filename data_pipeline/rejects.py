"""Documents that were dropped, with their reasons, for people to look at: a zstd-compressed jsonl file a chunk."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from data_pipeline.sources import Document

if TYPE_CHECKING:
    import zstandard


class RejectWriter:
    """Writes `{"id", "source", "reason", "text", "metadata"}` lines. No file: does nothing; no line: makes no file."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._stream: zstandard.ZstdCompressionWriter | None = None

    def __enter__(self) -> RejectWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stream is not None:
            self._stream.close()

    def write(self, document: Document, reason: str) -> None:
        """Append one document."""
        if self.file is None:
            return
        if self._stream is None:
            import zstandard

            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = zstandard.ZstdCompressor().stream_writer(self.file.open("wb"))
        row = {
            "id": document.id,
            "source": document.source,
            "reason": reason,
            "text": document.text,
            "metadata": dict(document.metadata),
        }
        self._stream.write((json.dumps(row, ensure_ascii=False, default=str) + "\n").encode())
