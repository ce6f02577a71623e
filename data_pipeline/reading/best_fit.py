"""Best-fit packing: sequences of whole documents, so that no document that fits is cut.

Documents go, the longest first, each into the sequence with the least room that still holds it (best-fit decreasing: D. Johnson et al.,
"Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM J. Comput. 3(4), 1974; for language models: H. Ding
et al., arXiv:2404.10830). All documents of one length are placed together, so planning takes a step for each length and each amount of
room, not for each document. A longer document is cut into full sequences and a rest, which is packed like a document. Inside a sequence
documents stand in the order of the stream, and sequences are numbered by the first document in them.

A plan is a file beside the shards, little-endian: 8 bytes magic, u64 sequences n, u64 pieces m, u64 XXH3 of what is before the body;
u64[] XXH3 of each MiB of the body; the body: i64[n + 1] first piece of each sequence, m pieces (`_PIECE`). Its name says what it was
made from. It is opened without reading the body, and made again where it is missing or damaged. Of processes that want one at once, one
makes it and the others wait.
"""

from __future__ import annotations

import errno
import os
import struct
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path

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
"""A run of tokens: first token in the stream, tokens, whether it begins and whether it ends its document."""

Piece = tuple[int, int, bool, bool, int]


class BestFitPlan:
    """The plan of one source."""

    def __init__(self, shards: ShardSet, seq_len: int) -> None:
        """Open the plan; make it, in seconds for ten million documents and with some 85 bytes of memory for each, where there is none.

        Raises:
            DataError: an index of the shards is damaged, or the plan cannot be written.
        """
        self.shards, self.seq_len = shards, seq_len
        made_from = [(shard.tokens, shard.documents, shard.idx_xxh3_128) for shard in shards.source.shards]
        made_hash = xxhash.xxh3_64_hexdigest(repr((_MAGIC, seq_len, made_from)).encode())
        self.file = shards.folder / f"{shards.source.name}-best_fit-{seq_len}-{made_hash}.plan"
        if not self._open():
            with _one_at_a_time(self.file):
                if not self._open():
                    self._make()

    def pieces(self, sequence: int) -> list[Piece]:
        """What a sequence is made of.

        Raises:
            DataError: the plan is damaged and cannot be made again, or cannot be opened.
        """
        try:
            return self._pieces(sequence)
        except CorruptDataError:
            with _one_at_a_time(self.file):
                if not (self._open() and self._is_sound(sequence)):
                    self._make()
            return self._pieces(sequence)

    def _pieces(self, sequence: int) -> list[Piece]:
        low, high = self._body.read(8 * sequence, 8 * (sequence + 2)).view("<i8").tolist()
        first, size = 8 * (self.n_sequences + 1), _PIECE.itemsize
        pieces: list[Piece] = self._body.read(first + low * size, first + high * size).view(_PIECE).tolist()
        return pieces

    def _is_sound(self, sequence: int) -> bool:
        with suppress(CorruptDataError):
            return bool(self._pieces(sequence))
        return False

    def _make(self) -> None:
        lengths = np.concatenate([np.empty(0, np.int32), *self.shards.document_lengths()])
        _write_plan(self.file, *plan(lengths, self.seq_len))
        if not self._open():
            raise DataError(f"{self.file} was written and cannot be read back; check the disk")

    def _open(self) -> bool:
        """Look at the header; false if the file is not there or damaged."""
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
        way_out = "delete it: it is made again"
        self._body = CheckedArray(
            self.file, size - body, body, np.dtype(np.uint8), lambda: np.frombuffer(checksums, "<u8"), way_out
        )
        self.n_sequences = n_sequences
        return True


def plan(lengths: NDArray[np.int32], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """(first piece of each sequence and the number of pieces, pieces) for documents of these lengths in a stream."""
    lengths = lengths[lengths > 0]
    count = -(-lengths // seq_len)
    last = np.cumsum(count, dtype=np.int64) - 1  # piece of each document
    pieces = np.zeros(int(last[-1]) + 1 if last.size else 0, _PIECE)
    pieces["length"] = seq_len
    pieces["length"][last] = lengths - (count - 1) * seq_len
    pieces["start"] = np.cumsum(pieces["length"], dtype=np.int64) - pieces["length"]
    pieces["ends"][last] = True
    pieces["begins"][0:1] = True
    pieces["begins"][1:] = pieces["ends"][:-1]
    bins = best_fit_decreasing(pieces["length"], seq_len)
    first = np.empty(int(bins.max(initial=-1)) + 1, np.int64)
    first[bins[::-1]] = np.arange(len(bins))[::-1]  # the last assignment to a place is what stays
    opens = np.zeros(len(bins), np.bool_)
    opens[first] = True
    renumbered = np.empty(len(first), np.int32)
    renumbered[bins[opens]] = np.arange(len(first))
    bins = renumbered[bins]
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(np.bincount(bins))))
    return starts, pieces[_stable_order(bins)]


