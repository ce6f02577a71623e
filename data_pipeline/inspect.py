"""The contents of a prepared data set, as plain data for display: counts, drops, lengths, samples, and how it was made.

Reads the manifests, every index (one at a time) and the few tokens of the samples, whatever the size of the data set.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reading.packing import read_concatenated
from data_pipeline.recipe_text import RecipeEntry, describe_recipe
from data_pipeline.storage.manifest import SourceManifest, SplitManifest
from data_pipeline.storage.prepared import open_prepared
from data_pipeline.storage.shards import ShardFile, ShardSet
from data_pipeline.tokenizing.tokenizer import Tokenizer

PACKED_TOKENS = 64
"""Length of the sequence that shows how documents are packed."""

_HEAD_TOKENS = 64
_TAIL_TOKENS = 16

_VISIBLE = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    | {127: 0x2421}
    | dict.fromkeys(range(128, 160), 0xFFFD)
)
"""Replaces control characters by printable pictures of them, so that a terminal does not interpret them."""

DecodedText = tuple[str | None, ...]
"""Text for display, in pieces. None stands for an end-of-text token."""


@dataclass(frozen=True)
class LengthBin:
    """Documents of `low` to 2 * `low` - 1 tokens, the end-of-text token included."""

    low: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class SampleDocument:
    """One document, read back from the shards."""

    split: str
    number: int
    """Index of the document among the documents of its source in the split."""
    start: int
    """Index of its first token in the stream of its source."""
    stop: int
    """One past its last token."""
    head: DecodedText
    """Its first tokens, or all tokens if `tail` is empty."""
    tail: DecodedText
    """Its last tokens."""


@dataclass(frozen=True)
class PackedPiece:
    """The tokens of one document in a packed sequence."""

    number: int
    """Index of the document, as in SampleDocument."""
    first: int
    """Index of the first token in its document."""
    count: int
    """Tokens of the piece."""
    length: int
    """Tokens of the whole document."""
    text: DecodedText


@dataclass(frozen=True)
class PackedSequence:
    """A sequence of PACKED_TOKENS tokens as `concatenate` packs it, if possible one in which a document begins."""

    start: int
    """Index of its first token in the stream."""
    pieces: tuple[PackedPiece, ...]
    padding: int
    """Padding tokens at its end."""


@dataclass(frozen=True)
class SourceDuplicates:
    """Counts of documents of `source` that were dropped because `kept_in` holds them too."""

    source: str
    kept_in: str
    exact: int
    near: int


@dataclass(frozen=True)
class SourceDescription:
    """One source in all splits."""

    name: str
    splits: Mapping[str, SourceManifest]
    lengths: tuple[LengthBin, ...]
    """Lengths of the documents of all splits, in bins of powers of two."""
    samples: tuple[SampleDocument, ...]
    """Evenly spaced over the training split, or over the validation split if only that one holds the source."""
    packed: PackedSequence | None
    """None if no samples were requested, or there are no documents."""

    @property
    def read(self) -> int:
        """Documents read: written or dropped."""
        return sum(part.read for part in self.splits.values())

    @property
    def documents(self) -> int:
        """Documents written."""
        return sum(part.documents for part in self.splits.values())

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return sum(part.tokens for part in self.splits.values())

    @property
    def drops(self) -> dict[str, int]:
        """Dropped documents by reason, the most frequent first. Duplicates of all sources are counted together."""
        return _sort_by_count(
            (_KINDS.get(reason.partition(": ")[0], reason), count) for reason, count in self._counts("dropped")
        )

    @property
    def changes(self) -> dict[str, int]:
        """Documents that were kept, but repaired or marked, by reason."""
        return _sort_by_count(
            (f"{what}: {reason}", count) for what in ("repaired", "marked") for reason, count in self._counts(what)
        )

    @property
    def duplicates(self) -> tuple[SourceDuplicates, ...]:
        """Dropped duplicates by the source that holds the kept document."""
        counts = Counter(dict[tuple[str, str], int]())
        for reason, count in self._counts("dropped"):
            kind, _, kept_in = reason.partition(": ")
            if kind in _KINDS:
                counts[kind.removesuffix("_of_held_out"), kept_in] += count
        sources = dict.fromkeys(kept_in for _, kept_in in counts)
        return tuple(
            SourceDuplicates(self.name, to, counts["exact_duplicate", to], counts["near_duplicate", to])
            for to in sources
        )

    @property
    def in_place(self) -> tuple[int, str] | None:
        """(number of shards that are read in place, the folder or file that holds them); None if there are none."""
        files = [
            shard.external_bin
            for part in self.splits.values()
            for shard in part.shards
            if shard.external_bin is not None
        ]
        return (len(files), os.path.commonpath(files)) if files else None

    def _counts(self, what: str) -> list[tuple[str, int]]:
        return [item for part in self.splits.values() for item in getattr(part, what).items()]


_KINDS = {
    "exact_duplicate": "exact duplicate",
    "near_duplicate": "near duplicate",
    "exact_duplicate_of_held_out": "exact duplicate of held-out text",
    "near_duplicate_of_held_out": "near duplicate of held-out text",
}
"""Reasons that end with the source of the document that was kept."""


@dataclass(frozen=True)
class DataDescription:
    """A prepared data set."""

    path: Path
    tokenizer: Tokenizer
    end_of_text: str
    """Text of the tokenizer's end-of-text token."""
    splits: Mapping[str, SplitManifest]
    """In the order train, validation."""
    sources: tuple[SourceDescription, ...]
    recipe: Mapping[str, tuple[RecipeEntry, ...]]
    """How it was made, by section."""

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(manifest.tokens for manifest in self.splits.values())

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        return sum(manifest.documents for manifest in self.splits.values())


