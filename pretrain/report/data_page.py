"""The page of a prepared data set: counts, drops, lengths, samples, how it was made, and what a run reads of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from data_pipeline.atomic import write_atomic
from data_pipeline.inspect import (
    PACKED_TOKENS,
    DataDescription,
    DecodedText,
    PackedSequence,
    SampleDocument,
    SourceDescription,
    bytes_per_token,
)
from data_pipeline.reading.forecast import Forecast, RunSegment, format_repeat_warning
from data_pipeline.storage.manifest import SplitManifest
from pretrain.console import format_count
from pretrain.errors import UserError
from pretrain.report import render
from pretrain.report.data_charts import drops, lengths
from pretrain.report.data_tables import held_out_notes, in_place_notes, segment_rows, split_rows, unknown_text_notes
from pretrain.report.render import text
from pretrain.report.run_charts import themes


def write_data_page(file: Path, description: DataDescription, forecast: Forecast | None) -> None:
    """Write the page. UserError where `file` cannot be written."""
    if file.is_dir():
        raise UserError(f"--html: {file} is a folder; name a file")
    try:
        write_atomic(file, data_page(description, forecast).encode())
    except OSError as error:
        raise UserError(f"--html: {file} cannot be written: {error.strerror}; name another file") from None


def data_page(description: DataDescription, forecast: Forecast | None) -> str:
    """The page as HTML."""
    sources = description.sources
    dropping = [source for source in sources if source.drops]
    figures = {"lengths": lengths([source for source in sources if source.lengths])}
    if dropping:
        figures["drops"] = drops(dropping)
    held_out_line, warnings = held_out_notes(description, forecast)
    warnings += [format_repeat_warning(source) for source in forecast.heavily_repeated] if forecast else []
    body = [
        render.tiles(_tiles(description)),
        render.notices(warnings),
        _splits(description, held_out_line),
        _forecast(forecast) if forecast else "",
        render.card("lengths", "Document lengths", render.chart("lengths", "documents and tokens by length")),
        _dropped(dropping) if dropping else "",
        _kept(sources),
        _samples(description),
        _recipe(description),
    ]
    subtitle = f"{description.path} · tokenizer of {description.tokenizer.vocab_size:,} tokens, {description.tokenizer.fingerprint}"
    state = " + ".join(description.splits)
    return render.page(
        description.path.resolve().name, state, subtitle, "\n".join(body), "the manifests and shards", figures, themes()
    )


def _tiles(description: DataDescription) -> list[tuple[str, str, str]]:
    sources = description.sources
    read, dropped = sum(source.read for source in sources), sum(sum(source.drops.values()) for source in sources)
    parts = [part for source in sources for part in source.splits.values()]
    known = bytes_per_token(parts)
    return [
        (
            "Tokens",
            format_count(description.tokens),
            ", ".join(f"{format_count(m.tokens)} {name}" for name, m in description.splits.items()),
        ),
        ("Documents", format_count(description.documents), f"{description.documents:,} of {read:,} read"),
        ("Dropped", f"{dropped / max(1, read):.1%}", f"{dropped:,} documents"),
        ("Fertility", f"{known:.2f}" if known else "not known", "bytes of text by token"),
        ("Sources", f"{len(sources)}", f"{sum(len(part.shards) for part in parts):,} shards"),
    ]


def _splits(description: DataDescription, held_out_line: str) -> str:
    tables = "".join(
        f'<h3>{text(name)}</h3><div class="scroll">{_split(m)}</div>' for name, m in description.splits.items()
    )
    sentences = [
        *in_place_notes(description.sources),
        *unknown_text_notes([part for s in description.sources for part in s.splits.values()]),
        held_out_line,
    ]
    lines = "".join(f'<p class="note">{text(sentence)}</p>' for sentence in sentences)
    return render.card("splits", "What it holds", tables + lines)


def _split(manifest: SplitManifest) -> str:
    head = ("Source", "Documents read", "Dropped", "Written", "Tokens", "Share", "Bytes/token", "Shards")
    return render.table(head, split_rows(manifest), total=True)


def _forecast(forecast: Forecast) -> str:
    whole = forecast.run
    body = f'<h3>The whole run</h3><div class="scroll">{_stretch(whole)}</div>'
    for stage in forecast.stages if len(forecast.stages) > 1 else ():
        body += f'<h3>{text(forecast.title(stage))}</h3><div class="scroll">{_stretch(stage)}</div>'
    note = (
        f"{whole.stop:,} sequences of {forecast.seq_len:,} tokens; {forecast.padding:.2%} of the positions are padding "
        f"(data.packing={forecast.packing})."
    )
    return render.card("forecast", "What a run with these settings reads", body, note)


def _stretch(stretch: RunSegment) -> str:
    return render.table(
        ("Source", "Sequences", "Tokens", "Share", "Epochs", "Repeated tokens"), segment_rows(stretch), total=True
    )


def _dropped(sources: Sequence[SourceDescription]) -> str:
    chart = render.chart("drops", "dropped documents by reason")
    duplicates = [entry for source in sources for entry in source.duplicates]
    if duplicates:
        rows = [(entry.source, entry.kept_in, f"{entry.exact:,}", f"{entry.near:,}") for entry in duplicates]
        table = render.table(("Dropped from", "Kept in", "Exact", "Near"), rows, words=2)
        chart += f'<h3>Duplicates, and where the document is that was kept</h3><div class="scroll">{table}</div>'
    return render.card("drops", "Dropped documents", chart, "Shares of the documents that were read of the source.")


def _kept(sources: Iterable[SourceDescription]) -> str:
    rows = [(source.name, reason, f"{count:,}") for source in sources for reason, count in source.changes.items()]
    if not rows:
        return ""
    return render.card("changes", "Kept with a remark", render.table(("Source", "Remark", "Documents"), rows, words=2))


def _samples(description: DataDescription) -> str:
    shown = [source for source in description.sources if source.samples]
    if not shown:
        return ""
    end = f'<span class="end">{text(description.end_of_text)}</span>'
    parts = []
    for number, source in enumerate(shown):
        documents = "".join(_sample(sample, end) for sample in source.samples)
        packed = _packed(source.packed, end) if source.packed else ""
        parts.append(
            f"<details{' open' * (number == 0)}><summary>{text(source.name)}</summary>{documents}{packed}</details>"
        )
    return render.card("samples", "Samples", "".join(parts), "Decoded; the end-of-text token is marked.")


def _sample(sample: SampleDocument, end: str) -> str:
    gap = '\n<span class="gap">[...]</span>\n' if sample.tail else ""
    note = f"Document {sample.number:,} of {sample.split}, tokens {sample.start:,} to {sample.stop - 1:,}"
    return f'<p class="note">{note}</p><pre class="sample">{_decoded(sample.head, end)}{gap}{_decoded(sample.tail, end)}</pre>'


def _packed(packed: PackedSequence, end: str) -> str:
    """One box for the sequence, a part of it for each document."""
    parts = "".join(
        f'<div class="piece"><span class="gap">document {piece.number:,}, its tokens {piece.first:,} to '
        f"{piece.first + piece.count - 1:,} of {piece.length:,}</span>\n{_decoded(piece.text, end)}</div>"
        for piece in packed.pieces
    )
    padding = (
        f'<div class="piece"><span class="gap">{packed.padding} tokens of padding</span></div>'
        if packed.padding
        else ""
    )
    note = f"How documents meet in a sequence of {PACKED_TOKENS} tokens, here {packed.start:,} to {packed.start + PACKED_TOKENS - 1:,}"
    return f'<p class="note">{note}</p><pre class="sample">{parts}{padding}</pre>'


def _decoded(pieces: DecodedText, end: str) -> str:
    return "".join(end if piece is None else text(piece) for piece in pieces)


def _recipe(description: DataDescription) -> str:
    sections = {name: [(e.name, e.value, e.changed) for e in entries] for name, entries in description.recipe.items()}
    return render.card(
        "config", "How it was made", render.settings(sections), "What differs from the defaults is bold."
    )
