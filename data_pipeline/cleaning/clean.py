"""What is left of the raw text: every document gets a verdict, and one that is dropped gets its reason.

One pass over the chunks applies the filters and signs what they keep; the signatures of all chunks then tell the
duplicates.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data_pipeline.cleaning.decontaminate import EvaluationNgrams
from data_pipeline.cleaning.dedup import find_duplicates, write_signatures
from data_pipeline.cleaning.filters import EDITING_FILTERS, DocumentFilter, FilterResult, build_filter, source_filters
from data_pipeline.cleaning.minhash import MinHasher, text_hash
from data_pipeline.cleaning.verdicts import (
    KEPT,
    ChunkVerdicts,
    TextsHash,
    encode_reasons,
    read_verdicts,
    write_verdicts,
)
from data_pipeline.errors import DataError
from data_pipeline.settings import PrepareConfig, SourceConfig, source_names
from data_pipeline.text.chunks import Chunk, read_batches
from data_pipeline.text.sources import Document
from data_pipeline.workers import Progress, ProgressCallback, run_jobs

CONTAMINATED = "shares text with evaluation sets"
EMPTY = "empty"


@dataclass(frozen=True)
class CleanJob:
    """A chunk to clean."""

    chunk: Chunk
    key: str
    """Hash of all that decides the verdicts."""

    @property
    def name(self) -> str:
        """The chunk's name."""
        return self.chunk.name


class DocumentVerdict(NamedTuple):
    """A document with its verdict."""

    document: Document
    """As it was read."""
    drop_reason: str | None
    """Why it is dropped."""
    is_contaminated: bool
    """It shares text with evaluation sets and is kept all the same."""


def basic_drop_reason(document: Document) -> str | None:
    """Why a document is dropped before any filter sees it: it is empty, or no text."""
    return document.defect if document.text.strip() else EMPTY


def needs_cleaning(config: PrepareConfig) -> bool:
    """Whether anything but `basic_drop_reason` can drop a document."""
    return bool(
        config.filters.apply
        or any(source.filters for source in config.all_sources)
        or _signs(config)
        or config.decontaminate.paths
    )


def clean_chunks(
    jobs: Sequence[CleanJob],
    config: PrepareConfig,
    folder: Path,
    workers: int,
    tell: ProgressCallback,
    comparing: Callable[[float], None],
) -> dict[str, Path]:
    """Judge every chunk, then compare all that is kept. Held-out text of its own comes first: what repeats it goes, and
    it stays.

    Args:
        jobs: the chunks in order; what an earlier attempt finished with the same key is not done again.
        config: what to drop.
        folder: for the verdicts and signatures.
        workers: processes.
        tell: is told what was read.
        comparing: is told the share of the comparison that is done.

    Returns:
        For each chunk's name the file of its verdicts.
    """
    for _ in run_jobs(functools.partial(_begin, config, folder), jobs, workers, tell):
        pass
    judged = {job.name: _verdicts_file(folder, job.name) for job in jobs}
    if not _signs(config):
        return judged
    compared = {job.name: folder / f"{job.name}.compared" for job in jobs}
    key = _comparison_key(config, judged)
    if all((there := read_verdicts(file)) is not None and there.key == key for file in compared.values()):
        return compared
    n_sources = len(config.sources)
    ordered = sorted(jobs, key=lambda job: job.chunk.source_index < n_sources)
    signatures = [_signatures_file(folder, job.name) for job in ordered]
    n_held_out = len({job.chunk.source_index for job in jobs if job.chunk.source_index >= n_sources})
    found = find_duplicates(
        signatures, [job.chunk.source for job in ordered], config.dedup, comparing, n_held_out=n_held_out
    )
    for job, codes in zip(ordered, found.codes, strict=True):
        verdicts = _need_verdicts(judged[job.name]).with_reasons(codes, found.reasons)
        write_verdicts(compared[job.name], replace(verdicts, key=key))
    return compared


def _comparison_key(config: PrepareConfig, judged: Mapping[str, Path]) -> str:
    """Hash of all that decides which documents are duplicates: it is compared again only if one chunk was judged
    anew.
    """
    whole = xxhash.xxh3_128(config.dedup.model_dump_json(exclude={"memory_mb"}).encode())
    whole.update(repr(source_names(config)[len(config.sources) :]).encode())
    for name, file in judged.items():
        verdicts = _need_verdicts(file)
        whole.update(f"{name} {verdicts.digest()} {verdicts.signatures}\n".encode())
    return whole.hexdigest()


def _verdicts_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.verdicts"


def _signatures_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.signatures"


class _Tools(NamedTuple):
    """What looks at texts."""

    judge: DocumentFilter
    contamination: EvaluationNgrams | None
    signer: MinHasher | None


def _begin(config: PrepareConfig, folder: Path) -> Callable[[CleanJob, ProgressCallback], None]:
    """What does the jobs of one process: word lists, models and evaluation texts are read once, when they are
    needed.
    """
    judge_by = functools.cache(functools.partial(build_filter, config.filters))
    contamination = functools.cache(functools.partial(EvaluationNgrams.load, config.decontaminate))
    near = config.dedup.minhash or config.validation
    signer = MinHasher(config.dedup.ngram, config.dedup.bands, config.dedup.rows) if near else None

    def do(job: CleanJob, tell: ProgressCallback) -> None:
        there = _finished(job, folder)
        if there is not None:
            tell(Progress(len(there.codes), job.chunk.bytes or 0))
            return
        source = config.all_sources[job.chunk.source_index]
        _judge_chunk(
            job, source, config, folder, _Tools(judge_by(source_filters(source, config)), contamination(), signer), tell
        )

    return do


