"""Chunks: the units of work of a preparation.

A worker reads a chunk on its own, and all chunks hold about the same amount of text.

How a source is split depends only on its files and settings. Appending files to a source changes only its last chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data_pipeline.addresses import SOURCES_SETTING, redacting_errors
from data_pipeline.text.blocks import is_compressed
from data_pipeline.text.columnar import BlockSizes, read_arrow, read_parquet, record_batches, row_groups
from data_pipeline.text.files import FileSlice, SourceFile
from data_pipeline.text.hf_datasets import read_hf_dataset
from data_pipeline.text.sources import Document, read_jsonl, read_text

if TYPE_CHECKING:
    from data_pipeline.settings import SourceConfig

_COMPRESSION_RATIO = 4
"""Estimated bytes of text for each byte of a compressed or parquet file."""

_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 4096

_READERS: dict[str, Callable[[FileSlice, SourceConfig, str, int], Iterator[Document]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
_BLOCK_READERS: dict[str, Callable[[SourceFile, SourceConfig], BlockSizes]] = {
    "parquet": row_groups,
    "arrow": record_batches,
}


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of a source. Sent to workers by pickle."""

    source: str
    """The source's name."""
    source_index: int
    """Index in `PrepareConfig.all_sources`."""
    number: int
    """Index of the chunk in its source; for `hf` the index in `paths`."""
    slices: tuple[FileSlice, ...]
    """Where the documents are; empty for `hf`."""
    setting: str = SOURCES_SETTING
    """The setting that names the source, for errors."""

    @property
    def name(self) -> str:
        """The name of the chunk's files, without extension."""
        return f"{self.source}-{self.number:05d}"

    @property
    def bytes(self) -> int | None:
        """Bytes of files to read, compressed size; None for `hf`."""
        return sum(piece.bytes for piece in self.slices) if self.slices else None


def split_into_chunks(
    index: int,
    name: str,
    source: SourceConfig,
    files: Sequence[SourceFile],
    text_bytes: int,
    setting: str = SOURCES_SETTING,
) -> list[Chunk]:
    """Split a source into chunks of about `text_bytes` of text, in reading order.

    Small files share a chunk. Large ones are split: plain jsonl at any byte, parquet between row groups, local Arrow
    files between record batches. Any other file is one chunk, however large. A dataset of kind `hf` is one chunk for
    each of `paths`.

    Args:
        index: of the source in `PrepareConfig.all_sources`.
        name: the source's name.
        source: its settings.
        files: the result of `list_files(source)`.
        text_bytes: target size, > 0. Compressed files are estimated to hold four times their size.
        setting: the setting that names the source, for errors.

    Raises:
        DataError: a large parquet or Arrow file is corrupt.
    """
    if source.kind == "hf":
        return [Chunk(name, index, number, (), setting) for number in range(len(source.paths))]
    groups: list[list[FileSlice]] = []
    size = 0
    for piece, estimate in _smallest_slices(source, files, text_bytes, setting):
        if not groups or size + estimate > text_bytes:
            groups.append([piece])
            size = estimate
            continue
        size += estimate
        last = groups[-1][-1]
        if last.file is piece.file:
            groups[-1][-1] = replace(last, stop=piece.stop, bytes=last.bytes + piece.bytes)
        else:
            groups[-1].append(piece)
    return [Chunk(name, index, number, tuple(slices), setting) for number, slices in enumerate(groups)]


def read_chunk(chunk: Chunk, source: SourceConfig) -> Iterator[Document]:
    """Yield every document of a chunk. The chunks in order yield all documents of the source, wherever it was split.

    Bytes that cannot be decoded are replaced by U+FFFD and counted (`had_invalid_unicode`), so that one bad byte does
    not stop a long preparation. A document with too many of them has a `defect`. Documents with a defect, and null or
    empty texts, are yielded as well: the caller drops and counts them.

    Args:
        chunk: from `split_into_chunks`.
        source: the settings that the chunk was made with.

    Raises:
        DataError: a file is missing, unreadable, corrupt or of another kind, or a document lacks the text field.
    """
    with redacting_errors(source.paths, chunk.setting):
        if source.kind == "hf":
            yield from read_hf_dataset(source.paths[chunk.number], source, chunk.source)
        bytes_before = 0
        for piece in chunk.slices:
            yield from _READERS[source.kind](piece, source, chunk.source, bytes_before)
            bytes_before += piece.bytes


def _smallest_slices(
    source: SourceConfig, files: Sequence[SourceFile], text_bytes: int, setting: str
) -> Iterator[tuple[FileSlice, int]]:
    """Yield the smallest slices that may go to different chunks, and the estimated bytes of text in each."""
    estimates = [
        file.size * (_COMPRESSION_RATIO if source.kind == "parquet" or is_compressed(file.file_name) else 1)
        for file in files
    ]
    large = [i for i, estimate in enumerate(estimates) if estimate > text_bytes]
    blocks: dict[int, BlockSizes] = {}
    if source.kind in _BLOCK_READERS:
        read_blocks = _BLOCK_READERS[source.kind]
        # Threads, because opening a remote file is mostly waiting.
        with redacting_errors(source.paths, setting), ThreadPoolExecutor(16) as pool:
            blocks = dict(zip(large, pool.map(lambda i: read_blocks(files[i], source), large), strict=True))
    for i, (file, estimate) in enumerate(zip(files, estimates, strict=True)):
        if blocks.get(i):
            yield from _block_slices(file, blocks[i])
        elif source.kind == "jsonl" and estimate > text_bytes and not is_compressed(file.file_name):
            bounds = _even_bounds(file.size, math.ceil(file.size / text_bytes))
            for start, stop in itertools.pairwise(bounds):
                yield FileSlice(file, start, stop, 0, stop - start), stop - start
        else:
            yield FileSlice(file, None, None, 0, file.size), estimate


def _block_slices(file: SourceFile, blocks: BlockSizes) -> Iterator[tuple[FileSlice, int]]:
    """Yield a slice for each row group or record batch."""
    bounds, row = _even_bounds(file.size, len(blocks)), 0
    for i, (rows, estimate) in enumerate(blocks):
        yield FileSlice(file, i, i + 1, row, bounds[i + 1] - bounds[i]), estimate
        row += rows


def _even_bounds(size: int, count: int) -> list[int]:
    """Return the `count + 1` bounds that divide `size` bytes evenly."""
    return [size * i // count for i in range(count + 1)]


def read_batches(chunk: Chunk, source: SourceConfig) -> Iterator[list[Document]]:
    """Yield the documents of a chunk in batches of a few megabytes, which keep an encoder busy and fit in memory."""
    batch: list[Document] = []
    size = 0
    for document in read_chunk(chunk, source):
        batch.append(document)
        size += document.n_bytes
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
