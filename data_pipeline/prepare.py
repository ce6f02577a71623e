"""Text to shards: `prepare` cleans the sources, trains the tokenizer if there is none, and writes both splits.

The same settings and files give the same bytes, whatever the number of workers and however often it was interrupted: the sources
are cut into chunks, each chunk's work depends on that chunk and the settings alone, and a result that is there already is used
again if it carries the hash of all that decided it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from data_pipeline.cleaning.decontaminate import EVALUATION_EXTENSIONS, EvaluationNgrams
from data_pipeline.cleaning.minhash import similarity_threshold
from data_pipeline.cleaning.rejects import REJECTS
from data_pipeline.corpus import Corpus, find_corpus, hash_json, total_bytes
from data_pipeline.errors import DataError
from data_pipeline.settings import AUTO, PrepareConfig
from data_pipeline.splitting import (
    HOLD_OUT_ALL,
    chunks_to_hold_out_from,
    count_documents,
    notes_on_held_out,
    sum_by_reason,
)
from data_pipeline.storage.manifest import MANIFEST, SPLITS, Recipe, SourceManifest, SplitManifest
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
from data_pipeline.storage.shards import token_dtype
from data_pipeline.storage.tokenized import collect_trusted_paths, import_tokenized
from data_pipeline.text.chunks import Chunk
from data_pipeline.text.files import file_patterns
from data_pipeline.text.sources import DEFECTS, MAX_UNDECODED, Document
from data_pipeline.tokenizing.coverage import coverage_notes
from data_pipeline.tokenizing.split_writer import SplitResult
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


_CONVERT = "convert it to UTF-8 if it is text (iconv -f LATIN1 -t UTF-8, or from UTF-16LE, SHIFT-JIS, ...)"


@dataclass(frozen=True)
class StageProgress:
    """How far a preparation is."""

    stage: PrepareStage
    documents: int = 0
    tokens: int = 0
    read: int = 0
    """Bytes of the sources' files read in this stage, compressed size."""
    total: int | None = None
    """Bytes of the sources' files; None where a source (`hf`) cannot tell."""


StageProgressCallback = Callable[[StageProgress], None]


def prepare(
    path: Path, config: PrepareConfig, *, keep_rejects: bool = False, progress: StageProgressCallback = lambda _: None
) -> PreparedData:
    """Turn the sources into `<path>/train/`, `<path>/validation/` and `<path>/tokenizer.json`.

    Args:
        path: `data.path`.
        config: what to do.
        keep_rejects: write the dropped documents with their reasons to `<path>/rejects/`.
        progress: called a few times a second.

    Raises:
        DataError: a source cannot be read or holds no text, `path` holds other data, or another process is preparing it. What was
            finished until then is kept aside for the next attempt; nothing looks like prepared data.
    """
    corpus = find_corpus(config)
    tokenizer = None if config.tokenizer == AUTO else config.tokenizer
    if (path / "train" / MANIFEST).is_file():
        check_same_settings(path, corpus.recipe(trained_tokenizer=tokenizer is None), tokenizer)
        remove_leftovers(path)
        more = (
            "; rejects are written only while it is prepared" if keep_rejects and not (path / REJECTS).exists() else ""
        )
        notes = (f"{path} is prepared already, with these very settings{more}", *_passed_over(corpus))
        return open_prepared(path, notes, collect_trusted_paths(config))
    with working_folder(path) as work:
        lossy_is_fine = config.allow_lossy_tokenizer or not any(source.is_text for source in config.all_sources)
        is_there = tokenizer is not None or (path / "tokenizer.json").is_file()
        # A tokenizer that does not fit is an error before any text is read.
        made = install_tokenizer(path, tokenizer or path, work, lossy_is_fine) if is_there else None
        adopted = None if made is None else _adopt(corpus, work, made, progress)
        verdicts = _clean(corpus, work, progress)
        if made is None or adopted is None:
            made = _train(work / "tokenizer.json", corpus, verdicts, progress)
            adopted = _adopt(corpus, work, made, progress)
        results = _tokenize(corpus, work, made, verdicts, keep_rejects, progress)
        rejects = {f"{result.chunk}.jsonl.zst" for result in results.values() if result.rejects}
        notes = (*_passed_over(corpus), *made.notes, *coverage_notes(made.coverage), *_notes(corpus, results))
        recipe = corpus.recipe(trained_tokenizer=not is_there)
        commit(work, path, _manifests(corpus, made, recipe, results, adopted), rejects)
    return open_prepared(path, notes, collect_trusted_paths(config))


