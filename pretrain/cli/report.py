"""`pretrain report`: write the HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.streams import allow_output_loss


def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory, of a finished run or one in progress.")
    ],
) -> None:
    """Write report.html, one self-contained page: curves, events, settings, samples."""
    from pretrain.report.run_page import write_report

    allow_output_loss()
    typer.echo(write_report(run_dir))
