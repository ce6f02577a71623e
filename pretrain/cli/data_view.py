"""A prepared data set on the terminal: tables, bars and samples. Draws what `data_pipeline.inspect` and `forecast` found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from data_pipeline.forecast import MANY_EPOCHS, Forecast, Stretch
from data_pipeline.inspect import PACKED_TOKENS, Decoded, Description, PackedSequence, SampleDocument, SourceDescription, fertility
from data_pipeline.manifest import Manifest, SourceManifest

BAR = 24
"""Characters of the longest bar."""


def draw(description: Description, forecast: Forecast | None, console: Console) -> None:
    """Everything, the figures first."""
    tokenizer = description.tokenizer
    head = Text.assemble((str(description.path), "bold"), f"  tokenizer of {tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint}")
    console.print(head, soft_wrap=True)
    for manifest in description.splits.values():
        console.print()
        console.print(_split_table(manifest))
    for source in description.sources:
        if source.in_place is not None:
            files, where = source.in_place
            _line(console, f"{source.name}: the tokens of {files:,} shard{'s' * (files > 1)} are read in place, from {where}")
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


def _split_table(manifest: Manifest) -> Table:
    table = _table(manifest.split, "documents\nread", "\ndropped", "\nwritten", "\ntokens", "\nshare", "bytes/\ntoken", "\nshards")
    table.columns[0].header = f"\n{manifest.split}"
    table.columns[0].header_style = "bold"
    for source in manifest.sources:
        table.add_row(source.name, *_counts([source], manifest.tokens))
    if len(manifest.sources) > 1:
        table.add_row("all", *_counts(manifest.sources, manifest.tokens), style="bold")
    return table


def _counts(sources: Sequence[SourceManifest], all_tokens: int) -> list[str]:
    documents, tokens = sum(source.documents for source in sources), sum(source.tokens for source in sources)
    known = fertility(sources)
    return [
        f"{sum(source.read for source in sources):,}",
        f"{sum(sum(source.dropped.values()) for source in sources):,}",
        f"{documents:,}",
        f"{tokens:,}",
        f"{tokens / max(1, all_tokens):.1%}",
        f"{known:.2f}" if known else "-",
        f"{sum(len(source.shards) for source in sources):,} {'/'.join(sorted({source.dtype for source in sources}))}",
    ]


def _draw_forecast(forecast: Forecast, console: Console) -> None:
    whole = forecast.whole
    _heading(console, "A run with these settings reads", f"{whole.stop:,} sequences of {forecast.seq_len:,} tokens")
    table = _table("", "sequences", "tokens", "share", "epochs", "repeated tokens")
    _add_stretch(table, "the whole run", whole)
    for stage in forecast.stages if len(forecast.stages) > 1 else ():
        percent = f"{stage.start / whole.stop:.0%} to {stage.stop / whole.stop:.0%}"
        table.add_section()
        _add_stretch(table, f"from sequence {stage.start:,}: {percent} of the run", stage)
    console.print(table)
    _line(console, f"{forecast.padding:.2%} of the positions are padding (data.packing={forecast.packing})", "dim")
    for source in forecast.read_often:
        _line(console, often(source.name, source.epochs), "yellow")


def often(name: str, epochs: float) -> str:
    """The warning about a source that is read very often."""
    return (
        f"{name} is read {epochs:,.1f} times: beyond {MANY_EPOCHS} epochs, repeated text teaches less and less (arXiv:2305.16264); "
        f"lower its weight, shorten the run, or add text"
    )


def _add_stretch(table: Table, title: str, stretch: Stretch) -> None:
    table.add_row(Text(title, "dim"))
    rows = [(source.name, source.sequences, source.tokens, f"{source.epochs:.2f}", source.repeats) for source in stretch.sources]
    if len(rows) > 1:
        rows.append(("all", stretch.stop - stretch.start, stretch.tokens, "", stretch.repeats))
    for name, sequences, tokens, epochs, repeats in rows:
        share = f"{tokens / max(1, stretch.tokens):.1%}"
        table.add_row(f"  {name}", f"{sequences:,}", f"{tokens:,}", share, epochs, f"{repeats:,}")


def _draw_drops(sources: Iterable[SourceDescription], console: Console) -> None:
    """Bars on one axis, that of shares of the documents that a source had."""
    shown = [source for source in sources if source.drops or source.changes]
    if not shown:
        return
    _heading(console, "Dropped documents", "shares of those read")
    longest = max((count / source.read for source in shown for count in source.drops.values()), default=1.0)
    table = _table("", "documents", "share", "")
    table.columns[3].justify = "left"
    for source in shown:
        table.add_row(Text(source.name, "dim"))
        for reason, count in source.drops.items():
            table.add_row(f"  {reason}", f"{count:,}", f"{count / source.read:.2%}", _bar(count / source.read / longest))
        for reason, count in source.changes.items():
            table.add_row(f"  kept, {reason}", f"{count:,}", f"{count / source.read:.2%}", "")
    console.print(table)
    duplicates = [entry for source in shown for entry in source.duplicates]
    if duplicates:
        _heading(console, "Duplicates", "where the document is that was kept")
        table = _table("dropped from", "", "exact", "near")
        table.columns[1].header, table.columns[1].justify = "kept in", "left"
        for entry in duplicates:
            table.add_row(entry.source, entry.kept_in, f"{entry.exact:,}", f"{entry.near:,}")
        console.print(table)


def _bar(share: float) -> Text:
    """A bar in eighths of a character."""
    eighths = max(1, round(8 * BAR * share)) if share else 0
    return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), "cyan")


def _draw_lengths(sources: Sequence[SourceDescription], console: Console) -> None:
    """Sources beside each other, as many as fit, with the same rows and the same scale."""
    sources = [source for source in sources if source.lengths]
    if not sources:
        return
    _heading(console, "Document lengths in tokens", "bars and first number: share of the source's documents; second: of its tokens")
    lows = sorted({entry.low for source in sources for entry in source.lengths})
    rows = [1 << k for k in range(lows[0].bit_length() - 1, lows[-1].bit_length())]
    longest = max(entry.documents / source.documents for source in sources for entry in source.lengths)
    first = len(f"{rows[-1]:,} to {2 * rows[-1] - 1:,}") + 2
    together = max(1, (console.width - first) // (BAR + 17))
    for start in range(0, len(sources), together):
        table = _table("")
        table.columns[0].justify, table.columns[0].no_wrap = "right", True
        columns = []
        for source in sources[start : start + together]:
            table.add_column(source.name, min_width=BAR, overflow="fold")
            table.add_column("", justify="right", no_wrap=True)
            table.add_column("", justify="right", no_wrap=True)
            columns.append((source, {entry.low: entry for entry in source.lengths}))
        for low in rows:
            cells: list[Text | str] = [f"{low:,} to {2 * low - 1:,}" if low > 1 else "1"]
            for source, entries in columns:
                entry = entries.get(low)
                if entry is None:
                    cells += ["", "", ""]
                    continue
                share = entry.documents / source.documents
                cells += [_bar(share / longest), f"{share:.1%}", f"{entry.tokens / source.tokens:.1%}"]
            table.add_row(*cells)
        console.print(table)


def _draw_samples(description: Description, console: Console) -> None:
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
    console.print(Padding(text, (0, 0, 0, 2)))


def _draw_packed(name: str, packed: PackedSequence, end: str, console: Console) -> None:
    stop = packed.start + PACKED_TOKENS
    _heading(console, name, f"how documents meet in a sequence of {PACKED_TOKENS} tokens, here {packed.start:,} to {stop - 1:,}")
    for piece in packed.pieces:
        last = piece.first + piece.count - 1
        _line(console, f"  document {piece.number:,}, its tokens {piece.first:,} to {last:,} of {piece.length:,}", "dim")
        console.print(Padding(_decoded(piece.text, end), (0, 0, 0, 4)))
    if packed.padding:
        _line(console, f"  {packed.padding} tokens of padding", "dim")


def _decoded(pieces: Decoded, end: str) -> Text:
    """Text with its end-of-text tokens as marks: what a text merely spells looks different, with and without colours."""
    return Text.assemble(*((f"▌{end}▐", "reverse cyan") if piece is None else piece for piece in pieces))


def _draw_recipe(description: Description, console: Console) -> None:
    _heading(console, "How it was made", "what differs from the defaults is bold")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for section, entries in description.recipe.items():
        words = [Text(f"{entry.name} {entry.value}", "bold" if entry.changed else "") for entry in entries]
        table.add_row(section, Text("\n" if section == "sources" else ", ").join(words))
    console.print(table)
