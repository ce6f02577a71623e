"""Batches of packed sequences, and the simplest packing: concatenate documents, cut the stream every `seq_len` tokens.

Sequence j of a source holds tokens [j * S, (j + 1) * S) of the source's stream, S = seq_len. Every token is an input
exactly once. The last sequence is padded with end-of-text tokens, which have a document id of their own and no labels.

One row of S = 8 tokens, read from token 10 of a stream. Its first shard, A, ends with token 14. Documents start at the
tokens 12, 15 and 17:

    stream         10  11  12  13  14 | 15  16  17  18
    shard           A   A   A   A   A |  B   B   B   B     2 spans: tokens [10, 15) of A and [0, 4) of B
    column          0   1   2   3   4    5   6   7   8
    input_ids      10  11  12  13  14   15  16  17
    labels         11  12  13  14  15   16  17  18         column 8 is read because it is the label of column 7
    document_ids    0   0   1   1   1    2   2   3         columns 2, 5 and 7 start documents
    positions       0   1   0   1   2    0   1   0
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_pipeline.storage.mapped import CorruptDataError
from data_pipeline.storage.shards import ShardSet

NO_LABEL = -100
"""The label of a position that has nothing to predict. PyTorch's cross-entropy ignores it by default."""


@dataclass(frozen=True)
class Batch:
    """Packed sequences: int32 arrays [rows, seq_len]. `input_ids` and `labels` may be views of one array."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    """The token to predict. The last token of a document, its end-of-text, predicts the first token of the next
    document in its row. NO_LABEL on padding, and where no token follows."""
    document_ids: NDArray[np.int32]
    """0, 1, 2, ... within each row; padding has an id of its own."""
    damaged: tuple[str, ...] = ()
    """One message for each row whose tokens are damaged. Such a row is all padding, with document id 0. Rows that lie
    behind the end of a source are all padding too, but not damaged."""
    row_ids: NDArray[np.int64] | None = None
    """Sample at which each row begins in the stream that was read; None if nobody said."""

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """Position of each token in its document, counted from the document's first token in this row."""
        rows, seq_len = self.document_ids.shape
        ids = self.document_ids.ravel()
        starts, lengths = _runs((ids[1:] != ids[:-1]).nonzero()[0] + 1, rows, seq_len)
        return (np.arange(ids.size, dtype=np.int32) - starts.astype(np.int32).repeat(lengths)).reshape(rows, seq_len)


@dataclass(slots=True)
class RowSpans:
    """The spans that the rows of a batch read. A span is a run of consecutive tokens of one shard.

    One list a field and one entry a span, because NumPy turns these lists into arrays faster than a list of objects.
    A position in the batch is row * seq_len + column.
    """

    document_starts: list[NDArray[np.int64]] = field(default_factory=list)
    """Byte offsets in the shard at which documents start: all that start in the span, and some that start near it."""
    itemsizes: list[int] = field(default_factory=list)
    """Bytes of a token in the shard."""
    shifts: list[int] = field(default_factory=list)
    """What to add to the index of a token in the shard to get its position in the batch."""
    row_starts: list[int] = field(default_factory=list)
    """Position of the first column of the row."""

    def drop_row(self, row_start: int) -> None:
        """Forget the spans of the last row, which begins at position `row_start`."""
        keep = bisect_left(self.row_starts, row_start)
        del self.document_starts[keep:], self.itemsizes[keep:], self.shifts[keep:], self.row_starts[keep:]


