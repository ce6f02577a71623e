"""The progress of a data preparation, and the summary at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_pipeline.held_out import format_held_out_counts, held_out_warnings
from data_pipeline.inspect import bytes_per_token
from data_pipeline.prepare import StageProgress, StageProgressCallback
from data_pipeline.storage.manifest import SplitManifest
from data_pipeline.storage.prepared import PreparedData
from pretrain.console import plain_table, print_line
from pretrain.report.data_tables import unknown_text_notes


@contextmanager
def show_progress(console: Console) -> Iterator[StageProgressCallback]:
    """Show a bar for each stage with MB/s, tokens and time left. Without a terminal each stage is one line."""
    columns = (
        *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn()),
        *(TextColumn("{task.fields[counts]}"), TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def show(progress: StageProgress) -> None:
            counts = f"{progress.documents:,} documents" + (f", {progress.tokens:,} tokens" if progress.tokens else "")
            if progress.stage not in tasks:
                for task in bars.tasks:  # a new stage begins: the earlier ones are complete
                    bars.update(task.id, total=task.completed, completed=task.completed)
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, counts=counts)
                if not console.is_terminal:
                    console.print(progress.stage, highlight=False)
            bars.update(tasks[progress.stage], completed=progress.read, counts=counts)

        yield show


def print_summary(prepared: PreparedData, seq_len: int, console: Console) -> None:
    """Print what was read, dropped and written, and how many sequences of `seq_len` tokens are held out."""
    for note in prepared.notes:
        print_line(console, note)
    for name, manifest in reversed(prepared.splits.items()):
        _print_split(name, manifest, console)
    if counts := format_held_out_counts(prepared.splits, seq_len):
        print_line(console, counts)
    for warning in held_out_warnings(prepared.splits, seq_len):
        print_line(console, f"warning: {warning}", "yellow")


def _print_split(name: str, manifest: SplitManifest, console: Console) -> None:
    """Print a table of the sources, then why documents were dropped, repaired or marked."""
    table = plain_table(name, "documents read", "dropped", "written", "tokens", "bytes/token")
    for source in manifest.sources:
        ratio = bytes_per_token([source])
        counts = (source.read, sum(source.dropped.values()), source.documents, source.tokens)
        table.add_row(source.name, *(f"{count:,}" for count in counts), f"{ratio:.2f}" if ratio else "")
    console.print(table)
    for source in manifest.sources:
        for what, reasons in (("dropped", source.dropped), ("repaired", source.repaired), ("marked", source.marked)):
            for reason, count in reasons.items():
                print_line(console, f"  {source.name}: {count:,} {what} ({reason})")
    for note in unknown_text_notes(manifest.sources):
        print_line(console, f"  {note}")
