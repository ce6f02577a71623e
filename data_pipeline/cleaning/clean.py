"""Cleaning: give every document a verdict. It is kept, or dropped for a reason.

The first pass reads each chunk, applies the filters, and computes the signatures of the documents that they keep. Then
the signatures of all chunks are compared to find duplicates.
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
from numpy.typing import NDArray

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
    """Hash of everything that decides the verdicts."""

    @property
    def name(self) -> str:
        """The chunk's name."""
        return self.chunk.name


class DocumentVerdict(NamedTuple):
    """A document with its verdict."""

    document: Document
    """As it was read."""
    drop_reason: str | None
    """Why it is dropped; None if it is kept."""
    is_contaminated: bool
    """It shares text with evaluation sets and is kept all the same."""


def basic_drop_reason(document: Document) -> str | None:
    """Return why a document is dropped before any filter sees it: it is empty, or it is not text."""
    return document.defect if document.text.strip() else EMPTY


def needs_cleaning(config: PrepareConfig) -> bool:
    """Return whether anything but `basic_drop_reason` can drop a document."""
    return bool(
        config.filters.apply
        or any(source.filters for source in config.all_sources)
        or _needs_signatures(config)
        or config.decontaminate.paths
    )


def clean_chunks(
    jobs: Sequence[CleanJob],
    config: PrepareConfig,
    folder: Path,
    workers: int,
    on_read: ProgressCallback,
    on_comparison: Callable[[float], None],
) -> dict[str, Path]:
    """Filter every chunk, then find duplicates among the documents that the filters keep.

    Held-out sources are compared first, so training documents that repeat held-out ones are dropped and the held-out
    ones stay.

    Args:
        jobs: the chunks in order. A chunk that an earlier attempt finished with the same key is not read again.
        config: what to drop.
        folder: for the verdicts and signatures.
        workers: processes.
        on_read: called with what was read.
        on_comparison: called with the fraction of the comparison that is done.

    Returns:
        The file of verdicts of each chunk, by the chunk's name.
    """
    for _ in run_jobs(functools.partial(_init_worker, config, folder), jobs, workers, on_read):
        pass
    filtered = {job.name: _verdicts_file(folder, job.name) for job in jobs}
    if not _needs_signatures(config):
        return filtered
    compared = {job.name: folder / f"{job.name}.compared" for job in jobs}
    key = _comparison_key(config, filtered)
    # A generator: it holds the verdicts of one chunk at a time, which are a byte a document.
    existing = (read_verdicts(file) for file in compared.values())
    if all(verdicts is not None and verdicts.key == key for verdicts in existing):
        return compared
    n_sources = len(config.sources)
    held_out_first = sorted(jobs, key=lambda job: job.chunk.source_index < n_sources)
    duplicates = find_duplicates(
        [_signatures_file(folder, job.name) for job in held_out_first],
        [job.chunk.source for job in held_out_first],
        config.dedup,
        on_comparison,
        n_held_out=len({job.chunk.source_index for job in jobs if job.chunk.source_index >= n_sources}),
    )
    for job, codes in zip(held_out_first, duplicates.codes, strict=True):
        verdicts = _require_verdicts(filtered[job.name]).with_reasons(codes, duplicates.reasons)
        write_verdicts(compared[job.name], replace(verdicts, key=key))
    return compared


def _comparison_key(config: PrepareConfig, filtered: Mapping[str, Path]) -> str:
    """Return a hash of everything that decides which documents are duplicates.

    It changes when any chunk is filtered anew.
    """
    hasher = xxhash.xxh3_128(config.dedup.model_dump_json(exclude={"memory_mb"}).encode())
    hasher.update(repr(source_names(config)[len(config.sources) :]).encode())
    for name, file in filtered.items():
        verdicts = _require_verdicts(file)
        hasher.update(f"{name} {verdicts.digest()} {verdicts.signatures}\n".encode())
    return hasher.hexdigest()


def _verdicts_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.verdicts"


def _signatures_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.signatures"


