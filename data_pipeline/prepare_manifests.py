"""Results of chunks to the manifests of the splits."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.corpus import Corpus
from data_pipeline.splitting import sum_by_reason
from data_pipeline.storage.manifest import SPLITS, Recipe, SourceManifest, SplitManifest
from data_pipeline.storage.shards import token_dtype
from data_pipeline.tokenizing.split_writer import SplitResult
from data_pipeline.tokenizing.tokenize import ChunkResult
from data_pipeline.tokenizing.tokenizer import Tokenizer


def build_manifests(
    corpus: Corpus,
    tokenizer: Tokenizer,
    recipe: Recipe,
    results: dict[str, ChunkResult],
    imported: dict[str, dict[str, SourceManifest]],
) -> list[SplitManifest]:
    """Build the manifest of each split, with the sources in the order of the settings.

    Args:
        corpus: the sources.
        tokenizer: what the tokens were made with.
        recipe: how the splits were made.
        results: the result of each chunk of text, by name.
        imported: the splits of each tokenized source, by source and split.
    """
    chunks: list[list[ChunkResult]] = [[] for _ in corpus.names]
    for chunk in corpus.chunks:
        chunks[chunk.source_index].append(results[chunk.name])
    sources: dict[str, list[SourceManifest]] = {split: [] for split in SPLITS}
    holds_out = not corpus.config.validation or corpus.config.validation_fraction > 0
    for index, (name, found) in enumerate(zip(corpus.names, chunks, strict=True)):
        parts = imported.get(name) or _sum_chunks(name, tokenizer, found)
        if corpus.is_held_out(index):
            parts = {"validation": parts["validation"]}
        elif name not in imported and not holds_out:
            parts = {"train": parts["train"]}
        for split, manifest in parts.items():
            sources[split].append(manifest)
    if not any(source.documents for source in sources["validation"]):
        _add_dropped(sources["train"], sources.pop("validation"))
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


def _sum_chunks(name: str, tokenizer: Tokenizer, chunks: Sequence[ChunkResult]) -> dict[str, SourceManifest]:
    """Add up the chunks of one source to its entry in the manifest of each split."""
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


def _add_dropped(train: list[SourceManifest], validation: list[SourceManifest]) -> None:
    """Count the documents dropped from a validation split that is not written as dropped from the training split."""
    dropped = {source.name: source.dropped for source in validation}
    for i, source in enumerate(train):
        train[i] = source.model_copy(update={"dropped": sum_by_reason([source.dropped, dropped.get(source.name, {})])})
