"""What a prepared data set holds, as data; drawing it is the caller's part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import Manifest
from data_pipeline.prepared import open_prepared
from data_pipeline.shards import ShardSet
from data_pipeline.tokenizer import Tokenizer

_HEAD_TOKENS = 64
_TAIL_TOKENS = 16


@dataclass(frozen=True)
class LengthBin:
    """Documents of `low` to `high` - 1 tokens, the end-of-text token included."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class SampleDocument:
    """One document, read back from the shards."""

    index: int
    """Its number in the split."""
    start: int
    """Its first token's place in the split's stream."""
    stop: int
    """One past its end-of-text token."""
    head: str
    """Its first tokens, decoded; all of it where `tail` is empty."""
    tail: str
    """Its last tokens, decoded, down to the end-of-text token."""


@dataclass(frozen=True)
class SplitDescription:
    """One split."""

    name: str
    manifest: Manifest
    bytes_per_token: float
    """UTF-8 bytes of text by token, end-of-text tokens included: loss / ln 2 / this is bits per byte."""
    lengths: tuple[LengthBin, ...]
    """Powers of two, from the shortest to the longest document."""
    samples: tuple[SampleDocument, ...]
    """Evenly spaced over the split."""


@dataclass(frozen=True)
class Description:
    """A prepared data set."""

    path: Path
    tokenizer: Tokenizer
    splits: tuple[SplitDescription, ...]


def describe(path: Path, samples: int = 3) -> Description:
    """Describe a prepared data set, with `samples` documents of each split.

    Raises:
        DataError: there is none at `path`, or it is damaged.
    """
    prepared = open_prepared(path)
    return Description(
        path, prepared.tokenizer, tuple(_describe_split(path / name, prepared.tokenizer, samples) for name in prepared.splits)
    )


def _describe_split(folder: Path, tokenizer: Tokenizer, samples: int) -> SplitDescription:
    shards = ShardSet.open(folder)
    count = min(samples, shards.n_documents)
    return SplitDescription(
        name=folder.name,
        manifest=shards.manifest,
        bytes_per_token=shards.manifest.text_bytes / shards.n_tokens,
        lengths=_length_bins(shards),
        samples=tuple(_sample(shards, tokenizer, i * shards.n_documents // count) for i in range(count)),
    )


def _length_bins(shards: ShardSet) -> tuple[LengthBin, ...]:
    documents, tokens = np.zeros(32, np.int64), np.zeros(32, np.int64)
    for lengths in shards.document_lengths():
        power = np.frexp(lengths)[1] - 1  # floor(log2), exact for 31-bit numbers
        documents += np.bincount(power, minlength=32)
        tokens += np.bincount(power, lengths, minlength=32).astype(np.int64)
    used = np.flatnonzero(documents)
    return tuple(LengthBin(1 << k, 2 << k, int(documents[k]), int(tokens[k])) for k in range(used[0], used[-1] + 1))


def _sample(shards: ShardSet, tokenizer: Tokenizer, index: int) -> SampleDocument:
    start, stop = shards.document_span(index)
    middle = stop if stop - start <= _HEAD_TOKENS + _TAIL_TOKENS else start + _HEAD_TOKENS
    tail = shards.tokens(stop - _TAIL_TOKENS, stop).tolist() if middle < stop else []
    return SampleDocument(index, start, stop, tokenizer.decode(shards.tokens(start, middle).tolist()), tokenizer.decode(tail))
