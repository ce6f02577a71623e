"""Concatenate and chunk: sequence j is tokens [j * S, (j + 1) * S) of a split's stream, cut into its documents by the index.

Every token of the split is an input exactly once. The last sequence is filled up with end-of-text tokens under a document id
of their own and without labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import ShardSet

NO_LABEL = -100
"""The label of a position that has nothing to predict; what PyTorch's cross-entropy ignores by default."""


@dataclass(frozen=True)
class Batch:
    """Packed sequences, each array of shape [sequences, seq_len]."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    """The next token of the stream: the end-of-text token, the last of its document, predicts how the next one begins, so that every
    token but the split's first is predicted once an epoch. NO_LABEL at the split's last token and on padding."""
    positions: NDArray[np.int32]
    """0, 1, 2, ... from the first token of the document in this row: always below seq_len, also where the row cuts a document."""
    document_ids: NDArray[np.int32]
    """0, 1, 2, ... within each row; padding has an id of its own."""


def count_sequences(n_tokens: int, seq_len: int) -> int:
    """Sequences that hold `n_tokens`, the last one perhaps padded."""
    return -(-n_tokens // seq_len)


def pack(shards: ShardSet, sequences: NDArray[np.int64], seq_len: int) -> Batch:
    """Read the numbered sequences; row i of the batch is sequence `sequences[i]`.

    Raises:
        DataError: a block of a shard does not match its checksum.
    """
    shape = (len(sequences), seq_len)
    batch = Batch(
        input_ids=np.full(shape, shards.manifest.eot_id, np.int64),
        labels=np.full(shape, NO_LABEL, np.int64),
        positions=np.empty(shape, np.int32),
        document_ids=np.empty(shape, np.int32),
    )
    for row, sequence in enumerate(sequences.tolist()):
        _fill_row(batch, row, shards, sequence * seq_len)
    return batch


def _fill_row(batch: Batch, row: int, shards: ShardSet, start: int) -> None:
    seq_len = batch.input_ids.shape[1]
    stop = min(start + seq_len, shards.n_tokens)
    length = stop - start
    tokens = shards.tokens(start, min(stop + 1, shards.n_tokens))  # one more: the label of the last
    batch.input_ids[row, :length] = tokens[:length]
    batch.labels[row, : len(tokens) - 1] = tokens[1:]
    cuts = shards.document_starts(start + 1, stop) - start  # where a document begins after the row's first token
    first = np.concatenate([[0], cuts, [length] if length < seq_len else []]).astype(np.int64)  # padding is a document too
    lengths = np.diff(first, append=seq_len)
    batch.document_ids[row] = np.repeat(np.arange(len(first), dtype=np.int32), lengths)
    batch.positions[row] = np.arange(seq_len) - np.repeat(first, lengths)
