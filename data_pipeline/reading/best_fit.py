"""Best-fit packing: sequences of whole documents. Only documents longer than a sequence are cut.

The longest documents are placed first. Each goes into the sequence with the least free room that still holds it
(best-fit decreasing: D. Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms",
SIAM J. Comput. 3(4), 1974; for language models: H. Ding et al., arXiv:2404.10830). All documents of one length are
placed together, so the time to plan grows with the number of lengths and of amounts of free room, not with the number
of documents. A document longer than a sequence is cut into full sequences and a rest, and the rest is packed like a
document. Inside a sequence, documents keep the order of the stream. Sequences are numbered by their first document.

The plan is a file beside the shards, little-endian: 8 bytes magic, u64 sequences n, u64 pieces m, u64 XXH3 of the
header and of the checksums; u64[] XXH3 of each MiB of the body; the body: i64[n + 1] first piece of each sequence, m
pieces (`_PIECE`). The name of the file has a hash of what the plan was made from. A plan is opened without reading its
body, and made again if it is missing or damaged. One process makes it while others wait.
"""

from __future__ import annotations

import errno
import os
import struct
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.atomic import open_atomic
from data_pipeline.errors import DataError, unreadable_error
from data_pipeline.locks import FileLock
from data_pipeline.reading.packing import NO_LABEL, Batch, number_documents
from data_pipeline.storage.manifest import BLOCK_BYTES
from data_pipeline.storage.mapped import CheckedArray, CorruptDataError
from data_pipeline.storage.shards import ShardSet

_MAGIC = b"BESTFIT1"
_HEADER = struct.Struct("<8sQQ")
_PIECE = np.dtype([("start", "<i8"), ("length", "<i4"), ("begins", "?"), ("ends", "?"), ("unused", "<u2")])
"""A `DocumentPiece` on disk."""
_PIECE_FIELDS = _PIECE[["start", "length", "begins", "ends"]]
"""The same without the unused bytes, for reading."""


class DocumentPiece(NamedTuple):
    """A document, or a part of one that was cut, in a packed sequence."""

    start: int
    """First token in the stream."""
    length: int
    """Tokens."""
    begins: bool
    """The piece begins its document."""
    ends: bool
    """The piece ends its document."""


