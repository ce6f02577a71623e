"""The page of a prepared data set: counts, drops, lengths, samples, how it was made, and what a run reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.atomic import write_atomic
from data_pipeline.inspect import PACKED_TOKENS, DataDescription, SourceDescription, bytes_per_token
from data_pipeline.reading.forecast import Forecast, RunSegment, format_repeat_warning
from data_pipeline.storage.manifest import SplitManifest
from pretrain.console import format_count
from pretrain.errors import UserError
from pretrain.report.data_charts import drops_figure, lengths_figure
from pretrain.report.data_tables import held_out_notes, in_place_notes, segment_rows, split_rows, unknown_text_notes
from pretrain.report.render import Settings, Table, Tile, render_page


def write_data_page(file: Path, description: DataDescription, forecast: Forecast | None) -> None:
    """Write the page. Raise UserError where `file` cannot be written."""
    if file.is_dir():
        raise UserError(f"--html: {file} is a folder; name a file")
    try:
        write_atomic(file, data_page(description, forecast).encode())
    except OSError as error:
        raise UserError(f"--html: {file} cannot be written: {error.strerror}; name another file") from None


def data_page(description: DataDescription, forecast: Forecast | None) -> str:
    """Return the page as HTML."""
    sources = description.sources
    with_drops = [source for source in sources if source.drops]
    figures = {"lengths": lengths_figure([source for source in sources if source.lengths])}
    if with_drops:
        figures["drops"] = drops_figure(with_drops)
    held_out, warnings = held_out_notes(description, forecast)
    warnings += [format_repeat_warning(source) for source in forecast.heavily_repeated] if forecast else []
    manifests = [manifest for source in sources for manifest in source.splits.values()]
    tokenizer = description.tokenizer
    return render_page(
        "data.html",
        title=description.path.resolve().name,
        state=" + ".join(description.splits),
        subtitle=f"{description.path} · tokenizer of {tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint}",
        source="the manifests and shards",
        figures=figures,
        tiles=_tiles(description),
        warnings=warnings,
        splits={name: _split_table(manifest) for name, manifest in description.splits.items()},
        split_notes=[*in_place_notes(sources), *unknown_text_notes(manifests), held_out],
        segments=_segments(forecast) if forecast else {},
        forecast_note=_forecast_note(forecast) if forecast else "",
        has_drops=bool(with_drops),
        duplicates=_duplicates_table(with_drops),
        changes=_changes_table(sources),
        sampled=[source for source in sources if source.samples],
        packed_tokens=PACKED_TOKENS,
        end_of_text=description.end_of_text,
        recipe=_recipe(description),
    )


def _tiles(description: DataDescription) -> list[Tile]:
    sources = description.sources
    read, dropped = sum(source.read for source in sources), sum(sum(source.drops.values()) for source in sources)
    manifests = [manifest for source in sources for manifest in source.splits.values()]
    ratio = bytes_per_token(manifests)
    by_split = ", ".join(f"{format_count(manifest.tokens)} {name}" for name, manifest in description.splits.items())
    return [
        Tile("Tokens", format_count(description.tokens), by_split),
        Tile("Documents", format_count(description.documents), f"{description.documents:,} of {read:,} read"),
        Tile("Dropped", f"{dropped / max(1, read):.1%}", f"{dropped:,} documents"),
        Tile("Fertility", f"{ratio:.2f}" if ratio else "not known", "bytes of text by token"),
        Tile("Sources", f"{len(sources)}", f"{sum(len(manifest.shards) for manifest in manifests):,} shards"),
    ]


def _split_table(manifest: SplitManifest) -> Table:
    headings = ("Source", "Documents read", "Dropped", "Written", "Tokens", "Share", "Bytes/token", "Shards")
    return Table(headings, split_rows(manifest), has_total=True)


def _segments(forecast: Forecast) -> dict[str, Table]:
    """Return a table of what the whole run reads, and one for each stage of the mixture if there are several."""
    stages = forecast.stages if len(forecast.stages) > 1 else ()
    return {
        "The whole run": _segment_table(forecast.run),
        **{forecast.title(stage): _segment_table(stage) for stage in stages},
    }


def _segment_table(segment: RunSegment) -> Table:
    headings = ("Source", "Sequences", "Tokens", "Share", "Epochs", "Repeated tokens")
    return Table(headings, segment_rows(segment), has_total=True)


def _forecast_note(forecast: Forecast) -> str:
    return (
        f"{forecast.run.stop:,} sequences of {forecast.seq_len:,} tokens; {forecast.padding:.2%} of the positions are "
        f"padding (data.packing={forecast.packing})."
    )


def _duplicates_table(sources: Sequence[SourceDescription]) -> Table | None:
    """Return how many duplicates each source lost, and which source holds the copy that was kept."""
    rows = [
        (entry.source, entry.kept_in, f"{entry.exact:,}", f"{entry.near:,}")
        for source in sources
        for entry in source.duplicates
    ]
    return Table(("Dropped from", "Kept in", "Exact", "Near"), rows, text_columns=2) if rows else None


def _changes_table(sources: Sequence[SourceDescription]) -> Table | None:
    """Return how many documents were repaired or marked, by reason."""
    rows = [(source.name, reason, f"{count:,}") for source in sources for reason, count in source.changes.items()]
    return Table(("Source", "Change", "Documents"), rows, text_columns=2) if rows else None


def _recipe(description: DataDescription) -> Settings:
    return {
        section: [(entry.name, entry.value, entry.changed) for entry in entries]
        for section, entries in description.recipe.items()
    }
