"""Read plain and compressed files in blocks, and lines from any byte on. zstandard is imported only when needed."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.text.formats import GZIP, ZSTD, FileFormat

_BLOCK = 1 << 20
_COMPRESSED_BLOCK = 1 << 17  # smaller, because it may decompress to many times its size


def compression_of(name: str) -> FileFormat | None:
    """Return the compression that a file's name implies."""
    return GZIP if name.lower().endswith(".gz") else ZSTD if name.lower().endswith(".zst") else None


def is_compressed(name: str) -> bool:
    """Return whether a file's name implies that it is compressed as a whole: it can only be read from its beginning."""
    return compression_of(name) is not None


def read_lines(stream: BinaryIO, name: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes, int]]:
    """Yield (offset in the decompressed file, line, bytes read so far) of each line that begins in [start, stop).

    Takes linear time however long a line is, because its pieces are joined once.
    """
    end = sys.maxsize if stop is None else stop
    offset = 0
    if start:
        offset = _next_line_start(stream, start, end)
        if offset >= end:
            return
        stream.seek(offset)
    pieces: list[bytes] = []
    for position, block in read_blocks(stream, name):
        piece, *lines = block.split(b"\n")
        pieces.append(piece)
        if not lines:
            continue
        bytes_read, rest = min(position, end), lines.pop()
        for line in (b"".join(pieces), *lines):
            if offset >= end:
                return
            yield offset, line, bytes_read
            offset += len(line) + 1
        pieces = [rest]
    if offset < end:
        yield offset, b"".join(pieces), min(stream.tell(), end)


def _next_line_start(stream: BinaryIO, start: int, stop: int) -> int:
    """Return the offset of the first line that begins at `start` or later, or `stop` if none begins before it."""
    position = start - 1  # if the byte before `start` is a line feed, a line begins at `start`
    stream.seek(position)
    while position < stop and (block := stream.read(_BLOCK)):
        if (found := block.find(b"\n")) >= 0:
            return min(position + found + 1, stop)
        position += len(block)
    return stop


def read_blocks(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (bytes of the file read so far, a block of decompressed bytes) to the end of the file."""
    compression = compression_of(name)
    if compression == GZIP:
        with gzip.GzipFile(fileobj=stream) as decompressed:
            while block := decompressed.read(_BLOCK):
                yield stream.tell(), block
    elif compression == ZSTD:
        for block in _read_zstd_blocks(stream):
            yield stream.tell(), block
    else:
        while block := stream.read(_BLOCK):
            yield stream.tell(), block


def _read_zstd_blocks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the decompressed bytes of all zstd frames. EOFError if the last frame is truncated.

    zstandard's own reader stops after the first frame, and does not notice truncation.
    """
    import zstandard

    frame = None
    while raw := stream.read(_COMPRESSED_BLOCK):
        while raw:
            # Allow the largest window, that of `zstd --long=31`: by default zstandard refuses more than 128 MiB.
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                yield frame.decompress(raw)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            raw = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last zstd frame is cut off")
