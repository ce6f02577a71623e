"""Text to shards: `prepare` cleans the sources, trains the tokenizer if there is none, and writes both splits.

The same settings and files give the same bytes, whatever the number of workers and however often it was interrupted: the sources
are cut into chunks, each chunk's work depends on that chunk and the settings alone, and a result that is there already is used
again if it carries the hash of all that decided it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import xxhash
from pydantic import BaseModel, ValidationError

from data_pipeline.chunks import Chunk, cut, read_batches
from data_pipeline.clean import CleanJob, clean, edited, needs_cleaning
from data_pipeline.decontaminate import evaluation_hash
from data_pipeline.durable import write_synced
from data_pipeline.errors import DataError
from data_pipeline.files import SourceFile, describe_files, list_files
from data_pipeline.filters import check_filters, filter_versions, lists_hash
from data_pipeline.manifest import MANIFEST, SPLITS, Manifest, Recipe, SourceManifest
from data_pipeline.prepared import DONE, JUDGED, Prepared, bring_tokenizer, check_same_settings, commit, open_prepared, working_folder
from data_pipeline.settings import AUTO, PrepareConfig, SourceConfig, source_names
from data_pipeline.shard_writer import is_whole
from data_pipeline.shards import token_dtype
from data_pipeline.sources import Document
from data_pipeline.tokenize import ChunkResult, SplitResult, TokenizeJob, place, tokenize_chunk
from data_pipeline.tokenized import adopt, describe_tokens
from data_pipeline.tokenizer import Tokenizer, document_hash, load_tokenizer, sample_texts, train_tokenizer
from data_pipeline.verdicts import read_verdicts
from data_pipeline.workers import Done, Tell, cores, run_jobs

_CHUNK_BYTES_PER_TOKEN = 3
"""A chunk is this many bytes of text for each token of a shard, so that it rarely fills more than one: most text has 3 to 5."""

_SAMPLE_EXCESS = 8
"""The tokenizer's sample is drawn from whole chunks with this many times its size of text, or from all."""

Stage = Literal["cleaning", "comparing documents", "reading a sample", "training the tokenizer", "tokenizing", "checking tokens"]


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    stage: Stage
    documents: int = 0
    tokens: int = 0
    read: int = 0
    """Bytes of the sources' files read in this stage, compressed size."""
    total: int | None = None
    """Bytes of the sources' files; None where a source (`hf`) cannot tell."""


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class _Corpus:
    """The sources as they were found: listed once, because a folder of a million files takes its time."""

    config: PrepareConfig
    names: tuple[str, ...]
    listings: tuple[str | None, ...]
    chunks: tuple[Chunk, ...]
    lists: str

    @property
    def total(self) -> int | None:
        """Bytes to read."""
        sizes = [chunk.bytes for chunk in self.chunks]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def source(self, chunk: Chunk) -> SourceConfig:
        return self.config.sources[chunk.index]

    def described(self) -> str:
        return "; ".join(f"{source.kind} {', '.join(source.paths)}" for source in self.config.sources)


def prepare(path: Path, config: PrepareConfig, *, keep_rejects: bool = False, progress: OnProgress = lambda _: None) -> Prepared:
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
    corpus = _find(config)
    tokenizer = None if config.tokenizer == AUTO else config.tokenizer
    recipe = _recipe(corpus, trained_tokenizer=tokenizer is None)
    if (path / "train" / MANIFEST).is_file():
        check_same_settings(path, recipe, tokenizer)
        rejects = "; rejects are written only while it is prepared" if keep_rejects and not (path / "rejects").exists() else ""
        return open_prepared(path, (f"{path} is prepared already, with these very settings{rejects}",))
    with working_folder(path) as work:
        verdicts = _clean(corpus, work, progress)
        if tokenizer is None and not (path / "tokenizer.json").is_file():
            made = _train(work / "tokenizer.json", corpus, verdicts, progress)
        else:
            made = bring_tokenizer(path, tokenizer or path, work)
            recipe = recipe.model_copy(update={"trained_tokenizer": False})
        file = next(folder / "tokenizer.json" for folder in (work, path) if (folder / "tokenizer.json").is_file())
        results = _tokenize(corpus, work, file, verdicts, keep_rejects, progress)
        commit(work, path, _manifests(corpus, work, made, recipe, results, progress))
    return open_prepared(path, _notes(results))


