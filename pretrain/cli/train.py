"""`pretrain train | generate | report | demo`: the main job."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pretrain.cli.settings_help import CONFIG_HELP, TrainCommand
from pretrain.streams import allow_output_loss

EXIT_STOPPED = 75
"""EX_TEMPFAIL: stopped early, and the same command goes on."""


@contextmanager
def resumable(
    said: str = "stopped; what is finished is kept, and the same command goes on from there",
) -> Iterator[None]:
    """Ctrl-C is no failure: it is `said` and the exit code is 75. The command's result lies on the disk, so that it outlives its output."""
    allow_output_loss()
    try:
        yield
    except KeyboardInterrupt:
        if said:
            typer.echo(said, err=True)
        raise typer.Exit(EXIT_STOPPED) from None


def train(
    words: Annotated[list[str], typer.Argument(metavar="[CONFIG] [key=value]...", help=CONFIG_HELP)],
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing: print what a rank of --world-size would hold and send. Needs no GPU, no data.",
        ),
    ] = False,
    world_size: Annotated[int, typer.Option(min=1, help="With --dry-run: processes, one a GPU.")] = 1,
    rank: Annotated[
        int | None, typer.Option(min=0, help="With --dry-run: the rank to tell of; without it, the fullest.")
    ] = None,
) -> None:
    """Train a model. The same command with the same run directory goes on from its newest checkpoint.

    Ctrl-C, SIGTERM or a terminal that closes: finishes the step, saves, and exits with 75. A second Ctrl-C leaves at once, without saving.
    """
    from parallel.world import World
    from pretrain.config.loading import load_words
    from pretrain.errors import UserError
    from pretrain.train.loop import Outcome
    from pretrain.train.run import train as run

    config = load_words(words).config
    console = Console()
    world = World.from_environment()
    if dry_run and world.size > 1:
        raise UserError("--dry-run pretends the other processes by itself: start it without torchrun")
    if dry_run:
        from pretrain.setup.dry_run import dry_run as tell

        tell(config, world_size, rank, console)
        return
    if world_size != 1 or rank is not None:
        raise UserError("--world-size and --rank tell of a --dry-run; a run takes its processes from torchrun")
    with resumable(
        "left without saving; the same command goes on from the last save, or starts over if there was none"
        if world.is_main
        else ""
    ):
        outcome = run(config, console)
    if outcome is Outcome.STOPPED:
        raise typer.Exit(EXIT_STOPPED)


def _finite(value: float | None) -> float | None:
    """The bounds of an option let `nan` pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def generate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory; its newest checkpoint is taken.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; empty starts a new document.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to write at most; the model's context ends the text too.")
    ] = 200,
    temperature: Annotated[
        float,
        typer.Option(min=0, callback=_finite, help="0 always takes the likeliest token; 1 samples as the model says."),
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among this many likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, callback=_finite, help="Sample among the likeliest tokens that hold this much probability."
        ),
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text with a trained model."""
    import torch

    from pretrain.inference.sample import SamplingOptions, continue_text, load_trained_run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console, skipped = Console(soft_wrap=True, highlight=False), list[str]()
    model, tokenizer, _, path = load_trained_run(run_dir, device, lambda _, problems: skipped.append(problems[0]))
    pieces = continue_text(model, tokenizer, prompt, SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed))
    for problem in skipped:
        console.print(Text.assemble(("passed over: ", "yellow"), problem))
    console.print(Text(str(path), "dim"))
    typer.secho(prompt, nl=False, bold=True)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory, of a finished run or one in progress.")
    ],
) -> None:
    """Write report.html, one self-contained page: curves, events, config, samples."""
    from pretrain.report.run_page import write_report

    allow_output_loss()
    typer.echo(write_report(run_dir))


def demo(
    directory: Annotated[
        Path,
        typer.Option(
            "--dir", help="Where the data and the runs go. A second demo finds the data there and trains anew."
        ),
    ] = Path("runs/demo"),
) -> None:
    """Raw text to trained model in minutes, on any machine: Python's own standard library is the text."""
    from pretrain.cli.demo import demo as tell
    from pretrain.train.loop import Outcome

    with resumable():
        outcome = tell(directory, Console())
    if outcome is Outcome.STOPPED:
        raise typer.Exit(EXIT_STOPPED)


def add_to(app: typer.Typer) -> None:
    """Hang the four commands into `pretrain`."""
    app.command()(demo)
    app.command(cls=TrainCommand, no_args_is_help=True)(train)
    app.command()(generate)
    app.command()(report)