def build_tokenizer(
    file: Path, config: PrepareConfig, *, progress: StageProgressCallback = lambda _: None
) -> Tokenizer:
    """Train a tokenizer on what is kept of the sources and write it to `file`; it is the one that `prepare` would train.

    Raises:
        DataError: `file` is there already, or the sources cannot be read or hold no text.
    """
    if file.exists():
        raise DataError(f"{file} is there already; delete it to train another (shards made with it are useless then)")
    corpus = find_corpus(config)
    with working_folder(file.parent) as work:
        tokenizer = _train(work / file.name, corpus, _clean(corpus, work, progress), progress)
        (work / file.name).replace(file)
    return replace(tokenizer, notes=(*_passed_over(corpus), *tokenizer.notes))


def _clean(corpus: Corpus, work: Path, progress: StageProgressCallback) -> dict[str, Path]:
    """The file of verdicts of each chunk; none where nothing but emptiness drops a document."""
    config = corpus.config
    if not corpus.chunks or not needs_cleaning(config):
        return {}
    decides = hash_json(
        config.dedup.model_dump(mode="json", exclude={"memory_mb"}), config.decontaminate, bool(config.validation)
    )
    jobs = [CleanJob(chunk, corpus.key(chunk, decides)) for chunk in corpus.chunks]

    def comparing(share: float) -> None:
        progress(StageProgress("comparing documents", read=int(1000 * share), total=1000))

    tell = _counter("cleaning", corpus.chunks, progress)
    return clean_chunks(jobs, config, work / VERDICTS_FOLDER, config.workers or available_cores(), tell, comparing)


def _train(file: Path, corpus: Corpus, verdicts: dict[str, Path], progress: StageProgressCallback) -> Tokenizer:
    """Train a tokenizer on an even sample of the kept training documents and write it to `file`, unless an earlier attempt did."""
    config, record = corpus.config, file.with_suffix(".key")
    settings = config.model_dump(include={"tokenizer_kind", "vocab_size", "tokenizer_sample_mb", "validation_fraction"})
    key = hash_json(
        settings, [corpus.key(chunk, verdicts_digest(verdicts.get(chunk.name))) for chunk in corpus.sampled()]
    )
    if file.is_file():
        with suppress(DataError):  # it may be damaged, or of an attempt that was killed before it wrote its record
            tokenizer = load_tokenizer(file)
            made, *notes = (read_checksummed(record) or b"").decode().split("\n")
            if made == f"{key} {tokenizer.fingerprint}":
                return replace(tokenizer, notes=tuple(notes))
    dropped = Counter[str]()
    texts = sample_texts(_kept_documents(corpus, verdicts, dropped, progress), config.tokenizer_sample_mb * 1e6)
    if not texts:
        fraction = config.validation_fraction
        held_out = f" once data.validation_fraction={fraction} of the documents is held out" if fraction else ""
        raise DataError(
            f"data.sources hold no text to train a tokenizer on{held_out} {_found_instead(corpus, dropped)}"
        )
    tokenizer = train_tokenizer(_counting(texts, progress), config.vocab_size, file, config.tokenizer_kind)
    write_checksummed(record, "\n".join([f"{key} {tokenizer.fingerprint}", *tokenizer.notes]).encode())
    return tokenizer


