"""`pretrain data`: raw text -> tokenizer -> shards, and a look at what came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pretrain.cli.settings_help import CONFIG_HELP, DataCommand
from pretrain.cli.train import resumable
from pretrain.streams import allow_output_loss

if TYPE_CHECKING:
    from data_pipeline.prepare import StageProgressCallback
    from data_pipeline.reading.forecast import Forecast
    from data_pipeline.storage.prepared import PreparedData
    from pretrain.config import DataConfig

app = typer.Typer(help="Turn raw text into token shards, and look at them.", no_args_is_help=True)
Words = Annotated[list[str], typer.Argument(metavar="[CONFIG] [key=value]...", help=CONFIG_HELP)]
RUN_HELP = "A run's config and settings, as for `pretrain train`: shows what that run would read of DATA, whatever its data.path says."
External = Annotated[
    list[Path] | None,
    typer.Option(
        "--external",
        metavar="FOLDER",
        help="A folder or file outside of DATA whose tokens it may name; as data.external.",
    ),
]
DataPath = Annotated[Path, typer.Argument(metavar="DATA", help="A prepared data set: the `data.path` of its config.")]

BAR_WIDTH = 40


@app.command(cls=DataCommand, no_args_is_help=True)
def tokenizer(words: Words) -> None:
    """Train a tokenizer on `data.sources` and write it to `data.path`."""
    from data_pipeline.prepare import build_tokenizer

    data, console = _data_config(words), Console()
    file = data.path / "tokenizer.json"
    with resumable(), show_progress(console) as progress:
        made = build_tokenizer(file, data, progress=progress)
    for note in made.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{file}: {made.vocab_size:,} tokens, fingerprint {made.fingerprint}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command(cls=DataCommand, no_args_is_help=True)
def prepare(
    words: Words,
    keep_rejects: Annotated[
        bool, typer.Option(help="Write dropped documents with their reasons to `rejects/` in `data.path`.")
    ] = False,
) -> None:
    """Turn `data.sources` into shards of tokens in `data.path`: filtered, deduplicated, with a tokenizer trained on them if there is none.

    The same command again does nothing. One that was stopped or killed goes on from the chunks that were finished; until the end
    there is nothing that looks like prepared data.
    """
    data, console = _data_config(words), Console()
    with resumable():
        tell_prepared(prepare_data(data, console, keep_rejects), data.seq_len, console)


@app.command()
def inspect(
    path: DataPath,
    words: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [key=value]...", help=RUN_HELP)] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents of each source to show.")] = 3,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it to a page instead, which needs no network.")
    ] = None,
    external: External = None,
) -> None:
    """Show what a prepared data set holds: documents, tokens, drops, lengths, samples; and what a run would read of it.

    `pretrain data inspect data/my my.yaml train.steps=5000` adds what that run reads: tokens, epochs and repeats by source.
    """
    from data_pipeline.inspect import describe_data
    from data_pipeline.storage.tokenized import collect_trusted_paths

    trusted = [*(external or ()), *(collect_trusted_paths(_data_config(words)) if words else ())]
    description = describe_data(path, samples, trusted)
    forecast = _forecast(path, words) if words else None
    if html is None:
        from pretrain.cli.data.description import draw

        draw(description, forecast, Console())
    else:
        from pretrain.report.data_page import write_data_page

        write_data_page(html, description, forecast)
        typer.echo(html)


def _forecast(path: Path, words: list[str]) -> Forecast:
    """What a run with these settings reads of the data in `path`."""
    from data_pipeline.reading.forecast import forecast_reading
    from pretrain.config.loading import load_words
    from pretrain.setup.batch_schedule import BatchSchedule, check_seq_lens
    from pretrain.train.run import open_data

    config = load_words(words).config
    batches = BatchSchedule.from_config(config.data, config.train)
    check_seq_lens(batches)
    train, _ = open_data(config.data.model_copy(update={"path": path}), config.run.seed, batches)
    return forecast_reading(train, batches.total_samples)


@app.command()
def verify(path: DataPath, external: External = None) -> None:
    """Read every byte of a prepared data set and hold it against its checksums."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn, TransferSpeedColumn

    from data_pipeline.storage.verify import verify as check
    from pretrain.errors import UserError

    allow_output_loss()
    console = Console()
    columns = (BarColumn(BAR_WIDTH), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("verify", total=None)
        report = check(path, lambda n_bytes: bar.update(task, completed=n_bytes), external or ())
    if report.problems:
        for problem in report.problems[1:]:
            console.print(problem, highlight=False, markup=False, soft_wrap=True)
        more = f" (and {len(report.problems) - 1} more, above)" if len(report.problems) > 1 else ""
        raise UserError(f"{report.problems[0]}{more}; prepare the data again, or restore the files")
    typer.echo(f"{path}: {report.shards} shards, {report.bytes_read / 1e6:.1f} MB, all as their manifests say")


def prepare_data(data: DataConfig, console: Console, keep_rejects: bool = False) -> PreparedData:
    """`data_pipeline.prepare` with a progress bar."""
    from data_pipeline.prepare import prepare as run

    with show_progress(console) as progress:
        return run(data.path, data, keep_rejects=keep_rejects, progress=progress)


def tell_prepared(prepared: PreparedData, seq_len: int, console: Console) -> None:
    """What was read, dropped and written: one table a split, a line a source; and what is held out, in sequences of `seq_len` tokens."""
    from rich.table import Table

    from data_pipeline.held_out import format_held_out_counts, held_out_warnings
    from pretrain.report.data_tables import losses

    for note in prepared.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    for name, manifest in reversed(prepared.splits.items()):
        table = Table(
            name,
            "documents read",
            "dropped",
            "written",
            "tokens",
            "bytes/token",
            box=None,
            padding=(0, 2, 0, 0),
            header_style="dim",
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for source in manifest.sources:
            fertility = f"{source.text_bytes / source.tokens:.2f}" if source.text_bytes and source.tokens else ""
            dropped = sum(source.dropped.values())
            table.add_row(
                source.name,
                f"{source.read:,}",
                f"{dropped:,}",
                f"{source.documents:,}",
                f"{source.tokens:,}",
                fertility,
            )
        console.print(table)
        for source in manifest.sources:
            for what, counts in (("dropped", source.dropped), ("repaired", source.repaired), ("marked", source.marked)):
                for reason, count in counts.items():
                    console.print(f"  {source.name}: {count:,} {what} ({reason})", highlight=False, markup=False)
        for sentence in losses(manifest.sources):
            console.print(f"  {sentence}", highlight=False, markup=False, soft_wrap=True)
    if line := format_held_out_counts(prepared.splits, seq_len):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for warning in held_out_warnings(prepared.splits, seq_len):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def show_progress(console: Console) -> Iterator[StageProgressCallback]:
    """A bar for each stage, with MB/s, tokens and time left. Without a terminal each stage is one line."""
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from data_pipeline.prepare import StageProgress

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(BAR_WIDTH),
        TransferSpeedColumn(),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, object] = {}

        def show(report: StageProgress) -> None:
            done = f"{report.documents:,} documents" + (f", {report.tokens:,} tokens" if report.tokens else "")
            if report.stage not in tasks:
                for task in bars.tasks:  # a new stage: the one before is complete
                    bars.update(task.id, total=task.completed, completed=task.completed)
                tasks[report.stage] = bars.add_task(report.stage, total=report.total, done=done)
                if not console.is_terminal:
                    console.print(report.stage, highlight=False)
            bars.update(tasks[report.stage], completed=report.read, done=done)  # type: ignore[arg-type]  # rich's TaskID

        yield show


def _data_config(words: list[str]) -> DataConfig:
    from pretrain.config.loading import load_words

    return load_words(words).config.data