def best_fit_decreasing(lengths: NDArray[np.int32], capacity: int) -> NDArray[np.int32]:
    """The bin of each item by best-fit decreasing; every length is from 1 to `capacity`."""
    longest_first = _stable_order(capacity - lengths)
    counts = np.bincount(lengths, minlength=1)
    placed = np.empty(len(lengths), np.int32)
    rooms: list[int] = []  # what is left in some bin, rising
    bins_with: dict[int, list[NDArray[np.int32]]] = {}

    def leave(room: int, bins: NDArray[np.int32]) -> None:
        if room and bins.size:
            if room not in bins_with:
                insort(rooms, room)
            bins_with.setdefault(room, []).append(bins)

    done = n_bins = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        items = int(counts[length])
        while items:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                bins = bins_with[room].pop()
                if not bins_with[room]:
                    del bins_with[room], rooms[at]
            else:
                room = capacity
                bins = np.arange(n_bins, n_bins - (-items // (capacity // length)), dtype=np.int32)
                n_bins += len(bins)
            each = room // length  # once an item is in a bin, that bin is the one with the least room
            used = bins[: -(-items // each)]
            taken = min(items, each * len(used))
            placed[done : done + taken] = np.repeat(used, each)[:taken]
            full, more = divmod(taken, each)
            leave(room, bins[len(used) :])
            leave(room - each * length, used[:full])
            leave(room - more * length, used[full:])
            done, items = done + taken, items - taken
    out = np.empty_like(placed)
    out[longest_first] = placed
    return out


def _stable_order(numbers: NDArray[np.int32]) -> NDArray[np.int64]:
    """Indices that sort numbers from 0 on, equal ones in the order they are in. NumPy sorts 16 bits at a time faster than 32."""
    order = np.argsort((numbers & 0xFFFF).astype(np.uint16), kind="stable")
    high = (numbers >> 16).astype(np.uint16)
    return order[np.argsort(high[order], kind="stable")] if high.any() else order


def read_best_fit(
    plans: Sequence[BestFitPlan], rows: Sequence[tuple[int, int]], seq_len: int, eot_id: int, skip: bool
) -> Batch:
    """Read sequences as planned.

    Args:
        plans: of each source.
        rows: (number of the source, number of its sequence) of each row.
        seq_len: tokens in a row.
        eot_id: what padding is made of.
        skip: leave a row whose tokens are damaged empty instead of raising.

    Raises:
        CorruptDataError: a block of a shard does not match its checksum.
        DataError: a plan is damaged and cannot be made again, or a file cannot be opened; that is never skipped.
    """
    input_ids = np.full((len(rows), seq_len), eot_id, np.int32)
    labels = np.full((len(rows), seq_len), NO_LABEL, np.int32)
    cuts: list[int] = []
    damaged: list[str] = []
    for row, (source, sequence) in enumerate(rows):
        pieces = plans[source].pieces(sequence)
        try:
            _fill(input_ids[row], labels[row], plans[source].shards, pieces)
        except CorruptDataError as error:
            if not skip:
                raise
            damaged.append(str(error))
            input_ids[row], labels[row] = eot_id, NO_LABEL
            continue
        ends = list(accumulate(length for _, length, _, _, _ in pieces))
        cuts += [row * seq_len + end for end in ends if end < seq_len]
    return Batch(input_ids, labels, number_documents(np.array(cuts, np.int64), len(rows), seq_len), tuple(damaged))


def _fill(inputs: NDArray[np.int32], labels: NDArray[np.int32], shards: ShardSet, pieces: list[Piece]) -> None:
    """Write the pieces of one row. The last token of a document is labelled where the next one begins behind it."""
    at, previous_ends = 0, False
    for start, length, begins, ends, _ in pieces:
        tokens = shards.tokens(start, start + length + (not ends))  # of a cut document, the token behind it as well
        inputs[at : at + length] = tokens[:length]
        labels[at : at + len(tokens) - 1] = tokens[1:]
        if previous_ends and begins:
            labels[at - 1] = tokens[0]
        at, previous_ends = at + length, ends


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Wait for other processes that make this plan. The lock is let go of when its process ends, however it does."""
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
    body = [array.view(np.uint8) for array in (starts.astype("<i8", copy=False), pieces)]
    edge = body[0].size

    def blocks() -> Iterator[bytes]:
        for low in range(0, edge + body[1].size, BLOCK_BYTES):
            high = low + BLOCK_BYTES
            yield body[0][low:high].tobytes() + body[1][max(0, low - edge) : max(0, high - edge)].tobytes()

    header = _HEADER.pack(_MAGIC, len(starts) - 1, len(pieces))
    checksums = b"".join(xxhash.xxh3_64_intdigest(block).to_bytes(8, "little") for block in blocks())
    try:
        with open_atomic(file, sync_parent=True) as stream:
            stream.write(header + _checksum(header + checksums) + checksums)
            stream.writelines(blocks())
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> DataError:
    way_out = "make room for it"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        way_out = "run once where the folder can be written, after which the plan is only read"
    return DataError(f"{file} cannot be written ({error.strerror}); {way_out}, or use data.packing=concatenate")


def _checksum(content: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(content).to_bytes(8, "little")
