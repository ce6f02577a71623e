"""Text to shards: `prepare` cleans the sources, trains a tokenizer if none is given, and writes the splits.

The same settings and files give the same bytes, whatever the number of workers, and also after interruptions: the
sources are split into chunks, and the result of a chunk depends only on that chunk and on the settings. Results are
stored with a hash of everything they depend on. The next attempt uses the results whose hash still matches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from data_pipeline.addresses import redacting_errors
from data_pipeline.atomic import read_checksummed, write_checksummed
from data_pipeline.cleaning.clean import (
    CleanJob,
    build_editor,
    clean_chunks,
    needs_cleaning,
    read_with_verdicts,
    verdicts_digest,
)
from data_pipeline.cleaning.rejects import REJECTS
from data_pipeline.corpus import Corpus, find_corpus, hash_json, total_bytes
from data_pipeline.errors import DataError
from data_pipeline.prepare_manifests import build_manifests
from data_pipeline.prepare_notes import check_splits_not_empty, describe_dropped, result_notes, skipped_file_notes
from data_pipeline.settings import AUTO, PrepareConfig
from data_pipeline.splitting import (
    HOLD_OUT_ALL,
    chunks_to_hold_out_from,
)
from data_pipeline.storage.manifest import MANIFEST, SourceManifest
from data_pipeline.storage.prepared import (
    RESULTS_FOLDER,
    VERDICTS_FOLDER,
    PreparedData,
    check_same_settings,
    commit,
    install_tokenizer,
    open_prepared,
    remove_leftovers,
    working_folder,
)
from data_pipeline.storage.tokenized import collect_trusted_paths, import_tokenized
from data_pipeline.text.chunks import Chunk
from data_pipeline.text.sources import Document
from data_pipeline.tokenizing.coverage import coverage_notes
from data_pipeline.tokenizing.tokenize import ChunkResult, TokenizeJob, TokenizeSetup, init_worker, uniform_hash
from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer, sample_texts, train_tokenizer
from data_pipeline.workers import Progress, ProgressCallback, available_cores, run_jobs

PrepareStage = Literal[
    "cleaning",
    "comparing documents",
    "reading a sample",
    "counting words",
    "training the tokenizer",
    "checking tokens",
    "tokenizing",
]


@dataclass(frozen=True)
class StageProgress:
    """The progress of one stage of a preparation, from its beginning."""

    stage: PrepareStage
    documents: int = 0
    tokens: int = 0
    read: int = 0
    """Bytes read of the sources' files, as they are on disk (compressed)."""
    total: int | None = None
    """Bytes to read; None if a source, such as `hf`, does not know its size."""


StageProgressCallback = Callable[[StageProgress], None]


def prepare(
    path: Path, config: PrepareConfig, *, keep_rejects: bool = False, progress: StageProgressCallback = lambda _: None
) -> PreparedData:
    """Turn the sources into `<path>/train/`, `<path>/validation/` and `<path>/tokenizer.json`.

    Args:
        path: `data.path`.
        config: the settings of `data`.
        keep_rejects: write the dropped documents with their reasons to `<path>/rejects/`.
        progress: called a few times a second.

    Raises:
        DataError: a source cannot be read or holds no text, `path` holds other data, or another process is preparing
            it. Finished work is kept in a hidden folder for the next attempt. An incomplete data set is never left.
    """
    corpus = find_corpus(config)
    given = None if config.tokenizer == AUTO else config.tokenizer
    if (path / "train" / MANIFEST).is_file():
        return _open_existing(path, corpus, given, keep_rejects)
    with working_folder(path) as work:
        trains_tokenizer = given is None and not (path / "tokenizer.json").is_file()
        # A given tokenizer and tokenized sources are checked before any text is read, so that errors show up at once.
        if not trains_tokenizer:
            allow_lossy = config.allow_lossy_tokenizer or not any(source.is_text for source in config.all_sources)
            tokenizer = install_tokenizer(path, given or path, work, allow_lossy)
            imported = _import_tokenized_sources(corpus, work, tokenizer, progress)
        verdicts = _clean(corpus, work, progress)
        if trains_tokenizer:
            tokenizer = _train_tokenizer(work / "tokenizer.json", corpus, verdicts, progress)
            imported = _import_tokenized_sources(corpus, work, tokenizer, progress)
        results = _tokenize(corpus, work, tokenizer, verdicts, keep_rejects, progress)
        rejects = {f"{result.chunk}.jsonl.zst" for result in results.values() if result.rejects}
        notes = (
            *skipped_file_notes(corpus),
            *tokenizer.notes,
            *coverage_notes(tokenizer.coverage),
            *result_notes(corpus, results),
        )
        recipe = corpus.recipe(trained_tokenizer=trains_tokenizer)
        commit(work, path, build_manifests(corpus, tokenizer, recipe, results, imported), rejects)
    return open_prepared(path, notes, collect_trusted_paths(config))


