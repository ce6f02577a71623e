"""Tokenize one chunk of text into shards of each split: the part of `prepare` that takes most of the time.

The same chunk, verdicts and tokenizer give the same bytes in any process.
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
"""Characters of a chunk on which the fast encoder must give the ids of the reference."""

_NOTHING_KEPT = 2.0
"""`ChunkResult.lowest` of a chunk without kept documents: more than any `uniform_hash`."""


class ChunkResult(ManifestModel):
    """The result of a chunk; its file marks the chunk as finished."""

    chunk: str
    key: str
    """Hash of everything that decides the result. A file with another key is out of date."""
    read: int
    """Documents read."""
    rejects: int
    """Documents in the file of rejects."""
    encoder: str
    """The library that encoded it; empty if no document was kept."""
    why: str
    """Why that library was chosen."""
    failures: int
    """Batches on which the library failed, and which the reference encoded instead."""
    lowest: float
    """Lowest `uniform_hash` of a kept document; 2 if none was kept."""
    splits: dict[str, SplitResult]

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return sum(split.tokens for split in self.splits.values())


@dataclass(frozen=True)
class TokenizeSetup:
    """What is the same for all chunks. Sent to workers by pickle."""

    config: PrepareConfig
    work_folder: Path
    """Holds a folder for each split."""
    results_folder: Path
    tokenizer_file: Path
    fingerprint: str
    """Of the tokenizer."""
    keep_rejects: bool


@dataclass(frozen=True)
class TokenizeJob:
    """A chunk to tokenize."""

    chunk: Chunk
    held_out_fraction: float
    """Documents whose `uniform_hash` is below this are held out."""
    verdicts_file: Path | None
    """None keeps every document except those that `basic_drop_reason` drops."""
    key: str
    """Hash of everything that decides the result, except the verdicts."""

    @property
    def name(self) -> str:
        """The chunk's name."""
        return self.chunk.name


def uniform_hash(document: Document) -> float:
    """Map a document to a uniformly distributed number in [0, 1] by its source and id. Nothing else enters."""
    return document_hash(f"{document.source}\0{document.id}", salt=0) / 2**64


def init_worker(setup: TokenizeSetup) -> Callable[[TokenizeJob, ProgressCallback], ChunkResult]:
    """Load the tokenizer, once a process, and return the function that tokenizes a chunk.

    The function reads a chunk, encodes the kept documents, and writes their shards to `train` and `validation` in
    `work_folder`. If an earlier attempt finished the chunk, it only checks every byte of those shards.

    Raises:
        DataError: the tokenizer is not the expected one. The function raises it, with the document's id, if a document
            cannot be read or encoded.
    """
    tokenizer = load_tokenizer(setup.tokenizer_file)
    if tokenizer.fingerprint != setup.fingerprint:
        raise DataError(f"{setup.tokenizer_file} changed while it was used; run the command again")
    editor_for = functools.cache(lambda index: build_editor(setup.config.all_sources[index], setup.config))

    def tokenize_chunk(job: TokenizeJob, on_progress: ProgressCallback) -> ChunkResult:
        key = xxhash.xxh3_128_hexdigest(f"{job.key} {verdicts_digest(job.verdicts_file)}".encode())
        finished = _load_finished(setup, job.name, key)
        if finished is not None:
            on_progress(Progress(finished.read, job.chunk.bytes or 0, finished.tokens))
            return finished
        result = _tokenize_chunk(setup, job, key, tokenizer, editor_for(job.chunk.source_index), on_progress)
        write_checksummed(_result_file(setup, job.name), result.model_dump_json().encode())
        return result

    return tokenize_chunk


def _result_file(setup: TokenizeSetup, name: str) -> Path:
    return setup.results_folder / f"{name}.result"


def _rejects_file(setup: TokenizeSetup, name: str) -> Path:
    return setup.work_folder / REJECTS / f"{name}.jsonl.zst"


def _load_finished(setup: TokenizeSetup, name: str, key: str) -> ChunkResult | None:
    """Return the result of an earlier attempt if it has this key and its files are intact."""
    try:
        result = ChunkResult.model_validate_json(read_checksummed(_result_file(setup, name)) or b"")
    except ValidationError:  # missing, damaged, or written by another version
        return None
    if result.key != key or (result.rejects and not _rejects_file(setup, name).is_file()):
        return None
    folders = ((setup.work_folder / name, split) for name, split in result.splits.items())
    are_intact = all(is_shard_intact(folder, shard) for folder, split in folders for shard in split.shards)
    return result if are_intact else None


