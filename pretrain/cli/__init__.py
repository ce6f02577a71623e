"""`pretrain`: the command line. Imports nothing heavy at the top: `pretrain --help` must answer at once."""

from __future__ import annotations

import sys
import traceback
from typing import cast

import typer
from rich.console import Console
from rich.text import Text

from data_pipeline.errors import DISK_ERRNOS, DataError, StorageError, redact
from parallel.errors import LayoutError
from parallel.failure import fail_together
from parallel.world import World
from pretrain.cli import config, data, layout, train
from pretrain.errors import Diverged, UserError
from pretrain.streams import OutputLost, tolerant_streams

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
WRONG_INPUT = (UserError, DataError, LayoutError)
UsageError = cast(
    type[typer.BadParameter], next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
)
"""What typer raises when it cannot take the command line; it exports no name for it, only for this kind of it."""

app = typer.Typer(
    name="pretrain",
    help="Pretrain large language models from raw text, on anything from a laptop to a GPU cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train.add_to(app)
layout.add_to(app)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")


def main() -> None:
    """Entry point: a wrong input, a diverged run or a failing disk is one line on stderr; anything else keeps its traceback.

    Of several processes that torchrun started, the one that fails first shows its error, and all end with its exit code. A command
    whose reader left (`| head`) ends without a word, unless its result lies on the disk: then it goes on."""
    words, sys.argv[1:] = sys.argv[1:], [redact(word) for word in sys.argv[1:]]  # which wandb writes down
    with tolerant_streams():
        try:
            with fail_together(World.from_environment(), show):
                code = command_line(words)
            sys.stdout.flush()
        except OutputLost as lost:
            code = 0 if lost.reader_left else show(lost)
        except (*WRONG_INPUT, Diverged) as error:
            code = show(error)
        except Exception as error:
            if not isinstance(error, OSError) or error.errno not in DISK_ERRNOS:
                sys.excepthook = lambda _, error, __: show_traceback(error)  # not before: typer sets one of its own
                raise
            code = show(error)
    sys.exit(code)


def command_line(words: list[str]) -> int:
    """Do what the command line says, and return the exit code. UserError where it does not say it right."""
    try:
        code: int | None = app(args=words, standalone_mode=False)  # else it would show its errors itself, on every rank
        return code or 0
    except UsageError as error:
        message = error.format_message().rstrip(".")
        if not message:  # a command without any words has shown its help
            return EXIT_WRONG_INPUT
        raise UserError(f"{message}; see {error.ctx.command_path if error.ctx else 'pretrain'} --help") from None


def show(error: BaseException) -> int:
    """Show an error on stderr, in one line if it is an expected one, and return the exit code."""
    if (
        isinstance(error, OSError) and error.errno in DISK_ERRNOS
    ):  # met where nobody expected it: the place is in the message
        error = StorageError(f"{error}; check the disk, the mount, permissions and limits, and start again")
    if not isinstance(error, (*WRONG_INPUT, Diverged, OutputLost)):
        show_traceback(error)
        return EXIT_FAILED
    where = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    line = " ".join(f"{error}{where}".splitlines())
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error:", "bold red"), " ", line), highlight=False)
    return EXIT_WRONG_INPUT if isinstance(error, WRONG_INPUT) and not isinstance(error, StorageError) else EXIT_FAILED


def show_traceback(error: BaseException) -> None:
    """On stderr, without the secrets of addresses in its messages."""
    print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