def _finished(job: CleanJob, folder: Path) -> ChunkVerdicts | None:
    """What an earlier attempt found, if it is whole and was decided by the same."""
    there = read_verdicts(_verdicts_file(folder, job.name))
    if there is None or there.key != job.key:
        return None
    file = _signatures_file(folder, job.name)
    return there if not there.signatures or (file.is_file() and _hash(file) == there.signatures) else None


def _judge_chunk(
    job: CleanJob, source: SourceConfig, config: PrepareConfig, folder: Path, tools: _Tools, tell: ProgressCallback
) -> None:
    """Read a chunk, apply the filters, sign what they keep; write the signatures and then the verdicts."""
    judge, contamination, signer = tools
    exact = config.dedup.exact or config.validation
    reasons: list[str | None] = []
    marks, hashes, bands = (
        [np.zeros(0, np.bool_)],
        [np.zeros(0, np.uint64)],
        [np.zeros((0, signer.bands if signer else 0), np.uint64)],
    )
    seen, read = TextsHash(), 0
    for batch in read_batches(job.chunk, source):
        judged = [
            FilterResult(document.text, no) if (no := basic_drop_reason(document)) else judge(document)
            for document in batch
        ]
        verdicts, texts = [verdict.reason for verdict in judged], [verdict.text for verdict in judged]
        hits = contamination.find_contaminated(texts) if contamination else np.zeros(len(batch), np.bool_)
        if config.decontaminate.action == "drop":
            verdicts = [
                verdict or (CONTAMINATED if hit else None) for verdict, hit in zip(verdicts, hits.tolist(), strict=True)
            ]
        reasons += verdicts
        marks.append(hits & (config.decontaminate.action == "mark"))
        hashes.append(np.array([text_hash(text) if exact else 0 for text in texts], np.uint64))
        bands.append(signer.hash_bands(texts) if signer else np.zeros((len(batch), 0), np.uint64))
        for document in batch:
            seen.add(document.text)
        tell(Progress(len(batch), batch[-1].bytes_read - read))
        read = batch[-1].bytes_read
    tell(Progress(0, (job.chunk.bytes or read) - read))
    codes, table = encode_reasons(reasons)
    file = _signatures_file(folder, job.name)
    if _signs(config):
        write_signatures(file, np.concatenate(hashes), np.concatenate(bands), codes == KEPT)
    signed = _hash(file) if _signs(config) else ""
    write_verdicts(
        _verdicts_file(folder, job.name),
        ChunkVerdicts(codes, table, np.concatenate(marks), seen.hexdigest(), signed, job.key),
    )


def read_with_verdicts(
    chunk: Chunk, source: SourceConfig, file: Path | None, tell: ProgressCallback
) -> Iterator[list[DocumentVerdict]]:
    """The documents of a chunk again, with their verdicts, a few megabytes at a time.

    Args:
        chunk: what to read.
        source: its settings.
        file: of its verdicts; None drops what is empty or no text.
        tell: is told what was read of a batch when the next one is asked for.

    Raises:
        DataError: as `read_chunk`; or the documents are not those that were judged.
    """
    verdicts = None if file is None else _need_verdicts(file)
    first, seen, read = 0, TextsHash(), 0
    for batch in read_batches(chunk, source):
        if verdicts is None:
            yield [DocumentVerdict(document, basic_drop_reason(document), False) for document in batch]
        elif first + len(batch) > len(verdicts.codes):
            raise _changed(chunk, source, file)
        else:
            for document in batch:
                seen.add(document.text)
            yield [
                DocumentVerdict(document, verdicts.drop_reason(i), bool(verdicts.marks[i]))
                for i, document in enumerate(batch, first)
            ]
        tell(Progress(len(batch), batch[-1].bytes_read - read))
        first, read = first + len(batch), batch[-1].bytes_read
    tell(Progress(0, (chunk.bytes or read) - read))
    if verdicts is not None and seen.hexdigest() != verdicts.texts:
        raise _changed(chunk, source, file)


def verdicts_digest(file: Path | None) -> str:
    """Hash of what a file of verdicts says; empty where there is none.

    Raises:
        DataError: it is damaged.
    """
    return "" if file is None else _need_verdicts(file).digest()


def build_editor(source: SourceConfig, config: PrepareConfig) -> Callable[[Document], tuple[Document, tuple[str, ...]]]:
    """What makes of a kept document what the filters that change texts leave of it, and tells what they changed."""
    names = tuple(name for name in source_filters(source, config) if name in EDITING_FILTERS)
    if not names:
        return lambda document: (document, ())
    judge = build_filter(config.filters, names)

    def edit(document: Document) -> tuple[Document, tuple[str, ...]]:
        verdict = judge(document)
        return replace(document, text=verdict.text, n_bytes=len(verdict.text.encode())), verdict.repairs

    return edit


def _signs(config: PrepareConfig) -> bool:
    return bool(config.dedup.exact or config.dedup.minhash or config.validation)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _need_verdicts(file: Path) -> ChunkVerdicts:
    verdicts = read_verdicts(file)
    if verdicts is None:
        raise DataError(f"{file} is damaged or was deleted while it was needed; run the command again")
    return verdicts


def _changed(chunk: Chunk, source: SourceConfig, file: Path | None) -> DataError:
    """The verdicts are deleted, so that the next attempt judges anew."""
    if file is not None:
        _verdicts_file(file.parent, chunk.name).unlink(missing_ok=True)
    files = [part.file.path for part in chunk.slices] or [source.paths[chunk.number]]
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    return DataError(
        f"{chunk.setting}: {', '.join(files[:2])}{more} changed while it was prepared (it was cleaned and then read again, and the texts "
        f"are others now); run the command again"
    )
