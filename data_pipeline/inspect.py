"""What a prepared data set holds, as data: counts, drops, lengths, samples, and how it was made. Drawing it is the caller's part.

Reads the manifests, every index (one shard's at a time) and the few tokens of the samples; of a data set of any size no more.
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
from data_pipeline.recipe import RecipeEntry, describe_recipe
from data_pipeline.storage.manifest import SourceManifest, SplitManifest
from data_pipeline.storage.prepared import open_prepared
from data_pipeline.storage.shards import ShardFile, ShardSet
from data_pipeline.tokenizing.tokenizer import Tokenizer

PACKED_TOKENS = 64
"""Tokens in the sequence that shows how documents are packed."""

_HEAD_TOKENS = 64
_TAIL_TOKENS = 16

_VISIBLE = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    | {127: 0x2421}
    | dict.fromkeys(range(128, 160), 0xFFFD)
)
"""Control characters of a text become their pictures: nothing that a terminal would obey."""

DecodedText = tuple[str | None, ...]
"""Text for people, in pieces; None stands for an end-of-text token."""


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
    """Its number in its source's part of the split."""
    start: int
    """Its first token's place in the stream of that part."""
    stop: int
    """One past its last token."""
    head: DecodedText
    """Its first tokens; all of it where `tail` is empty."""
    tail: DecodedText
    """Its last tokens."""


@dataclass(frozen=True)
class PackedPiece:
    """A run of tokens of one document in a packed sequence."""

    number: int
    """Of the document, as in SampleDocument."""
    first: int
    """Which token of its document the first one is, from 0."""
    count: int
    length: int
    """Tokens of the whole document."""
    text: DecodedText


@dataclass(frozen=True)
class PackedSequence:
    """A sequence of PACKED_TOKENS as concatenation cuts it from the stream, chosen such that documents meet in it, if any do."""

    start: int
    """Its first token's place in the stream."""
    pieces: tuple[PackedPiece, ...]
    padding: int
    """End-of-text tokens that fill it up."""


@dataclass(frozen=True)
class SourceDuplicates:
    """Documents of `source` that were dropped because `kept_in` holds them too."""

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
    """Powers of two, from the shortest to the longest document, of all splits."""
    samples: tuple[SampleDocument, ...]
    """Evenly spaced over the training split, or over another where that holds nothing of the source."""
    packed: PackedSequence | None
    """None if no samples are wanted, or there is no document."""

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
        """Documents dropped by reason, the most frequent first; duplicates of whatever source are one reason."""
        return _most_first(
            (_KINDS.get(reason.partition(": ")[0], reason), count) for reason, count in self._counts("dropped")
        )

    @property
    def changes(self) -> dict[str, int]:
        """Documents that are kept with a remark: repaired or marked, by reason."""
        return _most_first(
            (f"{what}: {reason}", count) for what in ("repaired", "marked") for reason, count in self._counts(what)
        )

    @property
    def duplicates(self) -> tuple[SourceDuplicates, ...]:
        """Where the documents are that it repeated."""
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
        """(shards whose tokens are files of others, the folder or file that holds them all); None if all are our own."""
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
"""Reasons that name the source of the document that is kept."""


@dataclass(frozen=True)
class DataDescription:
    """A prepared data set."""

    path: Path
    tokenizer: Tokenizer
    end_of_text: str
    """How the tokenizer spells its end-of-text token."""
    splits: Mapping[str, SplitManifest]
    """In the order train, validation."""
    sources: tuple[SourceDescription, ...]
    recipe: Mapping[str, tuple[RecipeEntry, ...]]
    """How it was made, by sections."""

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(manifest.tokens for manifest in self.splits.values())

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        return sum(manifest.documents for manifest in self.splits.values())


def describe_data(path: Path, samples: int = 3, trusted_paths: Sequence[Path] | None = None) -> DataDescription:
    """Describe a prepared data set, with `samples` documents of each source. `trusted_paths` as in `shards.open_split`.

    Raises:
        DataError: there is none at `path`, or it is damaged.
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
    """UTF-8 bytes of text by token, end-of-text tokens included: loss / ln 2 / this is bits per byte. None where it is not known."""
    known = [(part.text_bytes, part.tokens) for part in parts if part.text_bytes and part.tokens]
    return sum(size for size, _ in known) / sum(tokens for _, tokens in known) if known else None


def _most_first(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
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
            lengths = ShardFile(path / split, shard, part.dtype).lengths  # mapped, and let go of before the next
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
    """The sequence in which a document in the middle of the stream starts, preferably not with its first token."""
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
