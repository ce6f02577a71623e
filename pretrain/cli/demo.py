"""`pretrain demo`: raw text to trained model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pretrain.cli.common import EXIT_STOPPED, resumable


def demo(
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="Folder for the data and the runs. A second demo reuses the data and trains again.",
            show_default="runs/demo, or runs/demo-moe",
        ),
    ] = None,
    moe: Annotated[
        bool, typer.Option("--moe", help="Train a mixture of 8 experts, on Python, C++ and English text.")
    ] = False,
) -> None:
    """Raw text to trained model in minutes, on any machine. The text is Python's standard library."""
    from pretrain.cli.demo_steps import run_demo
    from pretrain.train.loop import Outcome

    with resumable():
        outcome = run_demo(directory or Path("runs/demo-moe" if moe else "runs/demo"), Console(), moe=moe)
    if outcome is Outcome.STOPPED:
        raise typer.Exit(EXIT_STOPPED)
