"""Which documents are held out: a fraction of each source, and all of `data.validation`.

The hash of a document's name decides, see `uniform_hash`. So neither other documents nor the number of workers matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from data_pipeline.cleaning.dedup import HELD_OUT_DUPLICATES
from data_pipeline.cleaning.minhash import similarity_threshold
from data_pipeline.corpus import Corpus
from data_pipeline.text.chunks import Chunk
from data_pipeline.tokenizing.tokenize import ChunkResult

HOLD_OUT_ALL = 2.0
"""The validation fraction for the sources of `data.validation`: more than any `uniform_hash`."""


def chunks_to_hold_out_from(corpus: Corpus, results: Mapping[str, ChunkResult]) -> list[Chunk]:
    """Return the chunks whose document of the lowest hash is held out although its hash is above the fraction.

    One chunk of each source that has several documents but none held out. If every source has a single document, one
    chunk of all.
    """
    sources: dict[int, list[Chunk]] = {}
    for chunk in corpus.chunks:
        if not corpus.is_held_out(chunk.source_index):
            sources.setdefault(chunk.source_index, []).append(chunk)

    def is_missing(chunks: Iterable[Chunk]) -> bool:
        own = {chunk.name: results[chunk.name] for chunk in chunks}
        return not count_documents(own, "validation") and count_documents(own, "train") > 1

    missing = [chunks for chunks in sources.values() if is_missing(chunks)]
    if not missing:
        all_chunks = [chunk for chunks in sources.values() for chunk in chunks]
        missing = [all_chunks] if is_missing(all_chunks) else []
    return [min(chunks, key=lambda chunk: results[chunk.name].lowest) for chunks in missing]


def notes_on_held_out(corpus: Corpus, results: Mapping[str, ChunkResult]) -> list[str]:
    """Return notes on what the comparison with `data.validation` found, and on sources that could not be compared."""
    config = corpus.config
    if not config.validation:
        return []
    dropped = sum_by_reason(split.dropped for result in results.values() for split in result.splits.values())
    exact, near = (
        sum(count for reason, count in dropped.items() if reason.startswith(f"{kind}: "))
        for kind in HELD_OUT_DUPLICATES
    )
    held_out = {chunk.name: results[chunk.name] for chunk in corpus.chunks if corpus.is_held_out(chunk.source_index)}
    notes = [
        f"compared with {count_documents(held_out, 'validation'):,} held-out documents of data.validation: {exact:,} "
        f"training documents dropped as exact duplicates, {near:,} as near-duplicates (half of those of Jaccard "
        f"similarity {similarity_threshold(config.dedup.bands, config.dedup.rows):.2f} are found, and more of closer "
        "ones)"
    ]
    tokens = [name for name, source in zip(corpus.names, config.all_sources, strict=True) if not source.is_text]
    if tokens:
        notes.append(f"not compared: {', '.join(tokens)} hold{'s' * (len(tokens) == 1)} tokens, not text")
    return notes


def count_documents(results: Mapping[str, ChunkResult], split: str) -> int:
    """Count the documents written to a split."""
    return sum(result.splits[split].documents for result in results.values() if split in result.splits)


def sum_by_reason(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up counts by reason. The result is sorted by reason."""
    total = Counter[str]()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))
