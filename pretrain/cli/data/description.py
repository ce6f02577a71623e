"""A prepared data set on the terminal: tables, bars and samples. Draws what `data_pipeline.inspect` and `forecast` found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from data_pipeline.inspect import (
    PACKED_TOKENS,
    DataDescription,
    DecodedText,
    PackedSequence,
    SampleDocument,
    SourceDescription,
)
from data_pipeline.reading.forecast import Forecast, RunSegment, format_repeat_warning
from data_pipeline.storage.manifest import SplitManifest
from pretrain.report.data_tables import held_out, losses, places, split_rows, stretch_rows

BAR = 24
"""Characters of the longest bar."""


def draw(description: DataDescription, forecast: Forecast | None, console: Console) -> None:
    """Everything, the figures first."""
    tokenizer = description.tokenizer
    head = Text.assemble(
        (str(description.path), "bold"), f"  tokenizer of {tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint}"
    )
    console.print(head, soft_wrap=True)
    _line(console, "documents read, dropped and written; tokens with the end-of-text token of each document", "dim")
    for manifest in description.splits.values():
        console.print(_split_table(manifest))
    for sentence in [
        *places(description.sources),
        *losses([part for s in description.sources for part in s.splits.values()]),
    ]:
        _line(console, sentence)
    line, warnings = held_out(description, forecast)
    _line(console, line)
    for sentence in warnings:
        _line(console, f"warning: {sentence}", "yellow")
    if forecast is not None:
        _draw_forecast(forecast, console)
    _draw_drops(description.sources, console)
    _draw_lengths(description.sources, console)
    _draw_samples(description, console)
    _draw_recipe(description, console)


def _heading(console: Console, title: str, remark: str = "") -> None:
    console.print()
    console.print(Text.assemble((title, "bold"), (f"  {remark}" if remark else "", "dim")), soft_wrap=True)


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)


def _table(first: str, *numbers: str) -> Table:
    """A name and numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _split_table(manifest: SplitManifest) -> Table:
    table = _table(
        f"\n{manifest.split}", "\nread", "\ndropped", "\nwritten", "\ntokens", "\nshare", "bytes/\ntoken", "\nshards"
    )
    table.columns[0].header_style = "bold"
    *rows, last = split_rows(manifest)
    for row in rows:
        table.add_row(*row)
    table.add_row(*last, style="bold" if rows else "")
    return table


def _draw_forecast(forecast: Forecast, console: Console) -> None:
    whole = forecast.run
    _heading(console, "A run with these settings reads", f"{whole.stop:,} sequences of {forecast.seq_len:,} tokens")
    table = _table("", "sequences", "tokens", "share", "epochs", "repeated tokens")
    _add_stretch(table, "the whole run", whole)
    for stage in forecast.stages if len(forecast.stages) > 1 else ():
        _add_stretch(table, forecast.title(stage), stage)
    console.print(table)
    _line(console, f"{forecast.padding:.2%} of the positions are padding (data.packing={forecast.packing})", "dim")
    for source in forecast.heavily_repeated:
        _line(console, format_repeat_warning(source), "yellow")


def _add_stretch(table: Table, title: str, stretch: RunSegment) -> None:
    table.add_row(Text(title, "dim"))
    for name, *cells in stretch_rows(stretch):
        table.add_row(f"  {name}", *cells)


def _draw_drops(sources: Iterable[SourceDescription], console: Console) -> None:
    """Bars on one axis, that of shares of the documents that a source had."""
    shown = [source for source in sources if source.drops or source.changes]
    if not shown:
        return
    _heading(console, "Dropped documents", "shares of those read")
    longest = max((count / source.read for source in shown for count in source.drops.values()), default=1.0)
    table = _table("", "documents", "share", "")
    table.columns[3].justify = "left"
    reasons = [
        *(reason for source in shown for reason in source.drops),
        *(f"kept, {r}" for source in shown for r in source.changes),
    ]
    room = min(BAR, max(8, console.width - max(map(len, reasons)) - 24))
    for source in shown:
        table.add_row(Text(source.name, "dim"))
        for reason, count in source.drops.items():
            table.add_row(
                Text(f"  {reason}"),
                f"{count:,}",
                f"{count / source.read:.2%}",
                _bar(count / source.read / longest, room),
            )
        for reason, count in source.changes.items():
            table.add_row(Text(f"  kept, {reason}"), f"{count:,}", f"{count / source.read:.2%}", "")
    console.print(table)
    duplicates = [entry for source in shown for entry in source.duplicates]
    if duplicates:
        _heading(console, "Duplicates", "where the document is that was kept")
        table = _table("dropped from", "", "exact", "near")
        table.columns[1].header, table.columns[1].justify = "kept in", "left"
        for entry in duplicates:
            table.add_row(entry.source, entry.kept_in, f"{entry.exact:,}", f"{entry.near:,}")
        console.print(table)


