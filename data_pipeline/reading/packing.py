"""Batches of packed sequences, and the plain way to pack: concatenate and cut.

Sequence j of a source is tokens [j * S, (j + 1) * S) of its stream, cut into its documents by the index. Every token is an input exactly
once. The last sequence is filled up with end-of-text tokens under a document id of their own and without labels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_pipeline.storage.mapped import CorruptDataError
from data_pipeline.storage.shards import ShardSet

NO_LABEL = -100
"""The label of a position that has nothing to predict; what PyTorch's cross-entropy ignores by default."""


@dataclass(frozen=True)
class Batch:
    """Packed sequences, each array of shape [sequences, seq_len] and int32. `input_ids` and `labels` may be views of one array."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    """The token to predict. The end-of-text token, the last of its document, predicts how the next one in its row begins. NO_LABEL where
    there is no next token, and on padding."""
    document_ids: NDArray[np.int32]
    """0, 1, 2, ... within each row; padding has an id of its own."""
    damaged: tuple[str, ...] = ()
    """A message for each row whose tokens are damaged: it is all padding, of document 0. A row behind the end of a source is all padding
    as well, and is not damaged."""

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """0, 1, 2, ... from the first token of the document in this row: always below seq_len, also where the row cuts a document."""
        rows, seq_len = self.document_ids.shape
        ids = self.document_ids.ravel()
        starts, lengths = _runs((ids[1:] != ids[:-1]).nonzero()[0] + 1, rows, seq_len)
        return (np.arange(ids.size, dtype=np.int32) - starts.astype(np.int32).repeat(lengths)).reshape(rows, seq_len)


def count_sequences(n_tokens: int, seq_len: int) -> int:
    """Sequences that hold `n_tokens`, the last one perhaps padded."""
    return -(-n_tokens // seq_len)


def read_concatenated(
    sources: Sequence[ShardSet], rows: Sequence[tuple[int, int]], seq_len: int, eot_id: int, skip: bool
) -> Batch:
    """Read rows of `seq_len` tokens from the streams of the sources.

    Args:
        sources: the streams.
        rows: (number of the source, first token) of each row; the first token may lie behind the stream's end.
        seq_len: tokens in a row.
        eot_id: what padding is made of.
        skip: leave a row whose tokens are damaged empty instead of raising.

    Raises:
        CorruptDataError: a block of a shard, or an index, does not match its checksum.
        DataError: a file cannot be opened; that is never skipped.
    """
    tokens = np.empty((len(rows), seq_len + 1), np.int32)
    lengths: list[int] = []  # of each row, at most seq_len + 1: the label of the last token is there as well
    starts: list[NDArray[np.int64]] = []  # byte offsets in a shard at which documents start, a superset
    places: list[
        int
    ] = []  # four a piece: how many those are, itemsize, from a token of the shard to its place, row's place
    damaged: list[str] = []
    for row, (source, start) in enumerate(rows):
        shards, done, whole = sources[source], 0, len(starts)
        try:
            end = start + seq_len + 1
            if end > shards.n_tokens:
                start, end = min(start, shards.n_tokens), shards.n_tokens
            for file, low, high in shards.spans(start, end):
                tokens[row, done : done + high - low] = file.tokens(low, high)
                starts.append(near := file.starts_near(low, high))
                places += (len(near), file.itemsize, row * seq_len + done - low, row * seq_len)
                done += high - low
        except CorruptDataError as error:
            if not skip:
                raise
            damaged.append(str(error))
            del starts[whole:], places[4 * whole :]
            done = 0
        lengths.append(done)
    labels, cuts = tokens[:, 1:], _cuts(starts, places, seq_len) if starts else np.empty(0, np.int64)
    if lengths and min(lengths) <= seq_len:
        labels = _pad(tokens, lengths, eot_id)
        padding = [row * seq_len + length for row, length in enumerate(lengths) if length <= seq_len]
        cuts = np.concatenate((cuts, np.array(padding)))
    return Batch(tokens[:, :-1], labels, number_documents(cuts, len(rows), seq_len), tuple(damaged))


def number_documents(cuts: NDArray[np.int64], rows: int, seq_len: int) -> NDArray[np.int32]:
    """Document ids [rows, seq_len].

    Args:
        cuts: the places row * seq_len + column at which a document starts, in any order and as often as you like. That each row starts
            one need not be said.
        rows: number of rows.
        seq_len: their length.
    """
    starts, lengths = _runs(cuts, rows, seq_len)
    first_of_row = starts.searchsorted(_edges(rows, seq_len)[:-1])
    ids = np.arange(len(starts)) - first_of_row[starts // seq_len]
    return ids.astype(np.int32).repeat(lengths).reshape(rows, seq_len)


def _runs(cuts: NDArray[np.int64], rows: int, seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts, lengths) of what `rows` rows, one after the other, are cut into at these places and where a row starts."""
    starts = np.concatenate((_edges(rows, seq_len), cuts))
    starts.sort()
    lengths = starts[1:] - starts[:-1]
    once = lengths.nonzero()[0]
    return starts[once], lengths[once]


@functools.lru_cache(maxsize=8)
def _edges(rows: int, seq_len: int) -> NDArray[np.int64]:
    """Where each of `rows` rows begins, one after the other, and where the last one ends. Nobody writes into it."""
    return np.arange(0, rows * seq_len + 1, seq_len)


def _cuts(starts: list[NDArray[np.int64]], places: list[int], seq_len: int) -> NDArray[np.int64]:
    """The document starts near some places as `number_documents` wants them; what lies outside of a row is moved to its edge."""
    each = np.array(places).reshape(-1, 4)
    itemsize, shift, low = each.repeat(each[:, 0], axis=0).T[1:]
    cuts = np.concatenate(starts)
    cuts //= itemsize
    cuts += shift
    np.maximum(cuts, low, out=cuts)
    low += seq_len
    np.minimum(cuts, low, out=cuts)
    return cuts


def _pad(tokens: NDArray[np.int32], lengths: list[int], eot_id: int) -> NDArray[np.int32]:
    """Fill the rows of `tokens` from their lengths on, and return the labels."""
    empty = np.arange(tokens.shape[1]) >= np.array(lengths)[:, None]
    tokens[empty] = eot_id
    return np.where(empty[:, 1:], np.int32(NO_LABEL), tokens[:, 1:])