def describe_data(path: Path, samples: int = 3, trusted_paths: Sequence[Path] | None = None) -> DataDescription:
    """Describe a prepared data set.

    Args:
        path: `data.path`.
        samples: sample documents of each source.
        trusted_paths: as in `shards.open_split`.

    Raises:
        DataError: there is no prepared data at `path`, or it is damaged.
    """
    prepared = open_prepared(path, trusted_paths=trusted_paths)
    names = dict.fromkeys(source.name for manifest in prepared.splits.values() for source in manifest.sources)
    return DataDescription(
        path=path,
        tokenizer=prepared.tokenizer,
        end_of_text=prepared.tokenizer.decode([prepared.tokenizer.eot_id]),
        splits=prepared.splits,
        sources=tuple(_describe_source(path, name, prepared.splits, prepared.tokenizer, samples) for name in names),
        recipe=describe_recipe(prepared.splits["train"], prepared.tokenizer),
    )


def bytes_per_token(parts: Iterable[SourceManifest]) -> float | None:
    """Return UTF-8 bytes of text per token, end-of-text tokens included, or None if unknown. Bits per byte = loss / ln
    2 / this."""
    known = [(part.text_bytes, part.tokens) for part in parts if part.text_bytes and part.tokens]
    return sum(size for size, _ in known) / sum(tokens for _, tokens in known) if known else None


def _sort_by_count(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    total = Counter(dict[str, int]())
    for reason, count in counts:
        total[reason] += count
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _describe_source(
    path: Path, name: str, splits: Mapping[str, SplitManifest], tokenizer: Tokenizer, samples: int
) -> SourceDescription:
    parts = {split: source for split, manifest in splits.items() for source in manifest.sources if source.name == name}
    shown = next((split for split, part in parts.items() if part.documents and samples), None)
    documents: tuple[SampleDocument, ...] = ()
    packed = None
    if shown is not None:
        shards = ShardSet(path / shown, parts[shown])
        count = min(samples, shards.n_documents)
        documents = tuple(_sample(shards, shown, tokenizer, i * shards.n_documents // count) for i in range(count))
        packed = _packed(shards, tokenizer)
    return SourceDescription(name, parts, _length_bins(path, parts), documents, packed)


def _length_bins(path: Path, parts: Mapping[str, SourceManifest]) -> tuple[LengthBin, ...]:
    documents, tokens = np.zeros(32, np.int64), np.zeros(32, np.int64)
    for split, part in parts.items():
        for shard in part.shards:
            lengths = ShardFile(path / split, shard, part.dtype).lengths  # unmapped before the next shard is mapped
            power = np.frexp(lengths)[1] - 1  # floor(log2), exact for 31-bit numbers
            documents += np.bincount(power, minlength=32)
            tokens += np.bincount(power, lengths, minlength=32).astype(np.int64)
    used = np.flatnonzero(documents).tolist()
    return (
        tuple(LengthBin(1 << k, int(documents[k]), int(tokens[k])) for k in range(used[0], used[-1] + 1))
        if used
        else ()
    )


def _sample(shards: ShardSet, split: str, tokenizer: Tokenizer, number: int) -> SampleDocument:
    start, stop = shards.document_span(number)
    middle = stop if stop - start <= _HEAD_TOKENS + _TAIL_TOKENS else start + _HEAD_TOKENS
    head = _decode(shards.tokens(start, middle), tokenizer)
    tail = _decode(shards.tokens(stop - _TAIL_TOKENS, stop), tokenizer) if middle < stop else ()
    return SampleDocument(split, number, start, stop, head, tail)


def _packed(shards: ShardSet, tokenizer: Tokenizer) -> PackedSequence:
    """Return a sequence from the middle of the stream in which a document begins, preferably not at its first token."""
    near = range(shards.n_documents // 2, min(shards.n_documents, shards.n_documents // 2 + 8))
    known = next((number for number in near if shards.document_span(number)[0] % PACKED_TOKENS), near[0])
    known_start = shards.document_span(known)[0]
    start = known_start // PACKED_TOKENS * PACKED_TOKENS
    stop = min(start + PACKED_TOKENS, shards.n_tokens)
    batch = read_concatenated([shards], [(0, start)], PACKED_TOKENS, tokenizer.eot_id, skip=False)
    ids, documents = batch.input_ids[0, : stop - start], batch.document_ids[0, : stop - start]
    pieces = []
    for piece in range(int(documents[-1]) + 1):
        number = known + piece - int(documents[known_start - start])
        low, high = np.searchsorted(documents, [piece, piece + 1]).tolist()
        first, last = shards.document_span(number)
        pieces.append(
            PackedPiece(number, start + low - first, high - low, last - first, _decode(ids[low:high], tokenizer))
        )
    return PackedSequence(start, tuple(pieces), start + PACKED_TOKENS - stop)


def _decode(ids: NDArray[np.integer], tokenizer: Tokenizer) -> DecodedText:
    pieces: list[str | None] = []
    start = 0
    for end in [*np.flatnonzero(ids == tokenizer.eot_id).tolist(), len(ids)]:
        if start < end:
            pieces.append(tokenizer.decode(ids[start:end].tolist()).translate(_VISIBLE))
        if end < len(ids):
            pieces.append(None)
        start = end + 1
    return tuple(pieces)
