"""Text to shards: `prepare` reads the sources, trains the tokenizer if there is none, and writes both splits.

The same settings and files give the same bytes.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.durable import write_synced
from data_pipeline.errors import DataError
from data_pipeline.files import SourceFile, describe_files, list_files
from data_pipeline.manifest import DTYPES, MANIFEST, Manifest, Recipe, Shard, TrainedTokenizer
from data_pipeline.prepared import SPLITS, Prepared, bring_tokenizer, check_same_settings, commit, open_prepared, working_folder
from data_pipeline.settings import SourceConfig
from data_pipeline.shards import ShardWriter, Tokens, token_dtype
from data_pipeline.sources import Document, read_documents
from data_pipeline.tokenizer import Tokenizer, document_hash, sample_texts, train_tokenizer

Corpus = Sequence[tuple[SourceConfig, Sequence[SourceFile]]]
"""The sources, each with its files: listed once, because a folder of a million files takes its time."""

_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    stage: Literal["reading a sample", "training the tokenizer", "tokenizing"]
    documents: int = 0
    tokens: int = 0
    read: int = 0
    """Bytes of the sources' files read in this stage, compressed size."""
    total: int | None = None
    """Bytes of the sources' files; None where a source (`hf`) cannot tell."""


OnProgress = Callable[[Progress], None]


@dataclass
class _Split:
    """A split being written."""

    writer: ShardWriter
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    shards: tuple[Shard, ...] = ()

    def add(self, ids: Tokens, text_bytes: int) -> None:
        self.writer.add(ids)
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes


def prepare(
    *,
    path: Path,
    sources: Sequence[SourceConfig],
    tokenizer: Path | None,
    vocab_size: int,
    tokenizer_sample_mb: float,
    validation_fraction: float,
    shard_tokens: int,
    progress: OnProgress = lambda _: None,
) -> Prepared:
    """Turn the sources into `<path>/train/`, `<path>/validation/` and `<path>/tokenizer.json`.

    Args:
        path: `data.path`.
        sources: raw text, read in order.
        tokenizer: a `tokenizer.json` or its folder; None uses the one in `path`, or trains it there.
        vocab_size: vocabulary of a newly trained tokenizer.
        tokenizer_sample_mb: megabytes of the training documents that it is trained on.
        validation_fraction: share of the documents held out, chosen by the hash of their id; one document at least, unless it is 0.
        shard_tokens: tokens in a shard at most; a longer document has a shard of its own.
        progress: called after every few megabytes of text.

    Raises:
        DataError: a source cannot be read or holds no text, `path` holds other data, or another process is preparing it.
            Nothing is left behind then.
    """
    corpus = _list(sources)
    recipe = Recipe(
        sources=tuple(sources),
        listings=tuple(None if source.kind == "hf" else describe_files(files) for source, files in corpus),
        trained_tokenizer=TrainedTokenizer(vocab_size=vocab_size, sample_mb=tokenizer_sample_mb),
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        made_with={"tokenizers": version("tokenizers")},
    )
    if (path / "train" / MANIFEST).is_file():
        check_same_settings(path, recipe, tokenizer)
        return open_prepared(path, already=True)
    with working_folder(path) as work:
        if tokenizer is None and not (path / "tokenizer.json").is_file():
            file = work / "tokenizer.json"
            made = _train(file, corpus, vocab_size, tokenizer_sample_mb, validation_fraction, progress)
        else:
            made = bring_tokenizer(path, tokenizer or path, work)
            recipe = recipe.model_copy(update={"trained_tokenizer": None})
        _write_splits(work, made, recipe, corpus, progress)
        commit(work, path)
    return open_prepared(path, already=False)


def build_tokenizer(
    file: Path,
    *,
    sources: Sequence[SourceConfig],
    vocab_size: int,
    tokenizer_sample_mb: float,
    validation_fraction: float = 0.0,
    progress: OnProgress = lambda _: None,
) -> Tokenizer:
    """Train a byte-level BPE on an even sample of the sources and write it to `file`. Reads all sources once.

    The documents that `validation_fraction` holds out are not sampled; the same settings give the tokenizer that `prepare` trains.

    Raises:
        DataError: `file` is there already, or the sources cannot be read or hold no text.
    """
    if file.exists():
        raise DataError(f"{file} is there already; delete it to train another (shards made with it are useless then)")
    return _train(file, _list(sources), vocab_size, tokenizer_sample_mb, validation_fraction, progress)


def _list(sources: Sequence[SourceConfig]) -> Corpus:
    if not sources:
        raise DataError("data.sources is empty; name the text to prepare, e.g. `sources: [{kind: text, paths: [my/folder]}]`")
    return [(source, list_files(source)) for source in sources]