class _Tools(NamedTuple):
    """What a worker applies to the documents of a chunk."""

    apply_filters: DocumentFilter
    evaluation: EvaluationNgrams | None
    min_hasher: MinHasher | None


def _init_worker(config: PrepareConfig, folder: Path) -> Callable[[CleanJob, ProgressCallback], None]:
    """Return the function that cleans a chunk.

    It loads lists, models and evaluation texts once a process, at first use.
    """
    filter_for = functools.cache(functools.partial(build_filter, config.filters))
    load_evaluation = functools.cache(functools.partial(EvaluationNgrams.load, config.decontaminate))
    finds_near = config.dedup.minhash or config.validation
    min_hasher = MinHasher(config.dedup.ngram, config.dedup.bands, config.dedup.rows) if finds_near else None

    def clean_chunk(job: CleanJob, on_read: ProgressCallback) -> None:
        finished = _load_finished(job, folder)
        if finished is not None:
            on_read(Progress(len(finished.codes), job.chunk.bytes or 0))
            return
        source = config.all_sources[job.chunk.source_index]
        tools = _Tools(filter_for(source_filters(source, config)), load_evaluation(), min_hasher)
        _filter_chunk(job, source, config, folder, tools, on_read)

    return clean_chunk


def _load_finished(job: CleanJob, folder: Path) -> ChunkVerdicts | None:
    """Return the verdicts of an earlier attempt if they have the same key and their signature file is intact."""
    verdicts = read_verdicts(_verdicts_file(folder, job.name))
    if verdicts is None or verdicts.key != job.key:
        return None
    file = _signatures_file(folder, job.name)
    is_intact = not verdicts.signatures or (file.is_file() and _file_hash(file) == verdicts.signatures)
    return verdicts if is_intact else None


class _BatchResult(NamedTuple):
    """What is computed for the documents of a batch; arrays [documents] and [documents, bands]."""

    reasons: list[str | None]
    marks: NDArray[np.bool_]
    hashes: NDArray[np.uint64]
    bands: NDArray[np.uint64]


def _filter_batch(batch: Sequence[Document], config: PrepareConfig, tools: _Tools) -> _BatchResult:
    """Apply the filters, look for evaluation text, and compute signatures of what the filters leave of each text."""
    results = []
    for document in batch:
        reason = basic_drop_reason(document)
        results.append(FilterResult(document.text, reason) if reason else tools.apply_filters(document))
    reasons, texts = [result.reason for result in results], [result.text for result in results]
    none = np.zeros(len(batch), np.bool_)
    is_contaminated = tools.evaluation.find_contaminated(texts) if tools.evaluation else none
    if config.decontaminate.action == "drop":
        contaminated = is_contaminated.tolist()
        reasons = [reason or (CONTAMINATED if hit else None) for reason, hit in zip(reasons, contaminated, strict=True)]
    finds_exact = config.dedup.exact or config.validation
    return _BatchResult(
        reasons,
        is_contaminated & (config.decontaminate.action == "mark"),
        np.array([text_hash(text) if finds_exact else 0 for text in texts], np.uint64),
        tools.min_hasher.hash_bands(texts) if tools.min_hasher else np.zeros((len(batch), 0), np.uint64),
    )


def _filter_chunk(
    job: CleanJob, source: SourceConfig, config: PrepareConfig, folder: Path, tools: _Tools, on_read: ProgressCallback
) -> None:
    """Read a chunk, filter it, and write the signatures and then the verdicts."""
    n_bands = tools.min_hasher.bands if tools.min_hasher else 0
    empty = np.zeros(0, np.uint64)
    results = [_BatchResult([], np.zeros(0, np.bool_), empty, empty.reshape(0, n_bands))]
    texts_hash, read = TextsHash(), 0
    for batch in read_batches(job.chunk, source):
        results.append(_filter_batch(batch, config, tools))
        for document in batch:
            texts_hash.add(document.text)
        on_read(Progress(len(batch), batch[-1].bytes_read - read))
        read = batch[-1].bytes_read
    on_read(Progress(0, (job.chunk.bytes or read) - read))
    codes, reasons = encode_reasons([reason for result in results for reason in result.reasons])
    signatures = ""
    if _needs_signatures(config):
        file = _signatures_file(folder, job.name)
        hashes, bands = (np.concatenate(arrays) for arrays in zip(*(result[2:] for result in results), strict=True))
        write_signatures(file, hashes, bands, codes == KEPT)
        signatures = _file_hash(file)
    marks = np.concatenate([result.marks for result in results])
    verdicts = ChunkVerdicts(codes, reasons, marks, texts_hash.hexdigest(), signatures, job.key)
    write_verdicts(_verdicts_file(folder, job.name), verdicts)


