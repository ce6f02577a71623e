"""Token shards on disk: Megatron's `.bin` / `.idx` pair, a checksum for every MiB, and a manifest beside them.

`.bin` holds raw little-endian tokens. `.idx`, little-endian without gaps: 9 bytes `MMIDIDX` 0 0; u64 version 1; u8 dtype code
(4 i32, 8 u16); u64 N sequences; u64 M = documents + 1; i32[N] lengths in tokens; i64[N] byte offsets; i64[M] first sequence
of each document and N. Here a sequence is a document, and none spans two shards.

The tokens of a split are one stream: its shards one after the other, in manifest order.
"""

from __future__ import annotations

import bisect
import os
import struct
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.manifest import BLOCK_BYTES, DTYPES, Manifest, Shard, TokenDtype, load_manifest

Tokens = NDArray[np.integer]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[TokenDtype, int] = {"uint16": 8, "int32": 4}
_U16_VOCABULARY = 65_500  # Megatron's own limit: a reader that guesses the dtype from the vocabulary guesses right


def token_dtype(vocab_size: int) -> TokenDtype:
    """`uint16` where the vocabulary fits by Megatron's rule, else `int32`."""
    return "uint16" if vocab_size < _U16_VOCABULARY else "int32"


class ShardWriter:
    """Writes documents to the shards of one split. The folder is whole once its manifest is there, and not before."""

    def __init__(self, folder: Path, dtype: TokenDtype, shard_tokens: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.shards: list[Shard] = []
        self._open: _OpenShard | None = None

    def add(self, ids: Tokens) -> None:
        """Append one document. It starts a new shard if it would take this one over `shard_tokens`; one longer than that gets its own."""
        if self._open and self._open.tokens + len(ids) > self.shard_tokens:
            self._finish_shard()
        if self._open is None:
            self._open = _OpenShard(self.folder / f"shard-{len(self.shards):05d}", self.dtype)
        self._open.add(ids)

    def finish(self) -> tuple[Shard, ...]:
        """Complete the last shard, and return the entries of all for the manifest."""
        if self._open:
            self._finish_shard()
        return tuple(self.shards)

    def _finish_shard(self) -> None:
        assert self._open
        self.shards.append(self._open.finish())
        self._open = None


class _OpenShard:
    """One shard being written, hashed on the way."""

    def __init__(self, stem: Path, dtype: TokenDtype) -> None:
        self.stem, self.dtype, self.tokens = stem, dtype, 0
        self._lengths: list[int] = []
        self._buffer = bytearray()
        self._blocks: list[str] = []
        self._hash = xxhash.xxh3_128()
        self._bytes = 0
        self._bin = stem.with_suffix(".bin").open("xb")

    def add(self, ids: Tokens) -> None:
        self._buffer += ids.astype(DTYPES[self.dtype], copy=False).tobytes()
        self._lengths.append(len(ids))
        self.tokens += len(ids)
        while len(self._buffer) >= BLOCK_BYTES:
            self._write(bytes(self._buffer[:BLOCK_BYTES]))
            del self._buffer[:BLOCK_BYTES]

    def finish(self) -> Shard:
        if self._buffer:
            self._write(bytes(self._buffer))
        _sync_and_close(self._bin)
        index = index_bytes(np.array(self._lengths, np.int32), self.dtype)
        file = self.stem.with_suffix(".idx").open("xb")
        file.write(index)
        _sync_and_close(file)
        return Shard(
            name=self.stem.name,
            tokens=self.tokens,
            documents=len(self._lengths),
            bin_bytes=self._bytes,
            idx_bytes=len(index),
            bin_xxh3_128=self._hash.hexdigest(),
            idx_xxh3_128=xxhash.xxh3_128_hexdigest(index),
            bin_blocks_xxh3_64="".join(self._blocks),
        )

    def _write(self, block: bytes) -> None:
        self._bin.write(block)
        self._hash.update(block)
        self._blocks.append(xxhash.xxh3_64_hexdigest(block))
        self._bytes += len(block)


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


class ShardSet:
    """The shards of one split, opened by reading the manifest only. Files are mapped, and MiB blocks checked, when first touched."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.n_tokens, self.n_documents = manifest.tokens, manifest.documents
        self._files = [_ShardFiles(folder, shard, manifest.dtype) for shard in manifest.shards]
        self._token_starts = [0, *accumulate(shard.tokens for shard in manifest.shards)]
        self._document_starts = [0, *accumulate(shard.documents for shard in manifest.shards)]

    @classmethod
    def open(cls, folder: Path) -> ShardSet:
        """Open the split in `folder`.

        Raises:
            DataError: it is not there, a file is missing or has another size than the manifest says.
        """
        manifest = load_manifest(folder)
        for shard in manifest.shards:
            for name, size in ((f"{shard.name}.bin", shard.bin_bytes), (f"{shard.name}.idx", shard.idx_bytes)):
                try:
                    there = (folder / name).stat().st_size
                except OSError as error:
                    raise DataError(f"{folder / name} is missing ({error.strerror}); {_way_out(folder)}") from None
                if there != size:
                    raise DataError(f"{folder / name} has {there} bytes where the manifest says {size}; {_way_out(folder)}")
        return cls(folder, manifest)

    def tokens(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the stream, read-only.

        Raises:
            DataError: a block of a shard does not match its checksum.
        """
        pieces = [self._files[k].tokens(low, high) for k, low, high in self._spans(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, DTYPES[self.manifest.dtype]), *pieces])

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """The positions in [start, stop) of the stream at which a document starts, in order."""
        pieces = [self._files[k].starts(low, high) + self._token_starts[k] for k, low, high in self._spans(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int64), *pieces])

    def document_span(self, document: int) -> tuple[int, int]:
        """Start and end in the stream of one document, its end-of-text token included."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents}")
        k = bisect.bisect_right(self._document_starts, document) - 1
        files, i = self._files[k], document - self._document_starts[k]
        start = self._token_starts[k] + int(files.offsets[i]) // files.itemsize
        return start, start + int(files.lengths[i])

    def document_lengths(self) -> Iterator[NDArray[np.int32]]:
        """Tokens of every document, one array a shard."""
        for files in self._files:
            yield files.lengths

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The (shard, start, stop) in tokens of that shard which [start, stop) of the stream touches."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")
        k = bisect.bisect_right(self._token_starts, start) - 1
        while start < stop:
            base, end = self._token_starts[k], self._token_starts[k + 1]
            yield k, start - base, min(stop, end) - base
            start, k = end, k + 1


class _ShardFiles:
    """One shard, mapped at the first read."""

    def __init__(self, folder: Path, shard: Shard, dtype: TokenDtype) -> None:
        self.folder, self.shard, self.dtype = folder, shard, dtype
        self.itemsize = DTYPES[dtype].itemsize
        self._checked = np.zeros(-(-shard.bin_bytes // BLOCK_BYTES), np.bool_)

    def tokens(self, start: int, stop: int) -> Tokens:
        first, last = start * self.itemsize // BLOCK_BYTES, (stop * self.itemsize - 1) // BLOCK_BYTES
        if not self._checked[first : last + 1].all():
            self._check(first, last)
        piece: Tokens = self._bin[start * self.itemsize : stop * self.itemsize].view(DTYPES[self.dtype])
        return piece

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        # bisect looks at ~20 numbers; np.searchsorted would first copy the whole array, which is not aligned in the file.
        first = bisect.bisect_left(self.offsets, start * self.itemsize)
        last = bisect.bisect_left(self.offsets, stop * self.itemsize, lo=first)
        starts: NDArray[np.int64] = self.offsets[first:last] // self.itemsize
        return starts

    @property
    def lengths(self) -> NDArray[np.int32]:
        return index_lengths(self._idx)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Byte offset of each document in the `.bin`."""
        return np.frombuffer(self._idx, "<i8", self.shard.documents, _HEADER.size + 4 * self.shard.documents)

    @cached_property
    def _bin(self) -> NDArray[np.uint8]:
        return np.asarray(np.memmap(self.folder / f"{self.shard.name}.bin", np.uint8, "r"))

    @cached_property
    def _idx(self) -> NDArray[np.uint8]:
        """The bytes of the `.idx`, checked as a whole: a few per cent of the `.bin`."""
        file = self.folder / f"{self.shard.name}.idx"
        raw = np.asarray(np.memmap(file, np.uint8, "r"))
        header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[self.dtype], self.shard.documents, self.shard.documents + 1)
        if xxhash.xxh3_128_hexdigest(raw.data) != self.shard.idx_xxh3_128 or bytes(raw[: _HEADER.size]) != header:
            raise DataError(f"{file} is damaged: it does not match its checksum; {_way_out(self.folder)}")
        return raw

    def _check(self, first: int, last: int) -> None:
        expected = self.shard.blocks()
        for block in range(first, last + 1):
            low = block * BLOCK_BYTES
            if not self._checked[block] and xxhash.xxh3_64_intdigest(self._bin[low : low + BLOCK_BYTES].data) != expected[block]:
                raise DataError(
                    f"{self.folder / self.shard.name}.bin is damaged: block {block} of {len(expected)} (1 MiB from byte {low}) does not "
                    f"match its checksum; {_way_out(self.folder)}"
                )
            self._checked[block] = True


def _way_out(folder: Path) -> str:
    return f"restore it from a copy, or delete {folder.parent} and run `pretrain data prepare` again"


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