def _counting(texts: Sequence[str], progress: StageProgressCallback) -> Iterator[str]:
    """The texts of the sample, and how far the trainer is in reading them. What it then does with the words cannot be followed."""
    sizes = [len(text.encode()) for text in texts]
    read, told, total = 0, 0, sum(sizes)
    progress(StageProgress("counting words", read=0, total=total))
    for number, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        if read - told >= 1 << 20:
            progress(StageProgress("counting words", number, read=read, total=total))
            told = read
        yield text
        read += size
    progress(StageProgress("counting words", len(texts), read=total, total=total))
    progress(StageProgress("training the tokenizer", len(texts)))


def _kept_documents(
    corpus: Corpus, verdicts: dict[str, Path], dropped: Counter[str], progress: StageProgressCallback
) -> Iterator[Document]:
    """Training documents of enough chunks, evenly over the sources, for the tokenizer's sample. Counts in `dropped` those left out."""
    chunks = corpus.sampled()
    tell = _counter("reading a sample", chunks, progress)
    editors = [build_editor(source, corpus.config) for source in corpus.config.sources]
    for chunk in chunks:
        for batch in read_with_verdicts(chunk, corpus.source(chunk), verdicts.get(chunk.name), tell):
            for document, reason, _ in batch:
                if reason is not None:
                    dropped[reason] += 1
                elif uniform_hash(document) >= corpus.config.validation_fraction:
                    yield editors[chunk.source_index](document)[0]


def _adopt(
    corpus: Corpus, work: Path, tokenizer: Tokenizer, progress: StageProgressCallback
) -> dict[str, dict[str, SourceManifest]]:
    """The parts of each source of tokens that are there already. As soon as there is a tokenizer: a wrong one is found in no time."""
    tell, fraction = _counter("checking tokens", None, progress), corpus.config.validation_fraction
    sources = enumerate(zip(corpus.names, corpus.config.all_sources, strict=True))
    trusted = collect_trusted_paths(corpus.config)
    adopted: dict[str, dict[str, SourceManifest]] = {}
    for index, (name, source) in sources:
        if not source.is_text:
            with redacting_errors(source.paths, corpus.config.sources_setting(index)):
                held_out = corpus.is_held_out(index)
                adopted[name] = import_tokenized(
                    source, name, tokenizer, work, fraction, tell, is_held_out=held_out, trusted_paths=trusted
                )
    return adopted


def _tokenize(
    corpus: Corpus,
    work: Path,
    tokenizer: Tokenizer,
    verdicts: dict[str, Path],
    keep_rejects: bool,
    progress: StageProgressCallback,
) -> dict[str, ChunkResult]:
    """The result of every chunk, in order. DataError if a split would be empty."""
    config, file = corpus.config, work / "tokenizer.json"
    file = file if file.is_file() else work.parent / "tokenizer.json"
    setup = TokenizeSetup(config, work, work / RESULTS_FOLDER, file, tokenizer.fingerprint, keep_rejects)
    begin = partial(init_worker, setup)

    def job(chunk: Chunk, fraction: float) -> TokenizeJob:
        decides = hash_json(tokenizer.fingerprint, fraction, config.shard_tokens, keep_rejects)
        return TokenizeJob(chunk, fraction, verdicts.get(chunk.name), corpus.key(chunk, decides))

    jobs = [
        job(chunk, HOLD_OUT_ALL if corpus.is_held_out(chunk.source_index) else config.validation_fraction)
        for chunk in corpus.chunks
    ]
    found = {
        result.chunk: result
        for result in run_jobs(
            begin, jobs, config.workers or available_cores(), _counter("tokenizing", corpus.chunks, progress)
        )
    }
    results = {chunk.name: found[chunk.name] for chunk in corpus.chunks}
    if config.validation_fraction > 0:
        again = [
            job(chunk, math.nextafter(results[chunk.name].lowest, 2.0))
            for chunk in chunks_to_hold_out_from(corpus, results)
        ]
        results |= {
            result.chunk: result
            for result in run_jobs(begin, again, config.workers or available_cores(), lambda _: None)
        }
    _check_not_empty(corpus, results)
    return results