def _bar(share: float, room: int) -> Text:
    """A bar in eighths of a character; `room` characters are all."""
    eighths = max(1, round(8 * room * share)) if share else 0
    return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), "cyan")


def _draw_lengths(sources: Sequence[SourceDescription], console: Console) -> None:
    """Sources beside each other, as many as fit, with the same rows and the same scale."""
    sources = [source for source in sources if source.lengths]
    if not sources:
        return
    _heading(
        console,
        "Document lengths in tokens",
        "bars and first number: share of the source's documents; second: of its tokens",
    )
    lows = sorted({entry.low for source in sources for entry in source.lengths})
    rows = [1 << k for k in range(lows[0].bit_length() - 1, lows[-1].bit_length())]
    longest = max(entry.documents / source.documents for source in sources for entry in source.lengths)
    first = len(f"{rows[-1]:,} to {2 * rows[-1] - 1:,}") + 2
    together = max(1, min(len(sources), (console.width - first) // (BAR // 2 + 18)))
    room = max(BAR // 2, min(BAR, (console.width - first) // together - 18))
    for start in range(0, len(sources), together):
        table = _table("")
        table.columns[0].justify, table.columns[0].no_wrap = "right", True
        columns = []
        for source in sources[start : start + together]:
            table.add_column(source.name, min_width=room, overflow="fold")
            table.add_column("", justify="right", no_wrap=True)
            table.add_column("", justify="right", no_wrap=True)
            columns.append((source, {entry.low: entry for entry in source.lengths}))
        for low in rows:
            cells: list[Text | str] = [f"{low:,} to {2 * low - 1:,}" if low > 1 else "1"]
            for source, entries in columns:
                entry = entries.get(low)
                if entry is None or not entry.documents:
                    cells += ["", "", ""]
                    continue
                share = entry.documents / source.documents
                cells += [_bar(share / longest, room), f"{share:.1%}", f"{entry.tokens / source.tokens:.1%}"]
            table.add_row(*cells)
        console.print(table)


def _draw_samples(description: DataDescription, console: Console) -> None:
    for source in description.sources:
        for sample in source.samples:
            _draw_sample(source.name, sample, description.end_of_text, console)
        if source.packed is not None:
            _draw_packed(source.name, source.packed, description.end_of_text, console)


def _draw_sample(name: str, sample: SampleDocument, end: str, console: Console) -> None:
    span = f"document {sample.number:,} of {sample.split}, tokens {sample.start:,} to {sample.stop - 1:,}"
    _heading(console, name, span)
    text = _decoded(sample.head, end)
    if sample.tail:
        text = Text.assemble(text, ("\n[...]\n", "dim"), _decoded(sample.tail, end))
    console.print(Padding(text, (0, 0, 0, 2), expand=False))


def _draw_packed(name: str, packed: PackedSequence, end: str, console: Console) -> None:
    stop = packed.start + PACKED_TOKENS
    _heading(
        console,
        name,
        f"how documents meet in a sequence of {PACKED_TOKENS} tokens, here {packed.start:,} to {stop - 1:,}",
    )
    for piece in packed.pieces:
        last = piece.first + piece.count - 1
        _line(
            console, f"  document {piece.number:,}, its tokens {piece.first:,} to {last:,} of {piece.length:,}", "dim"
        )
        console.print(Padding(_decoded(piece.text, end), (0, 0, 0, 4), expand=False))
    if packed.padding:
        _line(console, f"  {packed.padding} tokens of padding", "dim")


def _decoded(pieces: DecodedText, end: str) -> Text:
    """Text with its end-of-text tokens as marks: what a text merely spells looks different, with and without colours."""
    return Text.assemble(*((f"▌{end}▐", "reverse cyan") if piece is None else piece for piece in pieces))


def _draw_recipe(description: DataDescription, console: Console) -> None:
    _heading(console, "How it was made", "what differs from the defaults is bold")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for section, entries in description.recipe.items():
        words = [Text(f"{entry.name}: {entry.value}", "bold" if entry.changed else "") for entry in entries]
        table.add_row(section, Text("\n" if section == "sources" else "; ").join(words))
    console.print(table)
