"""One chunk of text -> its shards of each split: the work of `prepare` that takes the time.

The same chunk, verdicts and tokenizer give the same bytes, whoever does it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import ValidationError

from data_pipeline.atomic import read_checksummed, write_checksummed
from data_pipeline.cleaning.clean import build_editor, read_with_verdicts, verdicts_digest
from data_pipeline.cleaning.rejects import REJECTS, RejectWriter
from data_pipeline.errors import DataError, one_line
from data_pipeline.settings import PrepareConfig
from data_pipeline.storage.manifest import SPLITS, ManifestModel
from data_pipeline.storage.shard_writer import is_shard_intact
from data_pipeline.text.chunks import Chunk
from data_pipeline.text.sources import Document
from data_pipeline.tokenizing.coverage import NO_TOKENS
from data_pipeline.tokenizing.encoder import Encoder, select_encoder
from data_pipeline.tokenizing.split_writer import SplitResult, SplitWriter
from data_pipeline.tokenizing.tokenizer import Tokenizer, document_hash, load_tokenizer
from data_pipeline.tokenizing.unknown_text import UnknownTextCounter
from data_pipeline.workers import Progress, ProgressCallback

_SAMPLE_CHARACTERS = 64 << 10


class ChunkResult(ManifestModel):
    """What became of a chunk; the record that it is done."""

    chunk: str
    key: str
    """Hash of all that decided it; a result of another key is no result."""
    read: int
    """Documents."""
    rejects: int
    """Documents in the file of rejects."""
    encoder: str
    """The back end that encoded it; empty where nothing was kept."""
    why: str
    """Why that one."""
    failures: int
    """Batches that it broke on, which the reference encoded."""
    lowest: float
    """Lowest place of a kept document, see `place`; 2 where none is kept."""
    splits: dict[str, SplitResult]

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return sum(split.tokens for split in self.splits.values())


@dataclass(frozen=True)
class TokenizeSetup:
    """What is the same for all chunks."""

    config: PrepareConfig
    work: Path
    """Folder with a folder for each split."""
    done: Path
    """Folder of the results."""
    tokenizer: Path
    fingerprint: str
    """Of the tokenizer."""
    keep_rejects: bool


@dataclass(frozen=True)
class TokenizeJob:
    """A chunk to tokenize."""

    chunk: Chunk
    fraction: float
    """Documents whose place is below it are held out."""
    verdicts: Path | None
    """None where every document that is not empty is kept."""
    key: str
    """Hash of all that decides what becomes of it, but for the verdicts."""

    @property
    def name(self) -> str:
        """The chunk's name."""
        return self.chunk.name


def uniform_hash(document: Document) -> float:
    """A document's place in [0, 1], by the hash of its name: independent of order, settings and everything else."""
    return document_hash(f"{document.source}\0{document.id}", salt=0) / 2**64


def init_worker(setup: TokenizeSetup) -> Callable[[TokenizeJob, ProgressCallback], ChunkResult]:
    """What does the jobs of one process. The tokenizer is loaded once.

    The function that is returned reads a chunk, encodes what is kept, and writes its shards to `<work>/train` and `<work>/validation`,
    unless an earlier attempt did: then every byte of them is checked.

    Raises:
        DataError: the tokenizer is not the expected one; of a job: a document cannot be read or encoded; it is named.
    """
    tokenizer = load_tokenizer(setup.tokenizer)
    if tokenizer.fingerprint != setup.fingerprint:
        raise DataError(f"{setup.tokenizer} changed while it was used; run the command again")
    editors = functools.cache(lambda index: build_editor(setup.config.all_sources[index], setup.config))

    def do(job: TokenizeJob, tell: ProgressCallback) -> ChunkResult:
        key = xxhash.xxh3_128_hexdigest(f"{job.key} {verdicts_digest(job.verdicts)}".encode())
        there = _finished(setup, job.name, key)
        if there is not None:
            tell(Progress(there.read, job.chunk.bytes or 0, there.tokens))
            return there
        result = _tokenize_chunk(setup, job, key, tokenizer, editors(job.chunk.source_index), tell)
        write_checksummed(_result_file(setup, job.name), result.model_dump_json().encode())
        return result

    return do


def _result_file(setup: TokenizeSetup, name: str) -> Path:
    return setup.done / f"{name}.result"


def _rejects_file(setup: TokenizeSetup, name: str) -> Path:
    return setup.work / REJECTS / f"{name}.jsonl.zst"


def _finished(setup: TokenizeSetup, name: str, key: str) -> ChunkResult | None:
    """The result of an earlier attempt if it was decided by the same, and its files are whole."""
    try:
        result = ChunkResult.model_validate_json(read_checksummed(_result_file(setup, name)) or b"")
    except ValidationError:  # there is none, or it is damaged or of another version
        return None
    if result.key != key or (result.rejects and not _rejects_file(setup, name).is_file()):
        return None
    whole = all(
        is_shard_intact(setup.work / split, shard) for split, part in result.splits.items() for shard in part.shards
    )
    return result if whole else None


