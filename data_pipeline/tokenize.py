"""One chunk of text -> one shard of each split: the work of `prepare` that takes the time.

The same chunk, verdicts and tokenizer give the same bytes, whoever does it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import Chunk, read_batches
from data_pipeline.clean import CONTAMINATED, EMPTY, edited
from data_pipeline.encoder import Encoder, fastest_encoder
from data_pipeline.errors import DataError
from data_pipeline.manifest import DTYPES, SPLITS, Record, Shard, TokenDtype
from data_pipeline.order import order_key, permute
from data_pipeline.rejects import RejectWriter
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.shard_writer import write_shard
from data_pipeline.shards import token_dtype
from data_pipeline.sources import Document
from data_pipeline.tokenizer import Tokenizer, document_hash, load_tokenizer
from data_pipeline.verdicts import Verdicts, read_verdicts
from data_pipeline.workers import Done, Tell

_SAMPLE_CHARACTERS = 64 << 10
_GATHER_TOKENS = 4 << 20


class SplitResult(Record):
    """What a chunk gave to one split."""

    documents: int
    tokens: int
    text_bytes: int
    dropped: dict[str, int]
    repaired: dict[str, int]
    marked: dict[str, int]
    shards: tuple[Shard, ...]


class ChunkResult(Record):
    """What became of a chunk; the record that it is done."""

    chunk: str
    key: str
    """Hash of all that decided it; a result of another key is no result."""
    read: int
    """Documents."""
    encoder: str
    """The back end that encoded it; empty where nothing was kept."""
    why: str
    """Why that one."""
    lowest: float
    """Lowest place of a kept document, see `place`; 2 where none is kept."""
    splits: dict[str, SplitResult]

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return sum(split.tokens for split in self.splits.values())


@dataclass(frozen=True)
class TokenizeJob:
    """A chunk, and all that decides what becomes of it."""

    chunk: Chunk
    source: SourceConfig
    config: PrepareConfig
    work: Path
    tokenizer: Path
    fraction: float
    """Documents whose place is below it are held out."""
    verdicts: Path | None
    """None where every document that is not empty is kept."""
    keep_rejects: bool
    key: str

    @property
    def name(self) -> str:
        """The chunk's name."""
        return self.chunk.name

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that it fills."""
        return SPLITS if self.fraction > 0 else ("train",)


def place(document: Document) -> float:
    """A document's place in [0, 1], by the hash of its name: independent of order, settings and everything else."""
    return document_hash(f"{document.source}\0{document.id}", salt=0) / 2**64


def tokenize_chunk(job: TokenizeJob, tell: Tell) -> ChunkResult:
    """Read the chunk, encode what is kept, write its shards to `<work>/train` and `<work>/validation`.

    Raises:
        DataError: a document cannot be read or encoded; it is named.
    """
    tokenizer = _tokenizer(job.tokenizer)
    splits = {name: _SplitWriter(job.work / name, job.chunk.name, tokenizer, job.config.shard_tokens) for name in job.splits}
    verdicts = read_verdicts(job.verdicts) if job.verdicts else None
    encoder: Encoder | None = None
    why, lowest, read, seen = "", 2.0, 0, 0
    with RejectWriter(job.work / "rejects" / f"{job.chunk.name}.jsonl.zst" if job.keep_rejects else None) as rejects:
        for batch in read_batches(job.chunk, job.source):
            kept: list[tuple[_SplitWriter, Document]] = []
            for number, document in enumerate(batch, start=seen):
                here = place(document)
                split = splits["validation" if here < job.fraction else "train"]
                reason = _reason(document, verdicts, number, job)
                if reason is not None:
                    split.dropped[reason] += 1
                    rejects.write(document, reason)
                    continue
                document, repairs = edited(document, job.source, job.config)
                split.note(document, repairs, marked=verdicts is not None and bool(verdicts.marks[number]))
                lowest = min(lowest, here)
                kept.append((split, document))
            if encoder is None and kept:
                encoder, why = _encoder(job.tokenizer, tuple(_sample(document for _, document in kept)))
            n_tokens = _encode(encoder, kept, tokenizer.eot_id) if encoder else 0
            seen += len(batch)
            tell(Done(len(batch), batch[-1].read - read, n_tokens))
            read = batch[-1].read
    tell(Done(0, (job.chunk.bytes or read) - read))
    _check_same_documents(job, verdicts, seen)
    return ChunkResult(
        chunk=job.chunk.name,
        key=job.key,
        read=seen,
        encoder=encoder.name if encoder else "",
        why=why,
        lowest=lowest,
        splits={name: split.finish() for name, split in splits.items()},
    )


@functools.lru_cache(maxsize=1)
def _tokenizer(file: Path) -> Tokenizer:
    """Loaded once a process."""
    return load_tokenizer(file)


def _encoder(file: Path, sample: tuple[str, ...]) -> tuple[Encoder, str]:
    return fastest_encoder(_tokenizer(file), sample)


def _sample(documents: Iterable[Document]) -> Iterator[str]:
    """The beginning of the documents, on which the fast encoder must equal the reference."""
    left = _SAMPLE_CHARACTERS
    for document in documents:
        yield document.text[:left]
        left -= len(document.text)
        if left <= 0:
            return


def _reason(document: Document, verdicts: Verdicts | None, number: int, job: TokenizeJob) -> str | None:
    if verdicts is None:
        return None if document.text.strip() else EMPTY
    if number >= len(verdicts.codes):
        _check_same_documents(job, verdicts, number + 1)
    return verdicts.reason(number)