def _passed_over(corpus: Corpus) -> list[str]:
    """A note for each source with files in its folders that are not read."""
    sources = zip(corpus.names, corpus.config.all_sources, corpus.passed_over, strict=True)
    return [
        f"{name}: passed over {others}: what does not match {', '.join(file_patterns(source))} is not read; name it in `paths` or set "
        f"`pattern` to read it, `exclude` to do without this note"
        for name, source, others in sources
        if others
    ]


def _undecodable(corpus: Corpus, results: dict[str, ChunkResult]) -> list[str]:
    """A note for each source with documents that were no text."""
    counts = Counter[str]()
    for chunk in corpus.chunks:
        for split in results[chunk.name].splits.values():
            counts[chunk.source] += sum(split.dropped.get(defect, 0) for defect in DEFECTS)
    return [
        f"{name}: {count:,} document{'s' * (count > 1)} dropped as no text, because more than {MAX_UNDECODED:.0%} of the characters could "
        f"not be decoded or are NUL; {_CONVERT}; --keep-rejects shows which"
        for name, count in (+counts).items()
    ]


def _notes(corpus: Corpus, results: dict[str, ChunkResult]) -> tuple[str, ...]:
    """Which back ends encoded the text, and what it was compared with."""
    used = Counter(result.encoder for result in results.values() if result.encoder)
    why = {result.encoder: result.why for result in reversed(results.values())}
    notes = _undecodable(corpus, results)
    notes += [f"{count} of {len(results)} chunks encoded by {why[name]}" for name, count in used.items()]
    failures = sum(result.failures for result in results.values())
    if failures:
        notes.append(f"{failures} batches encoded by tokenizers, because gigatoken broke on them")
    dedup = corpus.config.dedup
    if dedup.minhash:
        half = f"{similarity_threshold(dedup.bands, dedup.rows):.2f}"
        notes.append(
            f"near-duplicates: half of the pairs of Jaccard similarity {half} are found, and more of closer ones"
        )
    evaluation = EvaluationNgrams.load(corpus.config.decontaminate)
    if evaluation is not None:
        notes.append(
            f"compared with {evaluation.n_texts:,} evaluation texts; {evaluation.n_too_short:,} more are too short for that"
        )
        if evaluation.skipped_files:
            notes.append(
                f"data.decontaminate.paths: passed over {evaluation.skipped_files}: only {', '.join(EVALUATION_EXTENSIONS)} are read there"
            )
    return (*notes, *notes_on_held_out(corpus, results))