def build_tokenizer(file: Path, config: PrepareConfig, *, progress: OnProgress = lambda _: None) -> Tokenizer:
    """Train a tokenizer on what is kept of the sources and write it to `file`; it is the one that `prepare` would train.

    Raises:
        DataError: `file` is there already, or the sources cannot be read or hold no text.
    """
    if file.exists():
        raise DataError(f"{file} is there already; delete it to train another (shards made with it are useless then)")
    corpus = _find(config)
    with working_folder(file.parent) as work:
        tokenizer = _train(work / "tokenizer.json", corpus, _clean(corpus, work, progress), progress)
        (work / "tokenizer.json").replace(file)
    return tokenizer


def _find(config: PrepareConfig) -> _Corpus:
    """List and cut the sources, and check what can be checked before any text is read."""
    if not config.sources:
        raise DataError("data.sources is empty; name the text to prepare, e.g. `sources: [{kind: text, paths: [my/folder]}]`")
    names = source_names(config.sources)
    check_filters(config)
    files: list[Sequence[SourceFile]] = [list_files(source) if source.is_text else [] for source in config.sources]
    text_bytes = _CHUNK_BYTES_PER_TOKEN * config.shard_tokens
    return _Corpus(
        config=config,
        names=names,
        listings=tuple(_listing(source, found) for source, found in zip(config.sources, files, strict=True)),
        chunks=tuple(
            chunk for i, source in enumerate(config.sources) if source.is_text for chunk in cut(i, names[i], source, files[i], text_bytes)
        ),
        lists=f"{lists_hash(config.filters)} {evaluation_hash(config.decontaminate)}",
    )


def _listing(source: SourceConfig, files: Sequence[SourceFile]) -> str | None:
    if not source.is_text:
        return describe_tokens(source)
    return None if source.kind == "hf" else describe_files(files)


def _recipe(corpus: _Corpus, trained_tokenizer: bool) -> Recipe:
    settings = {name: getattr(corpus.config, name) for name in PrepareConfig.model_fields}
    return Recipe(
        settings=PrepareConfig(**(settings | {"workers": None, "tokenizer": AUTO})),
        trained_tokenizer=trained_tokenizer,
        listings=corpus.listings,
        lists=corpus.lists,
        made_with={"tokenizers": version("tokenizers")} | filter_versions(corpus.config),
    )


def _clean(corpus: _Corpus, work: Path, progress: OnProgress) -> dict[str, Path]:
    """The file of verdicts of each chunk; none where nothing but emptiness drops a document."""
    config = corpus.config
    if not corpus.chunks or not needs_cleaning(config):
        return {}
    jobs = [
        CleanJob(
            chunk,
            corpus.source(chunk),
            config,
            work / JUDGED,
            _chunk_key(chunk, corpus.source(chunk), config.filters, config.dedup, config.decontaminate, corpus.lists),
        )
        for chunk in corpus.chunks
    ]
    count = _Count(corpus, progress)
    return clean(
        jobs,
        config,
        _workers(config),
        count("cleaning"),
        lambda share: progress(Progress("comparing documents", read=int(1000 * share), total=1000)),
    )


def _train(file: Path, corpus: _Corpus, verdicts: dict[str, Path], progress: OnProgress) -> Tokenizer:
    """Train a tokenizer on an even sample of the kept training documents and write it to `file`."""
    config = corpus.config
    kept = _kept_documents(corpus, verdicts, _Count(corpus, progress)("reading a sample"))
    texts = sample_texts(kept, config.tokenizer_sample_mb * 1e6)
    if not texts:
        fraction = config.validation_fraction
        held_out = f" once data.validation_fraction={fraction} of the documents is held out" if fraction else ""
        raise DataError(f"data.sources hold no text to train a tokenizer on{held_out}: {corpus.described()}")
    progress(Progress("training the tokenizer", len(texts)))
    return train_tokenizer(texts, config.vocab_size, file, config.tokenizer_kind)


