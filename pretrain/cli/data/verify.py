"""`pretrain data verify`: compare a prepared data set with its checksums."""

from __future__ import annotations

import typer
from rich.console import Console

from pretrain.cli.data.paths import DataPath, ExternalPaths
from pretrain.console import print_line
from pretrain.streams import allow_output_loss


def verify(path: DataPath, external: ExternalPaths = None) -> None:
    """Read every byte of a prepared data set and compare it with its checksums."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn, TransferSpeedColumn

    from data_pipeline.storage.verify import verify as verify_data
    from pretrain.errors import UserError

    allow_output_loss()
    console = Console()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("verify", total=None)
        report = verify_data(path, lambda n_bytes: bar.update(task, completed=n_bytes), external or ())
    if report.problems:
        for problem in report.problems[1:]:
            print_line(console, problem)
        more = f" (and {len(report.problems) - 1} more, above)" if len(report.problems) > 1 else ""
        raise UserError(f"{report.problems[0]}{more}; prepare the data again, or restore the files")
    typer.echo(f"{path}: {report.shards} shards, {report.bytes_read / 1e6:.1f} MB, all as their manifests say")
