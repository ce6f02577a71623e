"""A prepared data set on the terminal: tables, bars and sample texts of what `pretrain data inspect` found."""

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
from pretrain.console import plain_table, print_heading, print_line
from pretrain.report.data_tables import (
    held_out_notes,
    in_place_notes,
    segment_rows,
    split_rows,
    unknown_text_notes,
)

MAX_BAR_WIDTH = 24
"""Characters of the longest bar."""


def print_description(description: DataDescription, forecast: Forecast | None, console: Console) -> None:
    """Print everything: counts first, then drops, lengths, samples and the recipe."""
    tokenizer = description.tokenizer
    title = f"  tokenizer of {tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint}"
    print_line(console, Text.assemble((str(description.path), "bold"), title))
    note = "documents read, dropped and written; tokens with the end-of-text token of each document"
    print_line(console, note, "dim")
    for manifest in description.splits.values():
        console.print(split_table(manifest))
    manifests = [manifest for source in description.sources for manifest in source.splits.values()]
    counts, warnings = held_out_notes(description, forecast)
    for note in (*in_place_notes(description.sources), *unknown_text_notes(manifests), counts):
        print_line(console, note)
    for warning in warnings:
        print_line(console, f"warning: {warning}", "yellow")
    if forecast is not None:
        print_forecast(forecast, console)
    print_drops(description.sources, console)
    print_lengths(description.sources, console)
    for source in description.sources:
        for sample in source.samples:
            print_sample(source.name, sample, description.end_of_text, console)
        if source.packed is not None:
            print_packed(source.name, source.packed, description.end_of_text, console)
    print_recipe(description, console)


def split_table(manifest: SplitManifest) -> Table:
    """Return the counts of each source in one split; the last of several rows is their sum."""
    headings = ("read", "dropped", "written", "tokens", "share", "bytes/\ntoken", "shards")
    table = plain_table(*(heading if "\n" in heading else f"\n{heading}" for heading in (manifest.split, *headings)))
    table.columns[0].header_style = "bold"
    *rows, last = split_rows(manifest)
    for row in rows:
        table.add_row(*row)
    table.add_row(*last, style="bold" if rows else "")
    return table


def print_forecast(forecast: Forecast, console: Console) -> None:
    """Print what a run reads, in all and by stage of the mixture, and warn of sources that it repeats often."""
    run = forecast.run
    print_heading(console, "A run with these settings reads", f"{run.stop:,} sequences of {forecast.seq_len:,} tokens")
    table = plain_table("", "sequences", "tokens", "share", "epochs", "repeated tokens")
    add_segment(table, "the whole run", run)
    for stage in forecast.stages if len(forecast.stages) > 1 else ():
        add_segment(table, forecast.title(stage), stage)
    console.print(table)
    note = f"{forecast.padding:.2%} of the positions are padding (data.packing={forecast.packing})"
    print_line(console, note, "dim")
    for source in forecast.heavily_repeated:
        print_line(console, format_repeat_warning(source), "yellow")


def add_segment(table: Table, title: str, segment: RunSegment) -> None:
    """Add a part of the run to the table: its title, then a row for each source."""
    table.add_row(Text(title, "dim"))
    for name, *cells in segment_rows(segment):
        table.add_row(f"  {name}", *cells)


def print_drops(sources: Iterable[SourceDescription], console: Console) -> None:
    """Print dropped and changed documents by reason.

    A bar is a share of the documents read; all bars have the same scale.
    """
    shown = [source for source in sources if source.drops or source.changes]
    if not shown:
        return
    print_heading(console, "Dropped documents", "shares of those read")
    longest = max((count / source.read for source in shown for count in source.drops.values()), default=1.0)
    table = plain_table("", "documents", "share", "")
    table.columns[3].justify = "left"
    reasons = [
        *(reason for source in shown for reason in source.drops),
        *(f"kept, {reason}" for source in shown for reason in source.changes),
    ]
    width = min(MAX_BAR_WIDTH, max(8, console.width - max(map(len, reasons)) - 24))
    for source in shown:
        table.add_row(Text(source.name, "dim"))
        for reason, count in source.drops.items():
            share = count / source.read
            table.add_row(Text(f"  {reason}"), f"{count:,}", f"{share:.2%}", draw_bar(share / longest, width))
        for reason, count in source.changes.items():
            table.add_row(Text(f"  kept, {reason}"), f"{count:,}", f"{count / source.read:.2%}", "")
    console.print(table)
    print_duplicates(shown, console)


def print_duplicates(sources: Iterable[SourceDescription], console: Console) -> None:
    """Print how many duplicates each source lost, and which source holds the copy that was kept."""
    duplicates = [entry for source in sources for entry in source.duplicates]
    if not duplicates:
        return
    print_heading(console, "Duplicates", "and the source of the copy that was kept")
    table = plain_table("dropped from", "kept in", "exact", "near")
    table.columns[1].justify = "left"
    for entry in duplicates:
        table.add_row(entry.source, entry.kept_in, f"{entry.exact:,}", f"{entry.near:,}")
    console.print(table)