def _tokenize_chunk(
    setup: TokenizeSetup,
    job: TokenizeJob,
    key: str,
    tokenizer: Tokenizer,
    edit: Callable[[Document], tuple[Document, tuple[str, ...]]],
    on_progress: ProgressCallback,
) -> ChunkResult:
    config, chunk, counter = setup.config, job.chunk, _unknown_text_counter(tokenizer)
    names = SPLITS if job.held_out_fraction > 0 else ("train",)
    splits = {name: SplitWriter(setup.work_folder / name, chunk.name, tokenizer, config.shard_tokens) for name in names}
    source = config.all_sources[chunk.source_index]
    encoder: Encoder | None = None
    why, lowest, read = "", _NOTHING_KEPT, 0
    with RejectWriter(_rejects_file(setup, chunk.name) if setup.keep_rejects else None) as rejects:
        for batch in read_with_verdicts(chunk, source, job.verdicts_file, on_progress):
            kept: list[_KeptDocument] = []
            for document, drop_reason, is_contaminated in batch:
                document_hash = uniform_hash(document)
                split = splits["validation" if document_hash < job.held_out_fraction else "train"]
                if drop_reason is not None:
                    split.count_dropped(drop_reason)
                    rejects.write(document, drop_reason)
                    continue
                edited, repairs = edit(document)
                kept.append(_KeptDocument(split, document, edited, repairs, is_contaminated, document_hash))
            if kept:
                if encoder is None:
                    encoder, why = select_encoder(tokenizer, tuple(_sample_texts(entry.edited for entry in kept)))
                written, n_tokens = _encode_batch(encoder, counter, kept, rejects, tokenizer.eot_id)
                lowest = min([lowest, *(entry.uniform_hash for entry in written)])
                on_progress(Progress(tokens=n_tokens))
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


class _KeptDocument(NamedTuple):
    """A document that the verdicts keep. It is still dropped if it encodes to nothing."""

    split: SplitWriter
    document: Document
    """As it was read."""
    edited: Document
    """As the filters edited it."""
    repairs: tuple[str, ...]
    is_contaminated: bool
    uniform_hash: float


@functools.lru_cache(maxsize=1)
def _unknown_text_counter(tokenizer: Tokenizer) -> UnknownTextCounter:
    """Return the counter for this tokenizer, built once a process."""
    return UnknownTextCounter(tokenizer)


def _sample_texts(documents: Iterator[Document]) -> Iterator[str]:
    """Yield the first texts, _SAMPLE_CHARACTERS characters in all."""
    left = _SAMPLE_CHARACTERS
    for document in documents:
        yield document.text[:left]
        left -= len(document.text)
        if left <= 0:
            return


def _encode_batch(
    encoder: Encoder, counter: UnknownTextCounter, kept: Sequence[_KeptDocument], rejects: RejectWriter, eot_id: int
) -> tuple[list[_KeptDocument], int]:
    """Encode a batch, and add each document with its end-of-text token to its split.

    Returns:
        The documents that have tokens, and how many tokens were written.
    """
    ids, offsets = _encode_texts(encoder, [entry.edited for entry in kept])
    counts = counter.count([entry.edited.text for entry in kept], ids, offsets)
    written: list[_KeptDocument] = []
    lengths = np.diff(offsets)
    rows = zip(kept, lengths.tolist(), counts.unknown.tolist(), counts.lost.tolist(), strict=True)
    for entry, length, unknown, lost in rows:
        if length:
            is_contaminated = entry.is_contaminated
            entry.split.count_kept(entry.edited, entry.repairs, marked=is_contaminated, unknown=unknown, lost=lost)
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
        is_in_split = np.array([entry.split is writer for entry in written])
        split_tokens = tokens if is_in_split.all() else tokens[np.repeat(is_in_split, lengths)]
        writer.add(split_tokens, lengths[is_in_split].astype(np.int32))
    return written, len(tokens)


def _encode_texts(encoder: Encoder, documents: Sequence[Document]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Encode the texts of documents. If that fails, encode them one by one to name the one at fault in the error."""
    try:
        return encoder.encode([document.text for document in documents])
    # `tokenizers` raises bare Exceptions, and panics of its Rust code are BaseExceptions.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        first = documents[0]
        if len(documents) == 1:
            detail = one_line(error)
            raise DataError(
                f"document {first.id} of source {first.source} cannot be encoded ({detail}); leave it out, "
                f"or use another data.tokenizer"
            ) from error
    for document in documents:
        _encode_texts(encoder, [document])
    raise DataError(
        f"{len(documents)} documents of source {first.source}, from {first.id} on, cannot be encoded together"
    )
