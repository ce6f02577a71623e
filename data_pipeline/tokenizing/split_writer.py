"""Write the documents of a chunk that belong to one split as shards, and count them.

The documents of a shard are shuffled, so that neighbors in a file are not neighbors in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cleaning.clean import CONTAMINATED
from data_pipeline.reading.order import permutation_key, permute
from data_pipeline.storage.manifest import DTYPES, ManifestModel, Shard
from data_pipeline.storage.shard_writer import write_shard
from data_pipeline.storage.shards import token_dtype
from data_pipeline.text.sources import Document
from data_pipeline.tokenizing.coverage import LOST_CHARACTERS, UNKNOWN_TOKENS
from data_pipeline.tokenizing.tokenizer import Tokenizer

_GATHER_TOKENS = 4 << 20
"""Tokens shuffled at a time: the indices of all tokens of a shard would take four times its memory."""


class SplitResult(ManifestModel):
    """The counts and shards of one chunk in one split."""

    documents: int
    tokens: int
    text_bytes: int
    dropped: dict[str, int]
    repaired: dict[str, int]
    marked: dict[str, int]
    unknown_tokens: int
    lost_characters: int
    shards: tuple[Shard, ...]


@dataclass
class SplitWriter:
    """Collects the documents of one chunk in one split until a shard is full, then shuffles and writes it."""

    folder: Path
    chunk: str
    tokenizer: Tokenizer
    shard_tokens: int
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    marked: Counter[str] = field(default_factory=Counter)
    unknown_tokens: int = 0
    lost_characters: int = 0
    shards: list[Shard] = field(default_factory=list)
    _pending: list[NDArray[np.integer]] = field(default_factory=list)
    _pending_lengths: list[NDArray[np.int32]] = field(default_factory=list)
    _n_pending: int = 0

    def count_dropped(self, reason: str) -> None:
        """Count a dropped document."""
        self.dropped[reason] += 1

    def count_kept(
        self, document: Document, repairs: Sequence[str], *, marked: bool, unknown: int = 0, lost: int = 0
    ) -> None:
        """Count a document that will be added.

        Args:
            document: as it is encoded.
            repairs: how filters edited it.
            marked: it is contaminated and kept all the same.
            unknown: its unknown tokens.
            lost: its characters that the tokenizer dropped.
        """
        self.documents += 1
        self.text_bytes += document.n_bytes
        self.repaired.update(repairs)
        if document.had_invalid_unicode:
            self.repaired["invalid Unicode"] += 1
        if marked:
            self.marked[CONTAMINATED] += 1
        if unknown:
            self.marked[UNKNOWN_TOKENS] += 1
        if lost:
            self.marked[LOST_CHARACTERS] += 1
        self.unknown_tokens += unknown
        self.lost_characters += lost

    def add(self, tokens: NDArray[np.integer], lengths: NDArray[np.int32]) -> None:
        """Append documents. Writes a shard when the next document would not fit into `shard_tokens`.

        Args:
            tokens: of all documents, concatenated, with their end-of-text tokens.
            lengths: tokens of each document.
        """
        self.tokens += len(tokens)
        while len(lengths):
            stops = np.cumsum(lengths, dtype=np.int64)
            fit = int(np.searchsorted(stops, self.shard_tokens - self._n_pending, side="right"))
            if fit == 0 and self._n_pending == 0:  # a document longer than a shard gets a shard of its own
                fit = 1
            taken = int(stops[fit - 1]) if fit else 0
            if fit:
                self._pending.append(tokens[:taken].astype(DTYPES[token_dtype(self.tokenizer.vocab_size)]))
                self._pending_lengths.append(lengths[:fit])
                self._n_pending += taken
            tokens, lengths = tokens[taken:], lengths[fit:]
            if len(lengths):
                self._write()

    def finish(self) -> SplitResult:
        """Write the last shard and return the counts and all shards."""
        if self._n_pending:
            self._write()
        return SplitResult(
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            dropped=dict(+self.dropped),
            repaired=dict(+self.repaired),
            marked=dict(+self.marked),
            unknown_tokens=self.unknown_tokens,
            lost_characters=self.lost_characters,
            shards=tuple(self.shards),
        )

    def _write(self) -> None:
        tokens, lengths = np.concatenate(self._pending), np.concatenate(self._pending_lengths)
        # Cleared before shuffling, which then holds at most two copies.
        self._pending, self._pending_lengths, self._n_pending = [], [], 0
        tokens, lengths = _shuffle_documents(tokens, lengths)
        name = f"{self.chunk}-{len(self.shards)}" if self.shards else self.chunk
        self.shards.append(write_shard(self.folder, name, tokens, lengths, token_dtype(self.tokenizer.vocab_size)))


def _shuffle_documents(
    tokens: NDArray[np.integer], lengths: NDArray[np.int32]
) -> tuple[NDArray[np.integer], NDArray[np.int32]]:
    """Return the documents in a pseudo-random order that depends only on how many there are."""
    order = permute(np.arange(len(lengths)), len(lengths), permutation_key(0, 0))
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[order]
    lengths = lengths[order]
    out = np.empty_like(tokens)
    stops = np.cumsum(lengths, dtype=np.int64)
    first = written = 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(stops, written + _GATHER_TOKENS, side="right")))
        batch_lengths, stop = lengths[first:last], int(stops[last - 1])
        if len(batch_lengths) == 1:  # a document that may be longer than _GATHER_TOKENS needs no indices
            out[written:stop] = tokens[starts[first] : starts[first] + batch_lengths[0]]
        else:
            shifts = starts[first:last] - (stops[first:last] - batch_lengths - written)
            out[written:stop] = tokens[np.arange(stop - written) + np.repeat(shifts, batch_lengths)]
        first, written = last, stop
    return out, lengths