def _in_words(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none at all"


def _found_instead(corpus: Corpus, dropped: Mapping[str, int]) -> str:
    """What became of the documents where none is left."""
    return f"(documents read: {_in_words(dropped)}): {corpus}" + (
        f"; {_CONVERT}" if any(defect in dropped for defect in DEFECTS) else ""
    )


def _check_not_empty(corpus: Corpus, results: dict[str, ChunkResult]) -> None:
    """DataError where a split would be empty."""
    config = corpus.config
    own = {chunk.name: results[chunk.name] for chunk in corpus.chunks if not corpus.is_held_out(chunk.source_index)}
    named = {name: result for name, result in results.items() if name not in own}
    n_train, n_held_out = count_documents(own, "train"), count_documents(own, "validation")
    if (
        config.validation
        and all(source.is_text for source in config.validation)
        and not count_documents(named, "validation")
    ):
        counts = _in_words(_dropped(named))
        raise DataError(
            f"data.validation holds no text to keep (documents read: {counts}); name other text, or leave it out"
        )
    if any(not source.is_text for source in config.sources):
        return
    if not n_train + n_held_out:
        raise DataError(f"data.sources hold no text to keep {_found_instead(corpus, _dropped(own))}")
    if config.validation_fraction > 0 and n_train + n_held_out == 1:
        raise DataError(
            "data.sources hold a single document to keep, so none can be held out; set data.validation_fraction=0, or split it (for "
            "example into a jsonl file with a document on every line)"
        )
    if not n_train:
        raise DataError(
            f"data.validation_fraction={config.validation_fraction} holds out all {n_held_out} documents; lower it, or, if data.sources "
            f"name an id_field whose values are all the same, name another"
        )


def _dropped(results: Mapping[str, ChunkResult]) -> dict[str, int]:
    """Documents dropped by reason."""
    return sum_by_reason(split.dropped for result in results.values() for split in result.splits.values())


def _manifests(
    corpus: Corpus,
    tokenizer: Tokenizer,
    recipe: Recipe,
    results: dict[str, ChunkResult],
    adopted: dict[str, dict[str, SourceManifest]],
) -> list[SplitManifest]:
    """The manifest of each split, with every source in the order of the config."""
    chunks: list[list[ChunkResult]] = [[] for _ in corpus.names]
    for chunk in corpus.chunks:
        chunks[chunk.source_index].append(results[chunk.name])
    sources: dict[str, list[SourceManifest]] = {split: [] for split in SPLITS}
    holds_out = not corpus.config.validation or corpus.config.validation_fraction > 0
    for index, (name, found) in enumerate(zip(corpus.names, chunks, strict=True)):
        parts = adopted.get(name) or _text_manifests(name, tokenizer, found)
        if corpus.is_held_out(index):
            parts = {"validation": parts["validation"]}
        elif name not in adopted and not holds_out:
            parts = {"train": parts["train"]}
        for split, manifest in parts.items():
            sources[split].append(manifest)
    if not any(source.documents for source in sources["validation"]):
        _join(sources["train"], sources.pop("validation"))
    return [
        SplitManifest(
            split=split,
            splits=tuple(sources),
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            tokenizer=tokenizer.fingerprint,
            recipe=recipe,
            sources=tuple(manifests),
        )
        for split, manifests in sources.items()
    ]


def _text_manifests(name: str, tokenizer: Tokenizer, chunks: Sequence[ChunkResult]) -> dict[str, SourceManifest]:
    """One source's part of each split: the sum of its chunks."""
    parts: dict[str, list[SplitResult]] = {split: [] for split in SPLITS}
    for chunk in chunks:
        for split, part in chunk.splits.items():
            parts[split].append(part)
    return {
        split: SourceManifest(
            name=name,
            documents=sum(part.documents for part in found),
            tokens=sum(part.tokens for part in found),
            text_bytes=sum(part.text_bytes for part in found),
            dtype=token_dtype(tokenizer.vocab_size),
            ends_with_eot=True,
            dropped=sum_by_reason(part.dropped for part in found),
            repaired=sum_by_reason(part.repaired for part in found),
            marked=sum_by_reason(part.marked for part in found),
            unknown_tokens=sum(part.unknown_tokens for part in found),
            lost_characters=sum(part.lost_characters for part in found),
            shards=tuple(shard for part in found for shard in part.shards),
        )
        for split, found in parts.items()
    }


def _join(train: list[SourceManifest], validation: list[SourceManifest]) -> None:
    """Nothing is held out: what was dropped from there is counted with the rest."""
    dropped = {source.name: source.dropped for source in validation}
    for i, source in enumerate(train):
        train[i] = source.model_copy(update={"dropped": sum_by_reason([source.dropped, dropped.get(source.name, {})])})


def _counter(stage: PrepareStage, chunks: Iterable[Chunk] | None, progress: StageProgressCallback) -> ProgressCallback:
    """Adds up what the workers tell of a stage that reads these chunks."""
    total, sums = None if chunks is None else total_bytes(chunks), Progress()

    def tell(done: Progress) -> None:
        nonlocal sums
        sums += done
        progress(StageProgress(stage, sums.documents, sums.tokens, sums.read, total))

    return tell