def count_sequences(n_tokens: int, seq_len: int) -> int:
    """Return how many sequences hold `n_tokens`; the last one may be padded."""
    return -(-n_tokens // seq_len)


def read_concatenated(
    sources: Sequence[ShardSet], rows: Sequence[tuple[int, int]], seq_len: int, eot_id: int, skip: bool
) -> Batch:
    """Read rows of `seq_len` consecutive tokens from the streams of the sources.

    Args:
        sources: the streams.
        rows: (index of the source, first token in its stream) of each row. The first token may lie behind the end of
            the stream.
        seq_len: tokens in a row.
        eot_id: the token to pad with.
        skip: turn a row of damaged tokens into padding instead of raising.

    Raises:
        CorruptDataError: a block of a shard, or an index, does not match its checksum.
        DataError: a file cannot be opened. Not affected by `skip`.
    """
    tokens = np.empty((len(rows), seq_len + 1), np.int32)
    lengths: list[int] = []  # tokens read for each row, at most seq_len + 1
    spans = RowSpans()
    damaged: list[str] = []
    for row, (source, start) in enumerate(rows):
        shards, column, row_start = sources[source], 0, row * seq_len
        try:
            stop = start + seq_len + 1
            if stop > shards.n_tokens:
                start, stop = min(start, shards.n_tokens), shards.n_tokens
            for file, low, high in shards.spans(start, stop):
                tokens[row, column : column + high - low] = file.tokens(low, high)
                spans.document_starts.append(file.document_starts_near(low, high))
                spans.itemsizes.append(file.itemsize)
                spans.shifts.append(row_start + column - low)
                spans.row_starts.append(row_start)
                column += high - low
        except CorruptDataError as error:
            if not skip:
                raise
            damaged.append(str(error))
            spans.drop_row(row_start)
            column = 0
        lengths.append(column)
    labels, starts = tokens[:, 1:], _locate_document_starts(spans, seq_len)
    if lengths and min(lengths) <= seq_len:
        labels = _pad(tokens, lengths, eot_id)
        padding = [row * seq_len + length for row, length in enumerate(lengths) if length <= seq_len]
        starts = np.concatenate((starts, np.array(padding)))
    return Batch(tokens[:, :-1], labels, number_documents(starts, len(rows), seq_len), tuple(damaged))


def _locate_document_starts(spans: RowSpans, seq_len: int) -> NDArray[np.int64]:
    """Return the positions at which documents start. Starts outside of a row are moved to the edge of the row."""
    if not spans.document_starts:
        return np.empty(0, np.int64)
    counts = list(map(len, spans.document_starts))
    itemsize, shift, row_start = np.array((spans.itemsizes, spans.shifts, spans.row_starts)).repeat(counts, axis=1)
    starts = np.concatenate(spans.document_starts)
    starts //= itemsize
    starts += shift
    np.maximum(starts, row_start, out=starts)
    row_start += seq_len
    np.minimum(starts, row_start, out=starts)
    return starts


def _pad(tokens: NDArray[np.int32], lengths: list[int], eot_id: int) -> NDArray[np.int32]:
    """Fill the rows of `tokens` [rows, seq_len + 1] from their lengths on with padding, and return the labels [rows,
    seq_len]."""
    is_padding = np.arange(tokens.shape[1]) >= np.array(lengths)[:, None]
    tokens[is_padding] = eot_id
    return np.where(is_padding[:, 1:], np.int32(NO_LABEL), tokens[:, 1:])


def number_documents(starts: NDArray[np.int64], rows: int, seq_len: int) -> NDArray[np.int32]:
    """Return document ids [rows, seq_len].

    Args:
        starts: positions row * seq_len + column at which documents start, in any order, duplicates allowed. Column 0 of
            a row always starts one and need not be listed.
        rows: number of rows.
        seq_len: tokens in a row.
    """
    starts, lengths = _runs(starts, rows, seq_len)
    first_of_row = starts.searchsorted(_edges(rows, seq_len)[:-1])
    ids = np.arange(len(starts)) - first_of_row[starts // seq_len]
    return ids.astype(np.int32).repeat(lengths).reshape(rows, seq_len)


def _runs(starts: NDArray[np.int64], rows: int, seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (starts, lengths) of the non-empty runs of tokens that these positions and the starts of the rows
    delimit."""
    starts = np.concatenate((_edges(rows, seq_len), starts))
    starts.sort()
    lengths = starts[1:] - starts[:-1]
    not_empty = lengths.nonzero()[0]
    return starts[not_empty], lengths[not_empty]


@functools.lru_cache(maxsize=8)
def _edges(rows: int, seq_len: int) -> NDArray[np.int64]:
    """Return the start of each row, and the end of the last row. The array is cached: do not write into it."""
    return np.arange(0, rows * seq_len + 1, seq_len)