class BestFitPlan:
    """The packing plan of one source."""

    def __init__(self, shards: ShardSet, seq_len: int) -> None:
        """Open the plan, or make it: seconds for ten million documents, and about 85 bytes of memory for each.

        Raises:
            DataError: an index of the shards is damaged, or the plan cannot be written.
        """
        self.shards, self.seq_len = shards, seq_len
        made_from = [(shard.tokens, shard.documents, shard.idx_xxh3_128) for shard in shards.source.shards]
        made_hash = xxhash.xxh3_64_hexdigest(repr((_MAGIC, seq_len, made_from)).encode())
        self.file = shards.folder / f"{shards.source.name}-best_fit-{seq_len}-{made_hash}.plan"
        if not self._open():
            with _lock_plan(self.file):
                if not self._open():  # another process may have made it meanwhile
                    self._make()

    def pieces(self, sequence: int) -> list[DocumentPiece]:
        """Return the pieces of a sequence, in order.

        Raises:
            DataError: the plan is damaged and cannot be made again, or cannot be opened.
        """
        try:
            return self._read_pieces(sequence)
        except CorruptDataError:
            with _lock_plan(self.file):
                if not (self._open() and self._is_readable(sequence)):
                    self._make()
            return self._read_pieces(sequence)

    def _read_pieces(self, sequence: int) -> list[DocumentPiece]:
        low, high = self._body.read(8 * sequence, 8 * (sequence + 2)).view("<i8").tolist()
        first, size = 8 * (self.n_sequences + 1), _PIECE.itemsize
        pieces = self._body.read(first + low * size, first + high * size).view(_PIECE_FIELDS).tolist()
        return list(map(DocumentPiece._make, pieces))

    def _is_readable(self, sequence: int) -> bool:
        with suppress(CorruptDataError):
            return bool(self._read_pieces(sequence))
        return False

    def _make(self) -> None:
        lengths = np.concatenate([np.empty(0, np.int32), *self.shards.document_lengths()])
        _write_plan(self.file, *plan_best_fit(lengths, self.seq_len))
        if not self._open():
            raise DataError(f"{self.file} was written and cannot be read back; check the disk")

    def _open(self) -> bool:
        """Read the header and the checksums. Return false if the file is missing or damaged."""
        try:
            with self.file.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                header = stream.read(_HEADER.size)
                magic, n_sequences, n_pieces = _HEADER.unpack(header)
                body = 8 * (n_sequences + 1) + _PIECE.itemsize * n_pieces
                table = 8 * -(-body // BLOCK_BYTES)
                if magic != _MAGIC or size != _HEADER.size + 8 + table + body:
                    return False
                checksum, checksums = stream.read(8), stream.read(table)
        except (FileNotFoundError, struct.error):
            return False
        except OSError as error:
            raise unreadable_error(self.file, error) from error
        if checksum != _checksum(header + checksums):
            return False
        remedy = "delete it: it is made again"
        self._body = CheckedArray(
            self.file, size - body, body, np.dtype(np.uint8), lambda: np.frombuffer(checksums, "<u8"), remedy
        )
        self.n_sequences = n_sequences
        return True


def plan_best_fit(lengths: NDArray[np.int32], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """Plan the packing of a stream whose documents have these lengths.

    Returns:
        Where the pieces of each sequence start, [sequences + 1], and the pieces of all sequences, of type `_PIECE`.
    """
    lengths = lengths[lengths > 0]
    count = -(-lengths // seq_len)
    last = np.cumsum(count, dtype=np.int64) - 1  # last piece of each document
    pieces = np.zeros(int(last[-1]) + 1 if last.size else 0, _PIECE)
    pieces["length"] = seq_len
    pieces["length"][last] = lengths - (count - 1) * seq_len
    pieces["start"] = np.cumsum(pieces["length"], dtype=np.int64) - pieces["length"]
    pieces["ends"][last] = True
    pieces["begins"][0:1] = True
    pieces["begins"][1:] = pieces["ends"][:-1]
    bins = best_fit_decreasing(pieces["length"], seq_len)
    first = np.empty(int(bins.max(initial=-1)) + 1, np.int64)
    first[bins[::-1]] = np.arange(len(bins))[::-1]  # backwards, because the last assignment to an index wins
    opens = np.zeros(len(bins), np.bool_)
    opens[first] = True
    renumbered = np.empty(len(first), np.int32)
    renumbered[bins[opens]] = np.arange(len(first))
    bins = renumbered[bins]
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(np.bincount(bins))))
    return starts, pieces[_stable_order(bins)]


def best_fit_decreasing(lengths: NDArray[np.int32], capacity: int) -> NDArray[np.int32]:
    """Assign items of lengths 1 to `capacity` to bins by best-fit decreasing; return the bin of each item."""
    longest_first = _stable_order(capacity - lengths)
    counts = np.bincount(lengths, minlength=1)
    placed = np.empty(len(lengths), np.int32)
    rooms: list[int] = []  # the amounts of free room that bins have, ascending
    bins_with: dict[int, list[NDArray[np.int32]]] = {}  # by free room

    def put_back(room: int, bins: NDArray[np.int32]) -> None:
        if room and bins.size:
            if room not in bins_with:
                insort(rooms, room)
            bins_with.setdefault(room, []).append(bins)

    done = n_bins = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        items = int(counts[length])
        while items:
            index = bisect_left(rooms, length)
            if index < len(rooms):
                room = rooms[index]
                bins = bins_with[room].pop()
                if not bins_with[room]:
                    del bins_with[room], rooms[index]
            else:
                room = capacity
                bins = np.arange(n_bins, n_bins - (-items // (capacity // length)), dtype=np.int32)
                n_bins += len(bins)
            # A bin takes as many items as it holds, because with one item in it, it is the bin with the least room.
            per_bin = room // length
            used = bins[: -(-items // per_bin)]
            taken = min(items, per_bin * len(used))
            placed[done : done + taken] = np.repeat(used, per_bin)[:taken]
            n_full, rest = divmod(taken, per_bin)
            put_back(room, bins[len(used) :])
            put_back(room - per_bin * length, used[:n_full])
            put_back(room - rest * length, used[n_full:])
            done, items = done + taken, items - taken
    out = np.empty_like(placed)
    out[longest_first] = placed
    return out


def _stable_order(numbers: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the indices that sort non-negative numbers stably, 16 bits at a time, which NumPy does faster than 32."""
    order = np.argsort((numbers & 0xFFFF).astype(np.uint16), kind="stable")
    high = (numbers >> 16).astype(np.uint16)
    return order[np.argsort(high[order], kind="stable")] if high.any() else order


def read_best_fit(
    plans: Sequence[BestFitPlan], rows: Sequence[tuple[int, int]], seq_len: int, eot_id: int, skip: bool
) -> Batch:
    """Read packed sequences.

    Args:
        plans: the plan of each source.
        rows: (index of the source, sequence of that source) of each row.
        seq_len: tokens in a row.
        eot_id: the token to pad with.
        skip: turn a row of damaged tokens into padding instead of raising.

    Raises:
        CorruptDataError: a block of a shard does not match its checksum.
        DataError: a plan is damaged and cannot be made again, or a file cannot be opened. Not affected by `skip`.
    """
    input_ids = np.full((len(rows), seq_len), eot_id, np.int32)
    labels = np.full((len(rows), seq_len), NO_LABEL, np.int32)
    starts: list[int] = []
    damaged: list[str] = []
    for row, (source, sequence) in enumerate(rows):
        pieces = plans[source].pieces(sequence)
        try:
            ends = _read_row(input_ids[row], labels[row], plans[source].shards, pieces)
        except CorruptDataError as error:
            if not skip:
                raise
            damaged.append(str(error))
            input_ids[row], labels[row] = eot_id, NO_LABEL
            continue
        starts += [row * seq_len + end for end in ends if end < seq_len]
    return Batch(input_ids, labels, number_documents(np.array(starts, np.int64), len(rows), seq_len), tuple(damaged))


def _read_row(
    inputs: NDArray[np.int32], labels: NDArray[np.int32], shards: ShardSet, pieces: Sequence[DocumentPiece]
) -> list[int]:
    """Write the pieces of one row; return the column behind each piece.

    The last token of a document predicts the first token of the next one.
    """
    columns: list[int] = []
    column, previous_ends = 0, False
    for start, length, begins, ends in pieces:
        # If the document goes on behind the piece, its next token is the label of the piece's last token.
        tokens = shards.tokens(start, start + length + (not ends))
        inputs[column : column + length] = tokens[:length]
        labels[column : column + len(tokens) - 1] = tokens[1:]
        if previous_ends and begins:
            labels[column - 1] = tokens[0]
        column, previous_ends = column + length, ends
        columns.append(column)
    return columns


@contextmanager
def _lock_plan(file: Path) -> Iterator[None]:
    """Keep other processes from making the same plan at the same time: wait until they are done."""
    try:
        # Without locks, every process makes the plan: the same bytes, and the last rename wins.
        lock = FileLock.acquire(file.with_name(f"{file.name}.lock"), blocking=True, required=False)
    except OSError as error:
        raise _unwritable(file, error) from error
    try:
        yield
    finally:
        lock.release(delete=True)


def _write_plan(file: Path, starts: NDArray[np.int64], pieces: NDArray[np.void]) -> None:
    start_bytes, piece_bytes = (array.view(np.uint8) for array in (starts.astype("<i8", copy=False), pieces))
    edge = start_bytes.size

    def blocks() -> Iterator[bytes]:
        for low in range(0, edge + piece_bytes.size, BLOCK_BYTES):
            high = low + BLOCK_BYTES
            yield start_bytes[low:high].tobytes() + piece_bytes[max(0, low - edge) : max(0, high - edge)].tobytes()

    header = _HEADER.pack(_MAGIC, len(starts) - 1, len(pieces))
    checksums = b"".join(xxhash.xxh3_64_intdigest(block).to_bytes(8, "little") for block in blocks())
    try:
        with open_atomic(file, sync_parent=True) as stream:
            stream.write(header + _checksum(header + checksums) + checksums)
            stream.writelines(blocks())
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> DataError:
    remedy = "make room for it"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "run once where the folder can be written, after which the plan is only read"
    return DataError(f"{file} cannot be written ({error.strerror}); {remedy}, or use data.packing=concatenate")


def _checksum(content: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(content).to_bytes(8, "little")