def _open_existing(path: Path, corpus: Corpus, tokenizer: Path | None, keep_rejects: bool) -> PreparedData:
    """Open data that is prepared already. Raises DataError if it was prepared with other settings."""
    check_same_settings(path, corpus.recipe(trained_tokenizer=tokenizer is None), tokenizer)
    remove_leftovers(path)
    lacks_rejects = keep_rejects and not (path / REJECTS).exists()
    more = "; rejects are written only while it is prepared" if lacks_rejects else ""
    notes = (f"{path} is prepared already, with these very settings{more}", *skipped_file_notes(corpus))
    return open_prepared(path, notes, collect_trusted_paths(corpus.config))


def build_tokenizer(
    file: Path, config: PrepareConfig, *, progress: StageProgressCallback = lambda _: None
) -> Tokenizer:
    """Train the tokenizer that `prepare` would train on these sources, and write it to `file`.

    Raises:
        DataError: `file` exists, or the sources cannot be read or hold no text.
    """
    if file.exists():
        raise DataError(f"{file} is there already; delete it to train another (shards made with it are useless then)")
    corpus = find_corpus(config)
    with working_folder(file.parent) as work:
        tokenizer = _train_tokenizer(work / file.name, corpus, _clean(corpus, work, progress), progress)
        (work / file.name).replace(file)
    return replace(tokenizer, notes=(*skipped_file_notes(corpus), *tokenizer.notes))


def _clean(corpus: Corpus, work: Path, progress: StageProgressCallback) -> dict[str, Path]:
    """Clean all chunks; return the file of verdicts of each, or {} without filters, dedup and decontamination."""
    config = corpus.config
    if not corpus.chunks or not needs_cleaning(config):
        return {}
    settings_hash = hash_json(
        config.dedup.model_dump(mode="json", exclude={"memory_mb"}), config.decontaminate, bool(config.validation)
    )
    jobs = [CleanJob(chunk, corpus.chunk_key(chunk, settings_hash)) for chunk in corpus.chunks]

    def report_comparing(fraction: float) -> None:
        progress(StageProgress("comparing documents", read=int(1000 * fraction), total=1000))

    report_cleaning = _accumulate("cleaning", corpus.chunks, progress)
    return clean_chunks(
        jobs, config, work / VERDICTS_FOLDER, config.workers or available_cores(), report_cleaning, report_comparing
    )


def _train_tokenizer(
    file: Path, corpus: Corpus, verdicts: dict[str, Path], progress: StageProgressCallback
) -> Tokenizer:
    """Train a tokenizer on a sample of the kept training documents and write it to `file`. Reuses a finished one."""
    config, key_file = corpus.config, file.with_suffix(".key")
    settings = config.model_dump(include={"tokenizer_kind", "vocab_size", "tokenizer_sample_mb", "validation_fraction"})
    key = hash_json(
        settings,
        [corpus.chunk_key(chunk, verdicts_digest(verdicts.get(chunk.name))) for chunk in corpus.sample_chunks()],
    )
    if file.is_file():
        with suppress(DataError):  # the file may be damaged
            tokenizer = load_tokenizer(file)
            found_key, *notes = (read_checksummed(key_file) or b"").decode().split("\n")
            if found_key == f"{key} {tokenizer.fingerprint}":
                return replace(tokenizer, notes=tuple(notes))
    dropped = Counter[str]()
    texts = sample_texts(_kept_documents(corpus, verdicts, dropped, progress), config.tokenizer_sample_mb * 1e6)
    if not texts:
        fraction = config.validation_fraction
        held_out = f" once data.validation_fraction={fraction} of the documents is held out" if fraction else ""
        raise DataError(
            f"data.sources hold no text to train a tokenizer on{held_out} {describe_dropped(corpus, dropped)}"
        )
    tokenizer = train_tokenizer(_report_reading(texts, progress), config.vocab_size, file, config.tokenizer_kind)
    write_checksummed(key_file, "\n".join([f"{key} {tokenizer.fingerprint}", *tokenizer.notes]).encode())
    return tokenizer


