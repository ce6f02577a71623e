"""Token shards on disk: Megatron's `.bin` / `.idx` pair, a checksum for every MiB, and a manifest beside them. This is their reader.

`.bin` holds raw little-endian tokens. `.idx`, little-endian without gaps: 9 bytes `MMIDIDX` 0 0; u64 version 1; u8 dtype code
(4 i32, 8 u16); u64 N sequences; u64 M = documents + 1; i32[N] lengths in tokens; i64[N] byte offsets; i64[M] first sequence
of each document and N. Here a sequence is a document, and none spans two shards.

The tokens of a source are one stream: its shards one after the other, in manifest order.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.storage.manifest import BLOCK_BYTES, DTYPES, Manifest, Shard, SourceManifest, TokenDtype, load_manifest

Tokens = NDArray[np.integer]
Span = tuple["ShardFile", int, int]
"""Tokens [start, stop) of a shard."""

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[TokenDtype, int] = {"uint16": 8, "int32": 4}
_U16_VOCABULARY = 65_500  # Megatron's own limit: a reader that guesses the dtype from the vocabulary guesses right
_BLOCK_BITS = BLOCK_BYTES.bit_length() - 1
_CELL_BITS = 12
_CELL = 1 << _CELL_BITS


def token_dtype(vocab_size: int) -> TokenDtype:
    """`uint16` where the vocabulary fits by Megatron's rule, else `int32`."""
    return "uint16" if vocab_size < _U16_VOCABULARY else "int32"


def index_bytes(lengths: NDArray[np.int32], dtype: TokenDtype) -> bytes:
    """The `.idx` of a shard whose documents have these lengths."""
    n = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64) * DTYPES[dtype].itemsize
    offsets = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    documents = np.arange(n + 1, dtype=np.int64)
    header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype], n, n + 1)
    return header + lengths.astype("<i4").tobytes() + offsets.astype("<i8").tobytes() + documents.astype("<i8").tobytes()


def index_lengths(index: bytes | NDArray[np.uint8]) -> NDArray[np.int32]:
    """Tokens of each document, from the contents of an `.idx`."""
    n_sequences = _HEADER.unpack(bytes(index[: _HEADER.size]))[3]
    return np.frombuffer(index, "<i4", n_sequences, _HEADER.size)


@dataclass(frozen=True)
class Split:
    """A split that was opened."""

    folder: Path
    manifest: Manifest
    sources: tuple[ShardSet, ...]
    """In the order of the manifest."""


def open_split(folder: Path) -> Split:
    """Open the split in `folder`: reads its manifest and the sizes of its files, and no token.

    Raises:
        DataError: it is not there, a file is missing or has another size than the manifest says.
    """
    manifest = load_manifest(folder)
    return Split(folder, manifest, tuple(ShardSet(folder, source) for source in manifest.sources))