def _train(file: Path, corpus: Corpus, vocab_size: int, sample_mb: float, validation_fraction: float, progress: OnProgress) -> Tokenizer:
    """Train a tokenizer on the training documents and write it to `file`."""

    def training_documents() -> Iterator[Document]:
        total, n_documents = _total_bytes(corpus), 0
        for batch in _batches(_read_all(corpus)):
            yield from (document for document in batch if document.text.strip() and not _held_out(document, validation_fraction))
            n_documents += len(batch)
            progress(Progress("reading a sample", n_documents, read=batch[-1].read, total=total))

    texts = sample_texts(training_documents(), sample_mb * 1e6)
    if not texts:
        held_out = f" once data.validation_fraction={validation_fraction} of the documents is held out" if validation_fraction else ""
        raise DataError(f"data.sources hold no text to train a tokenizer on{held_out}: {_described(corpus)}")
    progress(Progress("training the tokenizer", len(texts)))
    return train_tokenizer(texts, vocab_size, file)


def _write_splits(work: Path, tokenizer: Tokenizer, recipe: Recipe, corpus: Corpus, progress: OnProgress) -> None:
    """Write both splits with their manifests to `work`. DataError if one of them would be empty."""
    fraction = recipe.validation_fraction
    splits, lowest = _tokenize(work, tokenizer, recipe.shard_tokens, corpus, fraction, progress)
    if fraction > 0 and not splits["validation"].documents and splits["train"].documents > 1:
        # A small corpus, of which the hash holds out nothing: once more, so that it holds out the document of lowest hash.
        for name in SPLITS:
            shutil.rmtree(work / name)
        splits, _ = _tokenize(work, tokenizer, recipe.shard_tokens, corpus, lowest, progress)
    n_documents = sum(split.documents for split in splits.values())
    dropped = sum((split.dropped for split in splits.values()), Counter[str]())
    if not n_documents:
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none at all"
        raise DataError(f"data.sources hold no text (documents read: {counts}): {_described(corpus)}")
    if fraction > 0 and n_documents == 1:
        raise DataError(
            "data.sources hold a single document, so none can be held out; set data.validation_fraction=0, or split it (for example "
            "into a jsonl file with a document on every line)"
        )
    if not splits["train"].documents:
        raise DataError(f"data.validation_fraction={fraction} holds out all {n_documents} documents; lower it")
    for name, split in splits.items():
        _write_manifest(work / name, split, tokenizer, recipe)


def _tokenize(
    work: Path, tokenizer: Tokenizer, shard_tokens: int, corpus: Corpus, fraction: float, progress: OnProgress
) -> tuple[dict[str, _Split], float]:
    """Write the shards of both splits; also returns the fraction that would hold out just one document."""
    dtype = token_dtype(tokenizer.vocab_size)
    names = SPLITS if fraction > 0 else ("train",)
    splits = {name: _Split(ShardWriter(work / name, dtype, shard_tokens)) for name in names}
    total, lowest, n_documents, n_tokens = _total_bytes(corpus), 1.0, 0, 0
    for batch in _batches(_read_all(corpus)):
        kept: list[tuple[_Split, Document]] = []
        for document in batch:
            split = splits["validation" if _held_out(document, fraction) else "train"]
            if not document.text.strip():
                split.dropped["empty"] += 1
                continue
            split.repaired["invalid Unicode"] += document.repaired
            lowest = min(lowest, _place(document))
            kept.append((split, document))
        encoded = tokenizer.encode_batch([document.text for _, document in kept])
        for (split, document), ids in zip(kept, encoded, strict=True):
            split.add(np.array([*ids, tokenizer.eot_id], DTYPES[dtype]), document.n_bytes)
            n_tokens += len(ids) + 1
        n_documents += len(batch)
        progress(Progress("tokenizing", n_documents, n_tokens, batch[-1].read, total))
    for split in splits.values():
        split.shards = split.writer.finish()
    return splits, math.nextafter(lowest, 2.0)


def _write_manifest(folder: Path, split: _Split, tokenizer: Tokenizer, recipe: Recipe) -> None:
    manifest = Manifest(
        split=folder.name,
        documents=split.documents,
        tokens=split.tokens,
        text_bytes=split.text_bytes,
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer=tokenizer.fingerprint,
        dropped=dict(+split.dropped),
        repaired=dict(+split.repaired),
        recipe=recipe,
        shards=split.shards,
    )
    write_synced(folder / MANIFEST, manifest.to_bytes())


def _place(document: Document) -> float:
    """A document's place in [0, 1], by the hash of its id: independent of order, source and everything else."""
    return document_hash(document.id, salt=0) / 2**64


def _held_out(document: Document, fraction: float) -> bool:
    return _place(document) < fraction


def _read_all(corpus: Corpus) -> Iterator[Document]:
    """The documents of all sources in order; `read` counts over all of them."""
    before = 0
    for source, files in corpus:
        for document in read_documents(source, files):
            yield replace(document, read=before + document.read) if before else document
        before += sum(file.size for file in files)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into a few megabytes of text: enough to keep every core busy."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.n_bytes
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _total_bytes(corpus: Corpus) -> int | None:
    if any(source.kind == "hf" for source, _ in corpus):
        return None
    return sum(file.size for _, files in corpus for file in files)


def _described(corpus: Corpus) -> str:
    return "; ".join(f"{source.kind} {', '.join(source.paths)}" for source, _ in corpus)
