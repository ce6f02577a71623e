"""`pretrain train`: train a model or resume a run; with `--dry-run`, measure one rank of any layout."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from pretrain.cli.common import EXIT_STOPPED, ConfigArgs, load_config, resumable

LEFT_MESSAGE = (
    "stopped without saving; the same command resumes from the last checkpoint, or starts over if there is none"
)


def train(
    args: ConfigArgs,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Do not train. Print the memory that one rank of --world-size would use and the bytes it would send. "
            "Needs no GPU and no data.",
        ),
    ] = False,
    world_size: Annotated[int, typer.Option(min=1, help="With --dry-run: number of processes, one per GPU.")] = 1,
    rank: Annotated[
        int | None, typer.Option(min=0, help="With --dry-run: the rank to measure. Default: the one with most memory.")
    ] = None,
) -> None:
    """Train a model. The same command with the same run directory resumes from its newest checkpoint.

    Ctrl-C, SIGTERM or a closed terminal finishes the current step, saves
    a checkpoint and exits with code 75. A second Ctrl-C exits at once,
    without saving.
    """
    from parallel.world import World
    from pretrain.errors import UserError
    from pretrain.train.loop import Outcome
    from pretrain.train.run import train as train_run

    config = load_config(args)
    console = Console()
    world = World.from_environment()
    if dry_run:
        if world.size > 1:
            raise UserError("--dry-run simulates the other processes by itself: start it without torchrun")
        from pretrain.setup.dry_run import dry_run as run_dry

        run_dry(config, world_size, rank, console)
        return
    if world_size != 1 or rank is not None:
        raise UserError("--world-size and --rank only go with --dry-run; a run takes its processes from torchrun")
    with resumable(LEFT_MESSAGE if world.is_main else ""):
        outcome = train_run(config, console)
    if outcome is Outcome.STOPPED:
        raise typer.Exit(EXIT_STOPPED)
