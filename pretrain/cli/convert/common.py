"""What the commands of `pretrain convert` share: their arguments, and writing with a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pretrain.console import print_line

if TYPE_CHECKING:
    from pretrain.convert.run import Conversion, Source

SourceRun = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="The checkpoint to convert: a run directory (its newest checkpoint), RUN@STEP, or the folder of a "
        "checkpoint. It is only read.",
        show_default=False,
    ),
]
Target = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Run directory to write. It must not exist.", show_default=False),
]


def write_with_progress(target: Path, source: Source, conversion: Conversion, console: Console) -> None:
    """Write the converted checkpoint, with a progress bar on a terminal, and say what was written and how to go on."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from pretrain.console import format_disk_size
    from pretrain.convert.run import total_bytes, write_run
    from pretrain.estimate.flops import describe_parameters

    size = total_bytes(conversion)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("write", total=size)
        write_run(target, source, conversion, lambda n_bytes: bar.update(task, advance=n_bytes))
    before, after = describe_parameters(source.config.model), describe_parameters(conversion.config.model)
    print_line(
        console,
        f"{target}: {after}, {format_disk_size(size)}; {source.checkpoint.name} has {before}",
    )
    print_line(console, f"train them in a new run: pretrain train ... run.dir=NEW run.init_from={target}", "dim")