def _tokenize_chunk(
    setup: TokenizeSetup,
    job: TokenizeJob,
    key: str,
    tokenizer: Tokenizer,
    edit: Callable[[Document], tuple[Document, tuple[str, ...]]],
    tell: ProgressCallback,
) -> ChunkResult:
    config, chunk, counter = setup.config, job.chunk, _counter(tokenizer)
    names = SPLITS if job.fraction > 0 else ("train",)
    splits = {name: SplitWriter(setup.work / name, chunk.name, tokenizer, config.shard_tokens) for name in names}
    encoder: Encoder | None = None
    why, lowest, read = "", 2.0, 0
    with RejectWriter(_rejects_file(setup, chunk.name) if setup.keep_rejects else None) as rejects:
        for batch in read_with_verdicts(chunk, config.all_sources[chunk.source_index], job.verdicts, tell):
            kept: list[_Kept] = []
            for document, reason, marked in batch:
                here = uniform_hash(document)
                split = splits["validation" if here < job.fraction else "train"]
                if reason is not None:
                    split.count_dropped(reason)
                    rejects.write(document, reason)
                    continue
                edited, repairs = edit(document)
                kept.append(_Kept(split, document, edited, repairs, marked, here))
            if kept:
                if encoder is None:
                    encoder, why = select_encoder(tokenizer, tuple(_sample(entry.edited for entry in kept)))
                written, n_tokens = _encode(encoder, counter, kept, rejects, tokenizer.eot_id)
                lowest = min([lowest, *(entry.place for entry in written)])
                tell(Progress(tokens=n_tokens))
            read += len(batch)
    return ChunkResult(
        chunk=chunk.name,
        key=key,
        read=read,
        rejects=rejects.written,
        encoder=encoder.name if encoder else "",
        why=why,
        failures=encoder.failures if encoder else 0,
        lowest=lowest,
        splits={name: split.finish() for name, split in splits.items()},
    )


class _Kept(NamedTuple):
    """A document that nothing dropped so far."""

    split: SplitWriter
    document: Document
    """As it was read."""
    edited: Document
    repairs: tuple[str, ...]
    marked: bool
    place: float


@functools.lru_cache(maxsize=1)
def _counter(tokenizer: Tokenizer) -> UnknownTextCounter:
    """Made once a process."""
    return UnknownTextCounter(tokenizer)


def _sample(documents: Iterator[Document]) -> Iterator[str]:
    """The beginning of the documents, on which the fast encoder must equal the reference."""
    left = _SAMPLE_CHARACTERS
    for document in documents:
        yield document.text[:left]
        left -= len(document.text)
        if left <= 0:
            return


def _encode(
    encoder: Encoder, counter: UnknownTextCounter, kept: Sequence[_Kept], rejects: RejectWriter, eot_id: int
) -> tuple[list[_Kept], int]:
    """Encode a batch and hand each document with its end-of-text token to its split: (the documents that have tokens, all tokens)."""
    ids, offsets = _ids(encoder, [entry.edited for entry in kept])
    losses = counter.count([entry.edited.text for entry in kept], ids, offsets)
    written: list[_Kept] = []
    lengths = np.diff(offsets)
    rows = zip(kept, lengths.tolist(), losses.unknown.tolist(), losses.lost.tolist(), strict=True)
    for entry, length, unknown, lost in rows:
        if length:
            entry.split.count_kept(entry.edited, entry.repairs, marked=entry.marked, unknown=unknown, lost=lost)
            written.append(entry)
        else:
            entry.split.count_dropped(NO_TOKENS)
            rejects.write(entry.document, NO_TOKENS)
    if not written:
        return written, 0
    lengths = lengths[lengths > 0] + 1
    stops = np.cumsum(lengths)
    tokens = np.empty(int(stops[-1]), ids.dtype)
    is_end = np.zeros(len(tokens), np.bool_)
    is_end[stops - 1] = True
    tokens[~is_end], tokens[is_end] = ids, eot_id
    for writer in {id(entry.split): entry.split for entry in written}.values():
        mine = np.array([entry.split is writer for entry in written])
        writer.add(tokens if mine.all() else tokens[np.repeat(mine, lengths)], lengths[mine].astype(np.int32))
    return written, len(tokens)


def _ids(encoder: Encoder, documents: Sequence[Document]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """What `encoder` makes of the texts. Where it fails, each is tried alone, to name the document."""
    try:
        return encoder.encode([document.text for document in documents])
    except (
        BaseException
    ) as error:  # `tokenizers` raises bare Exceptions, and panics of its Rust code that are not even that
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        first = documents[0]
        if len(documents) == 1:
            detail = one_line(error)
            raise DataError(
                f"document {first.id} of source {first.source} cannot be encoded ({detail}); leave it out, or use another data.tokenizer"
            ) from error
    for document in documents:
        _ids(encoder, [document])
    raise DataError(
        f"{len(documents)} documents of source {first.source}, from {first.id} on, cannot be encoded together"
    )
