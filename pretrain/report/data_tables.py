"""What the tables of a data set say, cell by cell, the same on the terminal and on its page."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.held_out import format_held_out_counts, held_out_warnings
from data_pipeline.inspect import DataDescription, SourceDescription, bytes_per_token
from data_pipeline.reading.forecast import Forecast, RunSegment
from data_pipeline.storage.manifest import SourceManifest, SplitManifest
from data_pipeline.tokenizing.coverage import LOST_CHARACTERS, UNKNOWN_TOKENS
from pretrain.config import DataConfig
from pretrain.report.render import Row


def split_rows(manifest: SplitManifest) -> list[Row]:
    """Source, documents read, dropped, written, tokens, share of the tokens, bytes/token, shards; of several sources the sum as well."""
    rows = [(source.name, *_counts([source], manifest.tokens)) for source in manifest.sources]
    return [*rows, ("all", *_counts(manifest.sources, manifest.tokens))] if len(rows) > 1 else rows


def stretch_rows(stretch: RunSegment) -> list[Row]:
    """Source, sequences, tokens, share of the tokens, epochs, repeated tokens; of several sources the sum as well."""
    rows = [
        (source.name, source.sequences, source.tokens, f"{source.epochs:.2f}", source.repeats)
        for source in stretch.sources
    ]
    if len(rows) > 1:
        rows.append(("all", stretch.stop - stretch.start, stretch.tokens, "", stretch.repeats))
    return [
        (name, f"{sequences:,}", f"{tokens:,}", f"{tokens / max(1, stretch.tokens):.1%}", epochs, f"{repeats:,}")
        for name, sequences, tokens, epochs, repeats in rows
    ]


def places(sources: Sequence[SourceDescription]) -> list[str]:
    """A sentence for each source whose tokens are read where another tool put them."""
    found = [(source.name, *source.in_place) for source in sources if source.in_place is not None]
    return [
        f"{name}: the tokens of {n:,} shard{'s' * (n > 1)} are read in place, from {where}" for name, n, where in found
    ]


def losses(sources: Sequence[SourceManifest]) -> list[str]:
    """A sentence for each source of which the tokenizer did not know all, over the splits that are given."""
    sentences = []
    for name in dict.fromkeys(source.name for source in sources):
        parts = [source for source in sources if source.name == name]
        unknown, lost = sum(part.unknown_tokens for part in parts), sum(part.lost_characters for part in parts)
        tokens = sum(part.tokens for part in parts)
        if unknown:
            holding = sum(part.marked.get(UNKNOWN_TOKENS, 0) for part in parts)
            what = f"{unknown:,} of {tokens:,} tokens ({unknown / tokens:.2%}) stand for text that the tokenizer does not know"
            sentences.append(f"{name}: {what}, in {_documents(holding)}")
        if lost:
            what = f"{lost:,} characters that the tokenizer does not know are left out"
            sentences.append(
                f"{name}: {what}, of {_documents(sum(part.marked.get(LOST_CHARACTERS, 0) for part in parts))}"
            )
    return sentences


def _documents(count: int) -> str:
    return f"{count:,} document{'s' * (count != 1)}"


def held_out(description: DataDescription, forecast: Forecast | None) -> tuple[str, list[str]]:
    """(how many sequences of each source are held out, a warning for each of which there are few). Sequences are those of the run, or of
    the usual length."""
    seq_len = DataConfig().seq_len if forecast is None else forecast.seq_len
    line = format_held_out_counts(description.splits, seq_len) or "nothing is held out for validation"
    return line, held_out_warnings(description.splits, seq_len)


def _counts(sources: Sequence[SourceManifest], all_tokens: int) -> Row:
    tokens, known = sum(source.tokens for source in sources), bytes_per_token(sources)
    return (
        f"{sum(source.read for source in sources):,}",
        f"{sum(sum(source.dropped.values()) for source in sources):,}",
        f"{sum(source.documents for source in sources):,}",
        f"{tokens:,}",
        f"{tokens / max(1, all_tokens):.1%}",
        f"{known:.2f}" if known else "-",
        f"{sum(len(source.shards) for source in sources):,} {'/'.join(sorted({source.dtype for source in sources}))}",
    )
