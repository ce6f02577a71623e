"""What several commands share: exit codes, the argument that holds a config, and what Ctrl-C does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.streams import allow_output_loss

if TYPE_CHECKING:
    from pretrain.config import RunConfig

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL: the command stopped early. The same command resumes."""

CONFIG_METAVAR = "[CONFIG] [key=value]..."
CONFIG_HELP = (
    "A YAML file or the name of a preset, then settings that override it, such as `train.steps=5000 model.preset=125m`."
)
ConfigArgs = Annotated[list[str], typer.Argument(metavar=CONFIG_METAVAR, help=CONFIG_HELP)]

STOPPED_MESSAGE = "stopped; finished work is kept, and the same command resumes from there"


def load_config(args: list[str]) -> RunConfig:
    """Return the settings of a command line, `auto` not resolved yet."""
    from pretrain.config.loading import load_args

    return load_args(args).config


@contextmanager
def resumable(message: str = STOPPED_MESSAGE) -> Iterator[None]:
    """Exit with code 75 on Ctrl-C, and print `message` to standard error.

    The command also continues when nobody reads its output, because its result is on disk.
    """
    allow_output_loss()
    try:
        yield
    except KeyboardInterrupt:
        if message:
            typer.echo(message, err=True)
        raise typer.Exit(EXIT_STOPPED) from None
