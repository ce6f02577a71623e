"""The tables and notes about a data set, cell by cell. The terminal and the HTML page show the same."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.held_out import format_held_out_counts, held_out_warnings
from data_pipeline.inspect import DataDescription, SourceDescription, bytes_per_token
from data_pipeline.reading.forecast import Forecast, RunSegment
from data_pipeline.storage.manifest import SourceManifest, SplitManifest
from data_pipeline.tokenizing.coverage import LOST_CHARACTERS, UNKNOWN_TOKENS
from pretrain.config import DataConfig

Row = tuple[str, ...]


def split_rows(manifest: SplitManifest) -> list[Row]:
    """Return the rows of a split: source, documents read, dropped, written, tokens, share, bytes/token, shards.

    Several sources end with a row of their sum.
    """
    rows = [(source.name, *_counts([source], manifest.tokens)) for source in manifest.sources]
    return [*rows, ("all", *_counts(manifest.sources, manifest.tokens))] if len(rows) > 1 else rows


def segment_rows(segment: RunSegment) -> list[Row]:
    """Return the rows of a part of a run: source, sequences, tokens, share of the tokens, epochs, repeated tokens.

    Several sources end with a row of their sum.
    """
    rows = [
        (source.name, source.sequences, source.tokens, f"{source.epochs:.2f}", source.repeats)
        for source in segment.sources
    ]
    if len(rows) > 1:
        rows.append(("all", segment.stop - segment.start, segment.tokens, "", segment.repeats))
    return [
        (name, f"{sequences:,}", f"{tokens:,}", f"{tokens / max(1, segment.tokens):.1%}", epochs, f"{repeats:,}")
        for name, sequences, tokens, epochs, repeats in rows
    ]


def in_place_notes(sources: Sequence[SourceDescription]) -> list[str]:
    """Return a sentence for each source whose tokens stay in the folder of another tool."""
    found = [(source.name, *source.in_place) for source in sources if source.in_place is not None]
    return [
        f"{name}: the tokens of {n:,} shard{'s' * (n > 1)} are read in place, from {folder}"
        for name, n, folder in found
    ]


def unknown_text_notes(manifests: Sequence[SourceManifest]) -> list[str]:
    """Return a sentence for each source that holds text unknown to the tokenizer.

    Several manifests of a source add up.
    """
    notes = []
    for name in dict.fromkeys(manifest.name for manifest in manifests):
        splits = [manifest for manifest in manifests if manifest.name == name]
        unknown, lost = sum(split.unknown_tokens for split in splits), sum(split.lost_characters for split in splits)
        tokens = sum(split.tokens for split in splits)
        if unknown:
            documents = _format_documents(sum(split.marked.get(UNKNOWN_TOKENS, 0) for split in splits))
            counts = f"{unknown:,} of {tokens:,} tokens ({unknown / tokens:.2%})"
            notes.append(f"{name}: {counts} stand for text that the tokenizer does not know, in {documents}")
        if lost:
            documents = _format_documents(sum(split.marked.get(LOST_CHARACTERS, 0) for split in splits))
            notes.append(f"{name}: {lost:,} characters that the tokenizer does not know are left out, of {documents}")
    return notes


def held_out_notes(description: DataDescription, forecast: Forecast | None) -> tuple[str, list[str]]:
    """Return (held-out sequences by source, a warning for each source that holds out too few).

    Sequences have the length of the forecast's run, or the default `data.seq_len`.
    """
    seq_len = DataConfig().seq_len if forecast is None else forecast.seq_len
    counts = format_held_out_counts(description.splits, seq_len) or "nothing is held out for validation"
    return counts, held_out_warnings(description.splits, seq_len)


def _format_documents(count: int) -> str:
    return f"{count:,} document{'s' * (count != 1)}"


def _counts(sources: Sequence[SourceManifest], all_tokens: int) -> Row:
    """Return the cells of `split_rows` after the name, summed over the sources."""
    tokens, ratio = sum(source.tokens for source in sources), bytes_per_token(sources)
    dtypes = "/".join(sorted({source.dtype for source in sources}))
    return (
        f"{sum(source.read for source in sources):,}",
        f"{sum(sum(source.dropped.values()) for source in sources):,}",
        f"{sum(source.documents for source in sources):,}",
        f"{tokens:,}",
        f"{tokens / max(1, all_tokens):.1%}",
        f"{ratio:.2f}" if ratio else "-",
        f"{sum(len(source.shards) for source in sources):,} {dtypes}",
    )