def _kept_documents(corpus: _Corpus, verdicts: dict[str, Path], tell: Callable[[Done], None]) -> Iterator[Document]:
    """Training documents of enough chunks, evenly over the sources, for the tokenizer's sample."""
    for chunk in _sampled_chunks(corpus):
        found = read_verdicts(verdicts[chunk.name]) if verdicts else None
        seen = read = 0
        for batch in read_batches(chunk, corpus.source(chunk)):
            for number, document in enumerate(batch, start=seen):
                dropped = not document.text.strip() if found is None else found.reason(number) is not None
                if not dropped and place(document) >= corpus.config.validation_fraction:
                    yield edited(document, corpus.source(chunk), corpus.config)[0]
            tell(Done(len(batch), batch[-1].read - read))
            seen, read = seen + len(batch), batch[-1].read


def _sampled_chunks(corpus: _Corpus) -> list[Chunk]:
    """All chunks, or of each source the same share of them, chosen by the hash of their names."""
    known = [chunk.bytes or 0 for chunk in corpus.chunks]
    share = min(1.0, _SAMPLE_EXCESS * corpus.config.tokenizer_sample_mb * 1e6 / max(1, sum(known)))
    chosen: set[str] = set()
    for index in {chunk.index for chunk in corpus.chunks}:
        own = sorted((chunk.name for chunk in corpus.chunks if chunk.index == index), key=lambda name: document_hash(name, salt=2))
        chosen.update(own[: math.ceil(share * len(own))])
    return [chunk for chunk in corpus.chunks if chunk.name in chosen]


def _tokenize(
    corpus: _Corpus, work: Path, tokenizer: Path, verdicts: dict[str, Path], keep_rejects: bool, progress: OnProgress
) -> dict[str, ChunkResult]:
    """The result of every chunk. DataError if a split would be empty."""
    config, fingerprint = corpus.config, load_tokenizer(tokenizer).fingerprint
    tell = _Count(corpus, progress)("tokenizing")

    def job(chunk: Chunk, fraction: float) -> TokenizeJob:
        source, verdict = corpus.source(chunk), verdicts.get(chunk.name)
        seen = "" if verdict is None else xxhash.xxh3_128_hexdigest(verdict.read_bytes())
        key = _chunk_key(chunk, source, fingerprint, fraction, config.shard_tokens, config.filters, corpus.lists, seen, keep_rejects)
        return TokenizeJob(chunk, source, config, work, tokenizer, fraction, verdict, keep_rejects, key)

    results = _results([job(chunk, config.validation_fraction) for chunk in corpus.chunks], work, _workers(config), tell)
    if config.validation_fraction > 0 and not _documents(results, "validation") and _documents(results, "train") > 1:
        # A small corpus, of which the hash holds out nothing: hold out the document of lowest hash.
        chunk = min(corpus.chunks, key=lambda chunk: results[chunk.name].lowest)
        results |= _results([job(chunk, math.nextafter(results[chunk.name].lowest, 2.0))], work, 1, lambda _: None)
    _check_not_empty(corpus, results)
    return results


def _results(jobs: Sequence[TokenizeJob], work: Path, workers: int, tell: Tell) -> dict[str, ChunkResult]:
    """The result of each chunk: read back where an earlier attempt finished it and its files are whole, else made."""
    results: dict[str, ChunkResult] = {}
    for job in jobs:
        there = _read_result(work, job)
        if there is not None:
            results[job.name] = there
            tell(Done(there.read, job.chunk.bytes or 0, there.tokens))
    for result in run_jobs(tokenize_chunk, [job for job in jobs if job.name not in results], workers, tell):
        write_synced(work / DONE / f"{result.chunk}.json", result.model_dump_json().encode())
        results[result.chunk] = result
    return results


def _notes(results: dict[str, ChunkResult]) -> tuple[str, ...]:
    """Which back ends encoded the text."""
    used = Counter(result.encoder for result in results.values() if result.encoder)
    why = {result.encoder: result.why for result in reversed(results.values())}
    return tuple(f"{count} of {len(results)} chunks encoded by {why[name]}" for name, count in used.items())


