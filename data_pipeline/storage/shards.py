"""Token shards on disk: Megatron's `.bin` / `.idx` pair, a checksum for every MiB, and a manifest beside them. This is their reader.

`.bin` holds raw little-endian tokens. `.idx`, little-endian without gaps: 9 bytes `MMIDIDX` 0 0; u64 version 1; u8 dtype code
(4 i32, 8 u16); u64 N sequences; u64 M = documents + 1; i32[N] lengths in tokens; i64[N] byte offsets; i64[M] first sequence
of each document and N. Here a sequence is a document, and none spans two shards.

The tokens of a source are one stream: its shards one after the other, in manifest order.
"""

from __future__ import annotations

import bisect
import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import unreadable_error
from data_pipeline.storage.manifest import (
    DTYPES,
    Shard,
    SourceManifest,
    SplitManifest,
    TokenDtype,
    check_external_files,
    load_manifest,
)
from data_pipeline.storage.mapped import CheckedArray, CorruptDataError, MappedFile, map_file

Tokens = NDArray[np.integer]
Span = tuple["ShardFile", int, int]
"""Tokens [start, stop) of a shard."""

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[TokenDtype, int] = {"uint16": 8, "int32": 4}
_U16_VOCABULARY = 65_500  # Megatron's own limit: a reader that guesses the dtype from the vocabulary guesses right
_CELL_BITS = 12
_CELL = 1 << _CELL_BITS
_SEARCHES = 1000  # what a guide table costs


def token_dtype(vocab_size: int) -> TokenDtype:
    """`uint16` where the vocabulary fits by Megatron's rule, else `int32`."""
    return "uint16" if vocab_size < _U16_VOCABULARY else "int32"


def encode_index(lengths: NDArray[np.int32], dtype: TokenDtype) -> bytes:
    """The `.idx` of a shard whose documents have these lengths."""
    n = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64) * DTYPES[dtype].itemsize
    offsets = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    documents = np.arange(n + 1, dtype=np.int64)
    header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype], n, n + 1)
    return (
        header + lengths.astype("<i4").tobytes() + offsets.astype("<i8").tobytes() + documents.astype("<i8").tobytes()
    )


def decode_lengths(index: bytes | memoryview) -> NDArray[np.int32]:
    """Tokens of each document, from the contents of an `.idx`."""
    n_sequences = _HEADER.unpack(bytes(index[: _HEADER.size]))[3]
    return np.frombuffer(index, "<i4", n_sequences, _HEADER.size)


@dataclass(frozen=True)
class OpenedSplit:
    """A split that was opened."""

    folder: Path
    manifest: SplitManifest
    sources: tuple[ShardSet, ...]
    """In the order of the manifest."""


def open_split(folder: Path, trusted_paths: Sequence[Path] | None = None) -> OpenedSplit:
    """Open the split in `folder`: reads its manifest and the sizes of its files, and no token.

    Args:
        folder: of the split.
        trusted_paths: folders and files outside of it whose tokens it may name; None trusts every place.

    Raises:
        DataError: it is not there, a file is missing or has another size than the manifest says, or lies where it may not.
    """
    manifest = load_manifest(folder)
    check_external_files(folder, manifest, trusted_paths)
    return OpenedSplit(folder, manifest, tuple(ShardSet(folder, source) for source in manifest.sources))


