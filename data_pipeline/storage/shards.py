"""The reader of token shards: Megatron's `.bin` / `.idx` pairs, described by a manifest with a checksum for every MiB.

`.bin` holds raw little-endian tokens. `.idx` is little-endian without gaps: 9 bytes `MMIDIDX` 0 0; u64 version 1; u8
dtype code (4 i32, 8 u16); u64 N sequences; u64 M = documents + 1; i32[N] lengths in tokens; i64[N] byte offsets; i64[M]
first sequence of each document, then N. In our shards a sequence is a document. No document spans two shards.

The tokens of a source form one stream: its shards in the order of the manifest.
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
"""(file, start, stop): tokens [start, stop) of a shard."""

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[TokenDtype, int] = {"uint16": 8, "int32": 4}
_U16_VOCABULARY = 65_500  # Megatron's limit; readers that derive the dtype from the vocabulary size use the same one
_CELL_BITS = 12
_CELL = 1 << _CELL_BITS
_SEARCHES_BEFORE_TABLE = 1000  # that many searches cost as much as building the lookup table


def token_dtype(vocab_size: int) -> TokenDtype:
    """Return the type to store tokens as: `uint16` if the vocabulary fits by Megatron's rule, else `int32`."""
    return "uint16" if vocab_size < _U16_VOCABULARY else "int32"


def encode_index(lengths: NDArray[np.int32], dtype: TokenDtype) -> bytes:
    """Return the contents of the `.idx` of a shard whose documents have these lengths in tokens."""
    n = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64) * DTYPES[dtype].itemsize
    offsets = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    documents = np.arange(n + 1, dtype=np.int64)
    header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype], n, n + 1)
    return (
        header + lengths.astype("<i4").tobytes() + offsets.astype("<i8").tobytes() + documents.astype("<i8").tobytes()
    )


def decode_lengths(index: bytes | memoryview) -> NDArray[np.int32]:
    """Return the tokens of each document, given the contents of an `.idx`."""
    n_sequences = _HEADER.unpack(bytes(index[: _HEADER.size]))[3]
    return np.frombuffer(index, "<i4", n_sequences, _HEADER.size)


@dataclass(frozen=True)
class OpenedSplit:
    """A split of which the manifest and the file sizes have been checked."""

    folder: Path
    manifest: SplitManifest
    sources: tuple[ShardSet, ...]
    """In the order of the manifest."""


def open_split(folder: Path, trusted_paths: Sequence[Path] | None = None) -> OpenedSplit:
    """Open the split in `folder`. Reads its manifest and the sizes of its files, but no tokens.

    Args:
        folder: the folder of the split.
        trusted_paths: folders and files outside of `folder` that the manifest may refer to. None allows every path.

    Raises:
        DataError: there is no split, a file is missing or has the wrong size, or a token file is not in a trusted path.
    """
    manifest = load_manifest(folder)
    check_external_files(folder, manifest, trusted_paths)
    return OpenedSplit(folder, manifest, tuple(ShardSet(folder, source) for source in manifest.sources))


class ShardSet:
    """The shards of one source in one split. Files are mapped, and their blocks verified, when they are first read."""

    def __init__(self, folder: Path, source: SourceManifest) -> None:
        """Check the sizes of the files.

        Raises:
            CorruptDataError: a file is missing or does not have the size that the manifest states.
        """
        self.folder, self.source = folder, source
        self.n_tokens, self.n_documents = source.tokens, source.documents
        self.files = [ShardFile(folder, shard, source.dtype) for shard in source.shards]
        self._token_starts = [0, *accumulate(shard.tokens for shard in source.shards)]
        self._document_starts = [0, *accumulate(shard.documents for shard in source.shards)]

    def tokens(self, start: int, stop: int) -> Tokens:
        """Return tokens [start, stop) of the stream, read-only.

        Raises:
            CorruptDataError: a block of a shard does not match its checksum.
            DataError: a file cannot be opened.
        """
        spans = self.spans(start, stop)
        if len(spans) == 1:
            file, low, high = spans[0]
            return file.tokens(low, high)
        tokens, count = np.empty(stop - start, DTYPES[self.source.dtype]), 0
        for file, low, high in spans:
            tokens[count : count + high - low] = file.tokens(low, high)
            count += high - low
        return tokens

    def document_span(self, document: int) -> tuple[int, int]:
        """Return where a document starts and ends in the stream, its end-of-text token included."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents}")
        k = bisect.bisect_right(self._document_starts, document) - 1
        file, i = self.files[k], document - self._document_starts[k]
        start = self._token_starts[k] + int(file.offsets[i]) // file.itemsize
        return start, start + int(file.lengths[i])

    def document_lengths(self) -> Iterator[NDArray[np.int32]]:
        """Yield the tokens of each document, one array per shard. The arrays are copies and keep no file open."""
        for file in self.files:
            yield file.lengths.copy()

    def spans(self, start: int, stop: int) -> list[Span]:
        """Return the shard spans that make up tokens [start, stop) of the stream."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")
        k = bisect.bisect_right(self._token_starts, start) - 1
        if start < stop <= self._token_starts[k + 1]:  # the common case: within one shard
            return [(self.files[k], start - self._token_starts[k], stop - self._token_starts[k])]
        spans = []
        while start < stop:
            base, end = self._token_starts[k], self._token_starts[k + 1]
            spans.append((self.files[k], start - base, (stop if stop < end else end) - base))
            start, k = end, k + 1
        return spans