class ShardSet:
    """The shards of one source of one split. Files are mapped, and MiB blocks checked, when first touched."""

    def __init__(self, folder: Path, source: SourceManifest) -> None:
        """Look at the sizes of the files.

        Raises:
            DataError: a file is missing or has another size than the manifest says.
        """
        self.folder, self.source = folder, source
        self.n_tokens, self.n_documents = source.tokens, source.documents
        self.files = [ShardFile(folder, shard, source.dtype) for shard in source.shards]
        self._token_starts = [0, *accumulate(shard.tokens for shard in source.shards)]
        self._document_starts = [0, *accumulate(shard.documents for shard in source.shards)]

    def tokens(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the stream, read-only.

        Raises:
            DataError: a block of a shard does not match its checksum.
        """
        pieces = [file.tokens(low, high) for file, low, high in self.spans(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, DTYPES[self.source.dtype]), *pieces])

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """The positions in [start, stop) of the stream at which a document starts, in order."""
        found, base = [np.empty(0, np.int64)], start
        for file, low, high in self.spans(start, stop):
            near = file.starts_near(low, high) // file.itemsize
            found.append(near[(near >= low) & (near < high)] + (base - low))
            base += high - low
        return np.concatenate(found)

    def document_span(self, document: int) -> tuple[int, int]:
        """Start and end in the stream of one document, its end-of-text token included."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents}")
        k = bisect.bisect_right(self._document_starts, document) - 1
        file, i = self.files[k], document - self._document_starts[k]
        start = self._token_starts[k] + int(file.offsets[i]) // file.itemsize
        return start, start + int(file.lengths[i])

    def document_lengths(self) -> Iterator[NDArray[np.int32]]:
        """Tokens of every document, one array a shard."""
        for file in self.files:
            yield file.lengths

    def spans(self, start: int, stop: int) -> list[Span]:
        """The parts of shards that tokens [start, stop) of the stream are."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")
        spans = []
        k = bisect.bisect_right(self._token_starts, start) - 1
        while start < stop:
            base, end = self._token_starts[k], self._token_starts[k + 1]
            spans.append((self.files[k], start - base, (stop if stop < end else end) - base))
            start, k = end, k + 1
        return spans


class ShardFile:
    """One shard, mapped at the first read."""

    def __init__(self, folder: Path, shard: Shard, dtype: TokenDtype) -> None:
        self.folder, self.shard, self.dtype = folder, shard, dtype
        self.itemsize = DTYPES[dtype].itemsize
        self._way_out = f"restore it from a copy, or delete {folder.parent} and run `pretrain data prepare` again"
        self._idx_file, bin_file = folder / f"{shard.name}.idx", folder / f"{shard.name}.bin"
        external = shard.external_bin is not None
        if shard.external_bin is not None:
            bin_file = Path(shard.external_bin)
            self._way_out = f"restore it from a copy, or prepare {folder.parent} again without it"
        bytes_there = _size(bin_file, self._way_out)
        if bytes_there < shard.bin_start + shard.bin_bytes or (not external and bytes_there != shard.bin_bytes):
            raise DataError(
                f"{bin_file} has {bytes_there} bytes where the manifest says {shard.bin_start + shard.bin_bytes}; {self._way_out}"
            )
        bytes_there = _size(self._idx_file, self._way_out)
        if bytes_there != shard.idx_bytes:
            raise DataError(f"{self._idx_file} has {bytes_there} bytes where the manifest says {shard.idx_bytes}; {self._way_out}")
        self._bin = CheckedBytes(bin_file, shard.bin_start, shard.bin_bytes, shard.blocks, self._way_out)

    def tokens(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of this shard, read-only.

        Raises:
            DataError: a block does not match its checksum.
        """
        self._bin.check(start * self.itemsize, stop * self.itemsize)
        return self._tokens[start:stop]

    def starts_near(self, start: int, stop: int) -> NDArray[np.int64]:
        """Byte offsets of all documents that start in [start, stop), and of some that start less than 4096 tokens away from it.

        Raises:
            DataError: the `.idx` does not match its checksum.
        """
        guide = self._guide
        return self.offsets[guide[start >> _CELL_BITS] : guide[(stop + _CELL - 1) >> _CELL_BITS]]

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document."""
        return index_lengths(self._idx)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Byte offset of each document in the tokens."""
        return np.frombuffer(self._idx, "<i8", self.shard.documents, _HEADER.size + 4 * self.shard.documents)

    @cached_property
    def _guide(self) -> memoryview:
        """For every 4096 tokens the first document that starts there or later: a look-up instead of a search through the `.idx`.

        A memoryview, because a Python integer comes out of it several times faster than out of an array.
        """
        edges = np.arange(0, self.shard.tokens + 2 * _CELL, _CELL, dtype=np.int64) * self.itemsize
        return np.searchsorted(self.offsets, edges).astype(np.uint32).data

    @cached_property
    def _tokens(self) -> Tokens:
        tokens: Tokens = self._bin.bytes.view(DTYPES[self.dtype])
        return tokens

    @cached_property
    def _idx(self) -> NDArray[np.uint8]:
        """The bytes of the `.idx`, checked as a whole: a few per cent of the tokens."""
        raw = _map(self._idx_file, 0, self.shard.idx_bytes, self._way_out)
        header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[self.dtype], self.shard.documents, self.shard.documents + 1)
        if xxhash.xxh3_128_hexdigest(raw.data) != self.shard.idx_xxh3_128 or bytes(raw[: _HEADER.size]) != header:
            raise DataError(f"{self._idx_file} is damaged: it does not match its checksum; {self._way_out}")
        return raw


class CheckedBytes:
    """Bytes of a file, mapped when first touched, each MiB of them compared with its checksum when that is first touched."""

    def __init__(self, file: Path, start: int, size: int, checksums: Callable[[], NDArray[np.uint64]], way_out: str) -> None:
        self._file, self._start, self._size, self._checksums, self._way_out = file, start, size, checksums, way_out
        self._checked = bytearray(-(-size // BLOCK_BYTES))

    @cached_property
    def bytes(self) -> NDArray[np.uint8]:
        """All of them; `check` before you look at some.

        Raises:
            DataError: the file is gone.
        """
        return _map(self._file, self._start, self._size, self._way_out)

    def check(self, low: int, high: int) -> None:
        """Compare the blocks that bytes [low, high), at least one, lie in, if that was not done before.

        Raises:
            DataError: one does not match its checksum.
        """
        if self._checked.find(0, low >> _BLOCK_BITS, ((high - 1) >> _BLOCK_BITS) + 1) >= 0:
            self._compare(low >> _BLOCK_BITS, (high - 1) >> _BLOCK_BITS)

    def _compare(self, first: int, last: int) -> None:
        expected = self._checksums()
        for block in range(first, last + 1):
            low = block * BLOCK_BYTES
            if not self._checked[block] and xxhash.xxh3_64_intdigest(self.bytes[low : low + BLOCK_BYTES].data) != expected[block]:
                raise DataError(
                    f"{self._file} is damaged: block {block} of {len(expected)} (1 MiB from byte {self._start + low}) does not "
                    f"match its checksum; {self._way_out}"
                )
            self._checked[block] = 1


def _map(file: Path, start: int, size: int, way_out: str) -> NDArray[np.uint8]:
    try:
        return np.asarray(np.memmap(file, np.uint8, "r", start, (size,)))
    except (OSError, ValueError) as error:  # ValueError: it is shorter by now
        raise DataError(f"{file} cannot be read ({error}); {way_out}") from None


def _size(file: Path, way_out: str) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} is missing ({error.strerror}); {way_out}") from None
