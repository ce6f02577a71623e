"""The unit of work of a preparation: a chunk of a source, of about the same text everywhere, that one worker reads alone.

How a source is cut depends on its files and settings only. Appending files to a source changes none but its last chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data_pipeline.addresses import SOURCES_SETTING, redacting_errors
from data_pipeline.text.columnar import Blocks, read_arrow, read_parquet, record_batches, row_groups
from data_pipeline.text.files import FileSlice, SourceFile
from data_pipeline.text.hf_datasets import read_hf_dataset
from data_pipeline.text.sources import Document, is_compressed, read_jsonl, read_text

if TYPE_CHECKING:
    from data_pipeline.settings import SourceConfig

_UNPACKED = 4
"""Bytes of text that a byte of a compressed or parquet file is taken for."""

_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 4096

_READERS: dict[str, Callable[[FileSlice, SourceConfig, str, int], Iterator[Document]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
_BLOCKS: dict[str, Callable[[SourceFile, SourceConfig], Blocks]] = {"parquet": row_groups, "arrow": record_batches}


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of a source. Crosses to a worker by pickle."""

    source: str
    """The source's name."""
    source_index: int
    """Which of `data.sources`."""
    number: int
    """Which chunk of the source; for `hf` which of `paths`."""
    slices: tuple[FileSlice, ...]
    """Where the documents are; empty for `hf`."""
    setting: str = SOURCES_SETTING
    """What names the source, for errors."""

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.source}-{self.number:05d}"

    @property
    def bytes(self) -> int | None:
        """Bytes of files to read, compressed size; None for `hf`."""
        return sum(part.bytes for part in self.slices) if self.slices else None


def split_into_chunks(
    index: int,
    name: str,
    source: SourceConfig,
    files: Sequence[SourceFile],
    text_bytes: int,
    setting: str = SOURCES_SETTING,
) -> list[Chunk]:
    """Cut a source into chunks of about `text_bytes` of text, in reading order.

    Small files go together. Large ones are cut: plain jsonl anywhere, parquet between row groups, local Arrow files between record
    batches; others are a chunk each, however large. A data set of kind `hf` is one chunk for each of `paths`.

    Args:
        index: which of `data.sources` it is.
        name: the source's name.
        source: its settings.
        files: of `list_files(source)`.
        text_bytes: size to aim for, > 0. Compressed files are taken for four times their size.
        setting: what names the source, for errors.

    Raises:
        DataError: a large parquet or Arrow file is corrupt.
    """
    if source.kind == "hf":
        return [Chunk(name, index, number, (), setting) for number in range(len(source.paths))]
    groups: list[list[FileSlice]] = []
    filled = 0
    for part, estimate in _pieces(source, files, text_bytes, setting):
        if not groups or filled + estimate > text_bytes:
            groups.append([part])
            filled = estimate
            continue
        filled += estimate
        last = groups[-1][-1]
        if last.file is part.file:
            groups[-1][-1] = replace(last, stop=part.stop, bytes=last.bytes + part.bytes)
        else:
            groups[-1].append(part)
    return [Chunk(name, index, number, tuple(parts), setting) for number, parts in enumerate(groups)]


def read_chunk(chunk: Chunk, source: SourceConfig) -> Iterator[Document]:
    """Yield every document of a chunk; all chunks in a row give the source's documents, wherever it was cut.

    Bytes that cannot be decoded are replaced by U+FFFD and the document is marked `repaired`: one bad byte neither stops a long
    preparation nor passes unnoticed. One that has lost too much has a `defect`. A null or empty text is yielded as well, and so is
    one with a defect; whoever drops them counts them.

    Args:
        chunk: of `cut`.
        source: its settings, those that `cut` was given.

    Raises:
        DataError: a file is missing, unreadable, corrupt or of another kind, or a document lacks the text field.
    """
    with redacting_errors(source.paths, chunk.setting):
        if source.kind == "hf":
            yield from read_hf_dataset(source.paths[chunk.number], source, chunk.source)
        before = 0
        for part in chunk.slices:
            yield from _READERS[source.kind](part, source, chunk.source, before)
            before += part.bytes


def _pieces(
    source: SourceConfig, files: Sequence[SourceFile], text_bytes: int, setting: str
) -> Iterator[tuple[FileSlice, int]]:
    """The smallest pieces that may go to different chunks, and the bytes of text that each is taken for."""
    estimates = [
        file.size * (_UNPACKED if source.kind == "parquet" or is_compressed(file.file_name) else 1) for file in files
    ]
    large = [i for i, estimate in enumerate(estimates) if estimate > text_bytes]
    blocks: dict[int, Blocks] = {}
    if source.kind in _BLOCKS:
        with (
            redacting_errors(source.paths, setting),
            ThreadPoolExecutor(16) as pool,
        ):  # far away files are waited for side by side
            blocks = dict(zip(large, pool.map(lambda i: _BLOCKS[source.kind](files[i], source), large), strict=True))
    for i, (file, estimate) in enumerate(zip(files, estimates, strict=True)):
        if blocks.get(i):
            yield from _block_pieces(file, blocks[i])
        elif source.kind == "jsonl" and estimate > text_bytes and not is_compressed(file.file_name):
            bounds = _shares(file.size, math.ceil(file.size / text_bytes))
            yield from (
                (FileSlice(file, start, stop, 0, stop - start), stop - start)
                for start, stop in itertools.pairwise(bounds)
            )
        else:
            yield FileSlice(file, None, None, 0, file.size), estimate


def _block_pieces(file: SourceFile, blocks: Blocks) -> Iterator[tuple[FileSlice, int]]:
    """Each row group or record batch by itself."""
    bounds, row = _shares(file.size, len(blocks)), 0
    for i, (rows, estimate) in enumerate(blocks):
        yield FileSlice(file, i, i + 1, row, bounds[i + 1] - bounds[i]), estimate
        row += rows


def _shares(size: int, count: int) -> list[int]:
    """The `count + 1` bounds of as many equal shares of `size` bytes."""
    return [size * i // count for i in range(count + 1)]


def read_batches(chunk: Chunk, source: SourceConfig) -> Iterator[list[Document]]:
    """The documents of a chunk, a few megabytes of text at a time: enough for a back end to be busy with, never more than fits."""
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