class ShardFile:
    """One shard. Its files are mapped while it is read."""

    def __init__(self, folder: Path, shard: Shard, dtype: TokenDtype) -> None:
        self.shard, self.itemsize = shard, DTYPES[dtype].itemsize
        remedy = "restore it from a copy, or prepare the data again in another data.path"
        idx_file, bin_file = folder / f"{shard.name}.idx", folder / f"{shard.name}.bin"
        external = shard.external_bin is not None
        if shard.external_bin is not None:
            bin_file = Path(shard.external_bin)
            remedy = f"restore it from a copy, or prepare {folder.parent} again without it"
        found_bytes = _size(bin_file, remedy)
        if found_bytes < shard.bin_start + shard.bin_bytes or (not external and found_bytes != shard.bin_bytes):
            raise CorruptDataError(
                f"{bin_file} has {found_bytes} bytes where the manifest says {shard.bin_start + shard.bin_bytes}; "
                f"{remedy}"
            )
        found_bytes = _size(idx_file, remedy)
        if found_bytes != shard.idx_bytes:
            raise CorruptDataError(
                f"{idx_file} has {found_bytes} bytes where the manifest says {shard.idx_bytes}; {remedy}"
            )
        self.tokens = CheckedArray(
            bin_file, shard.bin_start, shard.bin_bytes, DTYPES[dtype], shard.block_checksums, remedy
        ).read
        """`tokens(start, stop)` returns tokens [start, stop) of this shard, at least one, read-only."""
        self._idx = CheckedIndex(idx_file, shard, dtype, remedy)

    def document_starts_near(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the byte offsets of all documents that start in [start, stop), and of some up to 4095 tokens outside.

        The array is a copy and keeps no file open.

        Raises:
            CorruptDataError: the `.idx` does not match its checksum.
            DataError: the `.idx` cannot be opened.
        """
        index = self._idx.get()
        if (table := index.lookup_table) is not None:
            return index.offsets[table[start >> _CELL_BITS] : table[(stop + _CELL - 1) >> _CELL_BITS]].copy()
        return index.search(start, stop).copy()

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document. A view that keeps the file open."""
        return self._idx.get().lengths

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Byte offset of each document in the `.bin`. A view that keeps the file open."""
        return self._idx.get().offsets


class ShardIndex:
    """The contents of a mapped `.idx`."""

    def __init__(self, raw: memoryview, shard: Shard, itemsize: int) -> None:
        self.lengths = decode_lengths(raw)
        """Tokens of each document."""
        low = _HEADER.size + 4 * shard.documents
        self.offsets = np.frombuffer(raw, "<i8", shard.documents, low)
        """Byte offset of each document in the `.bin`."""
        # Searched item by item, which is faster in a memoryview than in an array.
        self._offsets = raw[low : low + 8 * shard.documents].cast("q")
        self._n_tokens, self._itemsize = shard.tokens, itemsize
        self._n_searches = 0
        self.lookup_table: memoryview | None = None
        """For each cell of 4096 tokens, the first document that starts in it or later. Replaces the search."""

    def search(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the byte offsets of the documents that start in [start, stop). Many calls build the lookup table."""
        self._n_searches += 1
        # Not at the first call: if there are many shards, this one may soon be closed, and its table with it.
        if self._n_searches == _SEARCHES_BEFORE_TABLE:
            edges = np.arange(0, self._n_tokens + 2 * _CELL, _CELL, dtype=np.int64) * self._itemsize
            self.lookup_table = np.searchsorted(self.offsets, edges).astype(np.uint32).data
        low = bisect.bisect_left(self._offsets, start * self._itemsize)
        return self.offsets[low : bisect.bisect_left(self._offsets, stop * self._itemsize, low)]


class CheckedIndex(MappedFile[ShardIndex]):
    """The `.idx` of a shard. The whole file, a few per cent of the `.bin`, is verified when it is first opened."""

    def __init__(self, file: Path, shard: Shard, dtype: TokenDtype, remedy: str) -> None:
        super().__init__(file, 0, shard.idx_bytes, remedy)
        self._shard, self._dtype = shard, dtype
        self._is_valid: bool | None = None  # None until it was verified

    def _map(self) -> tuple[ShardIndex, FileIO]:
        if self._is_valid is not False:
            raw, stream = map_file(self._file, 0, self._shard.idx_bytes, self._remedy)
            if self._is_valid is None:
                self._is_valid = self._verify(raw, stream)
            if self._is_valid:
                return ShardIndex(raw, self._shard, DTYPES[self._dtype].itemsize), stream
        raise CorruptDataError(f"{self._file} is damaged: it does not match its checksum; {self._remedy}")

    def _verify(self, raw: memoryview, stream: FileIO) -> bool:
        n_documents = self._shard.documents
        header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[self._dtype], n_documents, n_documents + 1)
        try:
            stream.seek(0)
            digest = hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
        except OSError as error:
            raise unreadable_error(self._file, error, "read") from error
        return digest == self._shard.idx_xxh3_128 and bytes(raw[: _HEADER.size]) == header


def _size(file: Path, remedy: str) -> int:
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptDataError(f"{file} is missing ({error.strerror}); {remedy}") from None
    except OSError as error:
        raise unreadable_error(file, error) from error