def _check_same_documents(job: TokenizeJob, verdicts: Verdicts | None, seen: int) -> None:
    if verdicts is not None and seen != len(verdicts.codes):
        files = ", ".join(part.file.path for part in job.chunk.parts) or ", ".join(job.source.paths)
        raise DataError(
            f"{files} changed while it was prepared: {len(verdicts.codes)} documents when it was cleaned, {seen} or more now; "
            f"run the command again"
        )


def _encode(encoder: Encoder, kept: Sequence[tuple[_SplitWriter, Document]], eot_id: int) -> int:
    """Encode a batch and hand each document with its end-of-text token to its split; the number of tokens."""
    try:
        ids, offsets = encoder.encode([document.text for _, document in kept])
    except Exception as error:  # a back end may raise anything; find out on which document
        raise _name_the_document(encoder, [document for _, document in kept], error) from error
    lengths = np.diff(offsets) + 1
    stops = np.cumsum(lengths)
    tokens = np.empty(int(stops[-1]) if len(stops) else 0, ids.dtype)
    is_end = np.zeros(len(tokens), np.bool_)
    is_end[stops - 1] = True
    tokens[~is_end], tokens[is_end] = ids, eot_id
    for writer in {id(split): split for split, _ in kept}.values():
        mine = np.array([split is writer for split, _ in kept])
        writer.add(tokens if mine.all() else tokens[np.repeat(mine, lengths)], lengths[mine].astype(np.int32))
    return len(tokens)


def _name_the_document(encoder: Encoder, documents: Sequence[Document], error: Exception) -> DataError:
    """Encode one by one until one raises again."""
    for document in documents:
        try:
            encoder.encode([document.text])
        except Exception as again:  # the same as above
            return DataError(f"{document.source}: document {document.id} cannot be encoded ({type(again).__name__}: {again})")
    return DataError(f"{documents[0].source}: documents {documents[0].id} to {documents[-1].id} cannot be encoded together ({error})")


@dataclass
class _SplitWriter:
    """The documents of one chunk that belong to one split: held until a shard is full, then permuted and written."""

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
    shards: list[Shard] = field(default_factory=list)
    _held: list[NDArray[np.integer]] = field(default_factory=list)
    _lengths: list[NDArray[np.int32]] = field(default_factory=list)
    _n_held: int = 0

    @property
    def dtype(self) -> TokenDtype:
        return token_dtype(self.tokenizer.vocab_size)

    def note(self, document: Document, repairs: Sequence[str], *, marked: bool) -> None:
        """Count a document that will be added."""
        self.documents += 1
        self.text_bytes += document.n_bytes
        self.repaired.update(repairs)
        if document.repaired:
            self.repaired["invalid Unicode"] += 1
        if marked:
            self.marked[CONTAMINATED] += 1

    def add(self, tokens: NDArray[np.integer], lengths: NDArray[np.int32]) -> None:
        """Append documents, and write a shard whenever the next one would take it over `shard_tokens`."""
        self.tokens += len(tokens)
        while len(lengths):
            stops = np.cumsum(lengths, dtype=np.int64)
            fit = int(np.searchsorted(stops, self.shard_tokens - self._n_held, side="right"))
            if fit == 0 and self._n_held == 0:  # longer than a shard: it gets one of its own
                fit = 1
            taken = int(stops[fit - 1]) if fit else 0
            if fit:
                self._held.append(tokens[:taken].astype(DTYPES[self.dtype]))
                self._lengths.append(lengths[:fit])
                self._n_held += taken
            tokens, lengths = tokens[taken:], lengths[fit:]
            if len(lengths):
                self._write()

    def finish(self) -> SplitResult:
        """Write what is held."""
        if self._n_held:
            self._write()
        return SplitResult(
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            dropped=dict(+self.dropped),
            repaired=dict(+self.repaired),
            marked=dict(+self.marked),
            shards=tuple(self.shards),
        )

    def _write(self) -> None:
        tokens, lengths = _permuted(np.concatenate(self._held), np.concatenate(self._lengths))
        self._held, self._lengths, self._n_held = [], [], 0
        name = f"{self.chunk}-{len(self.shards)}" if self.shards else self.chunk
        self.shards.append(write_shard(self.folder, name, tokens, lengths, self.dtype))


def _permuted(tokens: NDArray[np.integer], lengths: NDArray[np.int32]) -> tuple[NDArray[np.integer], NDArray[np.int32]]:
    """The documents in a random order that depends on their number alone, so that neighbours in a file are not neighbours in training."""
    order = permute(np.arange(len(lengths)), len(lengths), order_key(0, 0))
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[order]
    lengths = lengths[order]
    out = np.empty_like(tokens)
    stops = np.cumsum(lengths, dtype=np.int64)
    first = written = 0
    while first < len(lengths):  # some millions of tokens at a time: the indices of all would take four times the tokens
        last = max(first + 1, int(np.searchsorted(stops, written + _GATHER_TOKENS, side="right")))
        here, span = lengths[first:last], slice(written, int(stops[last - 1]))
        shift = starts[first:last] - (stops[first:last] - here - written)
        out[span] = tokens[np.arange(span.stop - written) + np.repeat(shift, here)]
        first, written = last, span.stop
    return out, lengths