def draw_bar(fraction: float, width: int) -> Text:
    """Return a bar for a fraction of `width` characters, in steps of an eighth of a character."""
    eighths = max(1, round(8 * width * fraction)) if fraction else 0
    return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), "cyan")


def print_lengths(sources: Sequence[SourceDescription], console: Console) -> None:
    """Print a histogram of document lengths for each source, side by side, with the same rows and scale."""
    sources = [source for source in sources if source.lengths]
    if not sources:
        return
    note = "bars and first number: share of the source's documents; second number: share of its tokens"
    print_heading(console, "Document lengths in tokens", note)
    lows = sorted({entry.low for source in sources for entry in source.lengths})
    rows = [1 << k for k in range(lows[0].bit_length() - 1, lows[-1].bit_length())]
    longest = max(entry.documents / source.documents for source in sources for entry in source.lengths)
    label_width, numbers_width = len(length_label(rows[-1])) + 2, 18
    room = console.width - label_width
    per_table = max(1, min(len(sources), room // (MAX_BAR_WIDTH // 2 + numbers_width)))
    bar_width = max(MAX_BAR_WIDTH // 2, min(MAX_BAR_WIDTH, room // per_table - numbers_width))
    for start in range(0, len(sources), per_table):
        console.print(lengths_table(sources[start : start + per_table], rows, longest, bar_width))


def lengths_table(sources: Sequence[SourceDescription], rows: Sequence[int], longest: float, bar_width: int) -> Table:
    """Return the histograms of some sources side by side.

    Args:
        sources: have documents.
        rows: the least length of each row; a row ends at twice that.
        longest: share of documents that fills a bar.
        bar_width: characters of a full bar.
    """
    table = plain_table("")
    table.columns[0].justify, table.columns[0].no_wrap = "right", True
    for source in sources:
        table.add_column(source.name, min_width=bar_width, overflow="fold")
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    entries = [{entry.low: entry for entry in source.lengths} for source in sources]
    for low in rows:
        cells: list[Text | str] = [length_label(low)]
        for source, by_low in zip(sources, entries, strict=True):
            entry = by_low.get(low)
            if entry is None or not entry.documents:
                cells += ["", "", ""]
                continue
            share = entry.documents / source.documents
            cells += [draw_bar(share / longest, bar_width), f"{share:.1%}", f"{entry.tokens / source.tokens:.1%}"]
        table.add_row(*cells)
    return table


def length_label(low: int) -> str:
    """Return the lengths of a bin: `1`, `64 to 127`."""
    return f"{low:,} to {2 * low - 1:,}" if low > 1 else "1"


def print_sample(name: str, sample: SampleDocument, end_of_text: str, console: Console) -> None:
    """Print the beginning and the end of a document."""
    span = f"document {sample.number:,} of {sample.split}, tokens {sample.start:,} to {sample.stop - 1:,}"
    print_heading(console, name, span)
    text = mark_end_of_text(sample.head, end_of_text)
    if sample.tail:
        text = Text.assemble(text, ("\n[...]\n", "dim"), mark_end_of_text(sample.tail, end_of_text))
    console.print(Padding(text, (0, 0, 0, 2), expand=False))


def print_packed(name: str, packed: PackedSequence, end_of_text: str, console: Console) -> None:
    """Print the documents of one packed sequence."""
    stop = packed.start + PACKED_TOKENS
    note = f"how documents meet in a sequence of {PACKED_TOKENS} tokens, here {packed.start:,} to {stop - 1:,}"
    print_heading(console, name, note)
    for piece in packed.pieces:
        last = piece.first + piece.count - 1
        note = f"  document {piece.number:,}, its tokens {piece.first:,} to {last:,} of {piece.length:,}"
        print_line(console, note, "dim")
        console.print(Padding(mark_end_of_text(piece.text, end_of_text), (0, 0, 0, 4), expand=False))
    if packed.padding:
        print_line(console, f"  {packed.padding} tokens of padding", "dim")


def mark_end_of_text(pieces: DecodedText, end_of_text: str) -> Text:
    """Return decoded text with a mark for each end-of-text token.

    The mark differs from text that spells the token, also without colours.
    """
    return Text.assemble(*((f"▌{end_of_text}▐", "reverse cyan") if piece is None else piece for piece in pieces))


def print_recipe(description: DataDescription, console: Console) -> None:
    """Print the settings that the data was prepared with."""
    print_heading(console, "How it was made", "what differs from the defaults is bold")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for section, entries in description.recipe.items():
        values = [Text(f"{entry.name}: {entry.value}", "bold" if entry.changed else "") for entry in entries]
        table.add_row(section, Text("\n" if section == "sources" else "; ").join(values))
    console.print(table)