def _check_not_empty(corpus: _Corpus, results: dict[str, ChunkResult]) -> None:
    """DataError where a split would be empty."""
    config, n_train, n_held_out = corpus.config, _documents(results, "train"), _documents(results, "validation")
    if any(not source.is_text for source in config.sources):
        return
    if not n_train + n_held_out:
        dropped = _total(split.dropped for result in results.values() for split in result.splits.values())
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none at all"
        raise DataError(f"data.sources hold no text to keep (documents read: {counts}): {corpus.described()}")
    if config.validation_fraction > 0 and n_train + n_held_out == 1:
        raise DataError(
            "data.sources hold a single document, so none can be held out; set data.validation_fraction=0, or split it (for example "
            "into a jsonl file with a document on every line)"
        )
    if not n_train:
        raise DataError(f"data.validation_fraction={config.validation_fraction} holds out all {n_held_out} documents; lower it")


def _source_manifest(name: str, split: str, tokenizer: Tokenizer, parts: Sequence[SplitResult]) -> SourceManifest:
    """One source's part of a split: the sum of its chunks."""
    return SourceManifest(
        name=name,
        documents=sum(part.documents for part in parts),
        tokens=sum(part.tokens for part in parts),
        text_bytes=sum(part.text_bytes for part in parts),
        dtype=token_dtype(tokenizer.vocab_size),
        ends_with_eot=True,
        dropped=_total(part.dropped for part in parts),
        repaired=_total(part.repaired for part in parts),
        marked=_total(part.marked for part in parts),
        shards=tuple(shard for part in parts for shard in part.shards),
    )


def _manifests(
    corpus: _Corpus, work: Path, tokenizer: Tokenizer, recipe: Recipe, results: dict[str, ChunkResult], progress: OnProgress
) -> list[Manifest]:
    """The manifest of each split, with every source in the order of the config; tokens of other tools are checked here."""
    fraction = corpus.config.validation_fraction
    tell = _Count(corpus, progress)("checking tokens")
    sources: dict[str, list[SourceManifest]] = {split: [] for split in SPLITS}
    for name, source in zip(corpus.names, corpus.config.sources, strict=True):
        if source.is_text:
            chunks = [results[chunk.name] for chunk in corpus.chunks if chunk.source == name]
            for split in SPLITS if fraction > 0 else ("train",):
                parts = [chunk.splits[split] for chunk in chunks if split in chunk.splits]
                sources[split].append(_source_manifest(name, split, tokenizer, parts))
        else:
            for split, manifest in adopt(source, name, tokenizer, work, fraction, tell).items():
                sources[split].append(manifest)
    splits = tuple(split for split in SPLITS if any(source.documents for source in sources[split]))
    return [
        Manifest(
            split=split,
            splits=splits,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            tokenizer=tokenizer.fingerprint,
            recipe=recipe,
            sources=tuple(sources[split]),
        )
        for split in splits
    ]


@dataclass
class _Count:
    """Adds up what the workers tell."""

    corpus: _Corpus
    progress: OnProgress

    def __call__(self, stage: Stage) -> Tell:
        sums = Done()

        def tell(done: Done) -> None:
            nonlocal sums
            sums += done
            total = None if stage == "checking tokens" else self.corpus.total
            self.progress(Progress(stage, sums.documents, sums.tokens, sums.read, total))

        return tell


def _workers(config: PrepareConfig) -> int:
    return config.workers or cores()


def _documents(results: dict[str, ChunkResult], split: str) -> int:
    return sum(result.splits[split].documents for result in results.values() if split in result.splits)


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts by reason, added up; the order does not depend on which came first."""
    return dict(sorted(sum((Counter(count) for count in counts), Counter[str]()).items()))


def _chunk_key(chunk: Chunk, *decides: object) -> str:
    """Hash of a chunk's files and of the settings that decide what becomes of it."""
    parts = [(part.file.path, part.file.size, part.start, part.stop) for part in chunk.parts]
    plain = [value.model_dump(mode="json") if isinstance(value, BaseModel) else value for value in decides]
    return xxhash.xxh3_128_hexdigest(json.dumps([chunk.name, parts, plain]).encode())


def _read_result(work: Path, job: TokenizeJob) -> ChunkResult | None:
    """The chunk's result if an earlier attempt finished it with the same key, and its files are whole."""
    try:
        result = ChunkResult.model_validate_json((work / DONE / f"{job.name}.json").read_bytes())
    except (OSError, ValidationError):
        return None
    whole = result.key == job.key and all(is_whole(work / name, shard) for name, split in result.splits.items() for shard in split.shards)
    return result if whole else None