def read_with_verdicts(
    chunk: Chunk, source: SourceConfig, file: Path | None, on_read: ProgressCallback
) -> Iterator[list[DocumentVerdict]]:
    """Read the documents of a chunk again, with their verdicts, a few megabytes at a time.

    Args:
        chunk: what to read.
        source: its settings.
        file: its verdicts; None drops only what `basic_drop_reason` drops.
        on_read: called with what a batch held when the next batch is requested.

    Raises:
        DataError: as `read_chunk`; or the documents are not the ones that the verdicts are about.
    """
    verdicts = None if file is None else _require_verdicts(file)
    first, texts_hash, read = 0, TextsHash(), 0
    for batch in read_batches(chunk, source):
        if verdicts is None:
            yield [DocumentVerdict(document, basic_drop_reason(document), False) for document in batch]
        elif first + len(batch) > len(verdicts.codes):
            raise _source_changed(chunk, source, file)
        else:
            for document in batch:
                texts_hash.add(document.text)
            yield [
                DocumentVerdict(document, verdicts.drop_reason(i), bool(verdicts.marks[i]))
                for i, document in enumerate(batch, first)
            ]
        on_read(Progress(len(batch), batch[-1].bytes_read - read))
        first, read = first + len(batch), batch[-1].bytes_read
    on_read(Progress(0, (chunk.bytes or read) - read))
    if verdicts is not None and texts_hash.hexdigest() != verdicts.texts:
        raise _source_changed(chunk, source, file)


def verdicts_digest(file: Path | None) -> str:
    """Return a hash of the verdicts in a file, or an empty string for None.

    Raises:
        DataError: the file is damaged.
    """
    return "" if file is None else _require_verdicts(file).digest()


def build_editor(source: SourceConfig, config: PrepareConfig) -> Callable[[Document], tuple[Document, tuple[str, ...]]]:
    """Return a function that applies the editing filters of a source to a kept document.

    The function returns the edited document and how it was edited.
    """
    names = tuple(name for name in source_filters(source, config) if name in EDITING_FILTERS)
    if not names:
        return lambda document: (document, ())
    apply_filters = build_filter(config.filters, names)

    def edit(document: Document) -> tuple[Document, tuple[str, ...]]:
        result = apply_filters(document)
        return replace(document, text=result.text, n_bytes=len(result.text.encode())), result.repairs

    return edit


def _needs_signatures(config: PrepareConfig) -> bool:
    return bool(config.dedup.exact or config.dedup.minhash or config.validation)


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _require_verdicts(file: Path) -> ChunkVerdicts:
    verdicts = read_verdicts(file)
    if verdicts is None:
        raise DataError(f"{file} is damaged or was deleted while it was needed; run the command again")
    return verdicts


def _source_changed(chunk: Chunk, source: SourceConfig, file: Path | None) -> DataError:
    """Delete the verdicts of a chunk whose files changed, and return the error. The next attempt cleans it again."""
    if file is not None:
        _verdicts_file(file.parent, chunk.name).unlink(missing_ok=True)
    files = [piece.file.path for piece in chunk.slices] or [source.paths[chunk.number]]
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    return DataError(
        f"{chunk.setting}: {', '.join(files[:2])}{more} changed during the preparation (the texts read after cleaning "
        f"differ from those that were cleaned); run the command again"
    )