class ShardSet:
    """The shards of one source of one split. Files are mapped, and MiB blocks checked, when first touched."""

    def __init__(self, folder: Path, source: SourceManifest) -> None:
        """Look at the sizes of the files.

        Raises:
            CorruptDataError: a file is missing or has another size than the manifest says.
        """
        self.folder, self.source = folder, source
        self.n_tokens, self.n_documents = source.tokens, source.documents
        self.files = [ShardFile(folder, shard, source.dtype) for shard in source.shards]
        self._token_starts = [0, *accumulate(shard.tokens for shard in source.shards)]
        self._document_starts = [0, *accumulate(shard.documents for shard in source.shards)]

    def tokens(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the stream, read-only.

        Raises:
            CorruptDataError: a block of a shard does not match its checksum.
            DataError: a file cannot be opened.
        """
        spans = self.spans(start, stop)
        if len(spans) == 1:
            file, low, high = spans[0]
            return file.tokens(low, high)
        tokens, done = np.empty(stop - start, DTYPES[self.source.dtype]), 0
        for file, low, high in spans:
            tokens[done : done + high - low] = file.tokens(low, high)
            done += high - low
        return tokens

    def document_span(self, document: int) -> tuple[int, int]:
        """Start and end in the stream of one document, its end-of-text token included."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents}")
        k = bisect.bisect_right(self._document_starts, document) - 1
        file, i = self.files[k], document - self._document_starts[k]
        start = self._token_starts[k] + int(file.offsets[i]) // file.itemsize
        return start, start + int(file.lengths[i])

    def document_lengths(self) -> Iterator[NDArray[np.int32]]:
        """Tokens of every document, one array a shard: copies, which hold no file open."""
        for file in self.files:
            yield file.lengths.copy()

    def spans(self, start: int, stop: int) -> list[Span]:
        """The parts of shards that tokens [start, stop) of the stream are."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")
        k = bisect.bisect_right(self._token_starts, start) - 1
        if start < stop <= self._token_starts[k + 1]:  # as a rule
            return [(self.files[k], start - self._token_starts[k], stop - self._token_starts[k])]
        spans = []
        while start < stop:
            base, end = self._token_starts[k], self._token_starts[k + 1]
            spans.append((self.files[k], start - base, (stop if stop < end else end) - base))
            start, k = end, k + 1
        return spans


class ShardFile:
    """One shard, mapped while it is read."""

    def __init__(self, folder: Path, shard: Shard, dtype: TokenDtype) -> None:
        self.shard, self.itemsize = shard, DTYPES[dtype].itemsize
        way_out = "restore it from a copy, or prepare the data again in another data.path"
        idx_file, bin_file = folder / f"{shard.name}.idx", folder / f"{shard.name}.bin"
        external = shard.external_bin is not None
        if shard.external_bin is not None:
            bin_file = Path(shard.external_bin)
            way_out = f"restore it from a copy, or prepare {folder.parent} again without it"
        bytes_there = _size(bin_file, way_out)
        if bytes_there < shard.bin_start + shard.bin_bytes or (not external and bytes_there != shard.bin_bytes):
            raise CorruptDataError(
                f"{bin_file} has {bytes_there} bytes where the manifest says {shard.bin_start + shard.bin_bytes}; {way_out}"
            )
        bytes_there = _size(idx_file, way_out)
        if bytes_there != shard.idx_bytes:
            raise CorruptDataError(
                f"{idx_file} has {bytes_there} bytes where the manifest says {shard.idx_bytes}; {way_out}"
            )
        self.tokens = CheckedArray(
            bin_file, shard.bin_start, shard.bin_bytes, DTYPES[dtype], shard.blocks, way_out
        ).read
        """`tokens(start, stop)`: tokens [start, stop) of this shard, at least one, read-only."""
        self._idx = CheckedIndex(idx_file, shard, dtype, way_out)

    def document_starts_near(self, start: int, stop: int) -> NDArray[np.int64]:
        """Byte offsets of all documents that start in [start, stop), and of some that start less than 4096 tokens away from it.

        They are a copy, which holds no file open.

        Raises:
            CorruptDataError: the `.idx` does not match its checksum.
            DataError: it cannot be opened.
        """
        index = self._idx.get()
        if (guide := index.guide) is not None:
            return index.offsets[guide[start >> _CELL_BITS] : guide[(stop + _CELL - 1) >> _CELL_BITS]].copy()
        return index.search(start, stop).copy()

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document. Holds the file open; so does `offsets`."""
        return self._idx.get().lengths

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Byte offset of each document in the tokens."""
        return self._idx.get().offsets


class ShardIndex:
    """An `.idx` that is mapped."""

    def __init__(self, raw: memoryview, shard: Shard, itemsize: int) -> None:
        self.lengths = decode_lengths(raw)
        """Tokens of each document."""
        low = _HEADER.size + 4 * shard.documents
        self.offsets = np.frombuffer(raw, "<i8", shard.documents, low)
        """Byte offset of each document in the tokens."""
        self._offsets = raw[low : low + 8 * shard.documents].cast(
            "q"
        )  # for Python integers, which an array gives slowly
        self._n_tokens, self._itemsize = shard.tokens, itemsize
        self._searched = 0
        self.guide: memoryview | None = None
        """For every 4096 tokens the first document that starts there or later: a look-up instead of a search."""

    def search(self, start: int, stop: int) -> NDArray[np.int64]:
        """Byte offsets of the documents that start in [start, stop). After a number of calls it makes the guide table."""
        self._searched += 1
        if self._searched == _SEARCHES:  # not at once: of many shards, this one may be closed soon
            edges = np.arange(0, self._n_tokens + 2 * _CELL, _CELL, dtype=np.int64) * self._itemsize
            self.guide = np.searchsorted(self.offsets, edges).astype(np.uint32).data
        low = bisect.bisect_left(self._offsets, start * self._itemsize)
        return self.offsets[low : bisect.bisect_left(self._offsets, stop * self._itemsize, low)]


class CheckedIndex(MappedFile[ShardIndex]):
    """The `.idx` of a shard, compared with its checksum as a whole, a few per cent of the tokens, when it is first opened."""

    def __init__(self, file: Path, shard: Shard, dtype: TokenDtype, way_out: str) -> None:
        super().__init__(file, 0, shard.idx_bytes, way_out)
        self._shard, self._dtype = shard, dtype
        self._is_sound = self._is_damaged = False  # not known yet

    def _make(self) -> tuple[ShardIndex, FileIO]:
        if not self._is_damaged:
            raw, stream = map_file(self._file, 0, self._shard.idx_bytes, self._way_out)
            if self._is_sound or self._compare(raw, stream):
                return ShardIndex(raw, self._shard, DTYPES[self._dtype].itemsize), stream
        raise CorruptDataError(f"{self._file} is damaged: it does not match its checksum; {self._way_out}")

    def _compare(self, raw: memoryview, stream: FileIO) -> bool:
        n_documents = self._shard.documents
        header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[self._dtype], n_documents, n_documents + 1)
        try:
            stream.seek(0)
            digest = hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
        except OSError as error:
            raise unreadable_error(self._file, error, "read") from error
        self._is_sound = digest == self._shard.idx_xxh3_128 and bytes(raw[: _HEADER.size]) == header
        self._is_damaged = not self._is_sound
        return self._is_sound


def _size(file: Path, way_out: str) -> int:
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptDataError(f"{file} is missing ({error.strerror}); {way_out}") from None
    except OSError as error:
        raise unreadable_error(file, error) from error