def _report_reading(texts: Sequence[str], progress: StageProgressCallback) -> Iterator[str]:
    """Yield the texts, and report how many the trainer has read. The training that follows reports no progress."""
    sizes = [len(text.encode()) for text in texts]
    read, reported, total = 0, 0, sum(sizes)
    progress(StageProgress("counting words", read=0, total=total))
    for number, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        if read - reported >= 1 << 20:
            progress(StageProgress("counting words", number, read=read, total=total))
            reported = read
        yield text
        read += size
    progress(StageProgress("counting words", len(texts), read=total, total=total))
    progress(StageProgress("training the tokenizer", len(texts)))


def _kept_documents(
    corpus: Corpus, verdicts: dict[str, Path], dropped: Counter[str], progress: StageProgressCallback
) -> Iterator[Document]:
    """Yield the kept training documents of the chunks to sample from. Counts the others in `dropped`, by reason."""
    chunks = corpus.sample_chunks()
    report = _accumulate("reading a sample", chunks, progress)
    editors = [build_editor(source, corpus.config) for source in corpus.config.sources]
    for chunk in chunks:
        for batch in read_with_verdicts(chunk, corpus.source(chunk), verdicts.get(chunk.name), report):
            for document, reason, _ in batch:
                if reason is not None:
                    dropped[reason] += 1
                elif uniform_hash(document) >= corpus.config.validation_fraction:
                    yield editors[chunk.source_index](document)[0]


def _import_tokenized_sources(
    corpus: Corpus, work: Path, tokenizer: Tokenizer, progress: StageProgressCallback
) -> dict[str, dict[str, SourceManifest]]:
    """Import every tokenized source; return its manifest entries, by source and split."""
    report, config = _accumulate("checking tokens", None, progress), corpus.config
    trusted_paths = collect_trusted_paths(config)
    imported: dict[str, dict[str, SourceManifest]] = {}
    for index, (name, source) in enumerate(zip(corpus.names, config.all_sources, strict=True)):
        if source.is_text:
            continue
        with redacting_errors(source.paths, config.sources_setting(index)):
            imported[name] = import_tokenized(
                source,
                name,
                tokenizer,
                work,
                config.validation_fraction,
                report,
                is_held_out=corpus.is_held_out(index),
                trusted_paths=trusted_paths,
            )
    return imported


def _tokenize(
    corpus: Corpus,
    work: Path,
    tokenizer: Tokenizer,
    verdicts: dict[str, Path],
    keep_rejects: bool,
    progress: StageProgressCallback,
) -> dict[str, ChunkResult]:
    """Tokenize all chunks; return their results by name, in order. Raises DataError if a split would be empty."""
    config, file = corpus.config, work / "tokenizer.json"
    file = file if file.is_file() else work.parent / "tokenizer.json"
    setup = TokenizeSetup(config, work, work / RESULTS_FOLDER, file, tokenizer.fingerprint, keep_rejects)

    def run(jobs: Iterable[TokenizeJob], report: ProgressCallback) -> dict[str, ChunkResult]:
        workers = config.workers or available_cores()
        return {result.chunk: result for result in run_jobs(partial(init_worker, setup), list(jobs), workers, report)}

    def job(chunk: Chunk, fraction: float) -> TokenizeJob:
        settings_hash = hash_json(tokenizer.fingerprint, fraction, config.shard_tokens, keep_rejects)
        key = corpus.chunk_key(chunk, settings_hash)
        return TokenizeJob(chunk, fraction, verdicts.get(chunk.name), key)

    def fraction_of(chunk: Chunk) -> float:
        return HOLD_OUT_ALL if corpus.is_held_out(chunk.source_index) else config.validation_fraction

    finished = run(
        (job(chunk, fraction_of(chunk)) for chunk in corpus.chunks), _accumulate("tokenizing", corpus.chunks, progress)
    )
    results = {chunk.name: finished[chunk.name] for chunk in corpus.chunks}
    if config.validation_fraction > 0:
        # If no document of a source fell below the fraction, hold out the one with the lowest hash.
        results |= run(
            (
                job(chunk, math.nextafter(results[chunk.name].lowest, 2.0))
                for chunk in chunks_to_hold_out_from(corpus, results)
            ),
            lambda _: None,
        )
    check_splits_not_empty(corpus, results)
    return results


def _accumulate(
    stage: PrepareStage, chunks: Iterable[Chunk] | None, progress: StageProgressCallback
) -> ProgressCallback:
    """Return a callback that adds up the progress of a stage's workers. The stage reads `chunks`, if they are given."""
    total, done = None if chunks is None else total_bytes(chunks), Progress()

    def report(step: Progress) -> None:
        nonlocal done
        done += step
        progress(StageProgress(stage, done.documents, done.tokens, done.read, total))

    return report
