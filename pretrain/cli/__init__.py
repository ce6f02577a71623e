"""`pretrain`: the command line. Nothing heavy is imported at the top, so that `pretrain --help` answers at once."""

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
from pretrain.cli import config, convert, data, demo, generate, layout, report, train
from pretrain.cli.common import EXIT_FAILED, EXIT_WRONG_INPUT
from pretrain.cli.settings_help import TrainCommand
from pretrain.errors import Diverged, UserError
from pretrain.streams import OutputLost, tolerant_streams

WRONG_INPUT = (UserError, DataError, LayoutError)
UsageError = cast(
    type[typer.BadParameter], next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
)
"""What typer raises for a wrong command line. Typer exports only its subclass BadParameter, so it is found among the
bases."""

app = typer.Typer(
    name="pretrain",
    help="Pretrain large language models from raw text, on anything from a laptop to a GPU cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command(cls=TrainCommand, no_args_is_help=True)(train.train)
app.command()(generate.generate)
app.command()(report.report)
app.command(cls=TrainCommand, no_args_is_help=True)(layout.layout)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.add_typer(convert.app, name="convert")


def main() -> None:
    """Run the command line and exit.

    Wrong input, a diverged run and a failing disk are one line on stderr. Any other error keeps its traceback. Of
    several processes that torchrun started, the one that fails first prints its error, and all exit with its code. When
    the reader of the output has gone (`| head`), a command ends silently; a command whose result is on disk goes on.
    """
    # wandb records sys.argv, which must not hold the secrets of addresses.
    args, sys.argv[1:] = sys.argv[1:], [redact(arg) for arg in sys.argv[1:]]
    with tolerant_streams():
        try:
            with fail_together(World.from_environment(), print_error):
                code = run_command(args)
            sys.stdout.flush()
        except OutputLost as lost:
            code = 0 if lost.reader_left else print_error(lost)
        except (*WRONG_INPUT, Diverged) as error:
            code = print_error(error)
        except Exception as error:
            if not isinstance(error, OSError) or error.errno not in DISK_ERRNOS:
                # Set here and not earlier: typer sets a hook of its own.
                sys.excepthook = lambda _, error, __: print_traceback(error)
                raise
            code = print_error(error)
    sys.exit(code)


def run_command(args: list[str]) -> int:
    """Run a command line and return its exit code. Raise UserError where it is not a valid one."""
    try:
        # In standalone mode typer would print errors itself, on every rank.
        code: int | None = app(args=args, standalone_mode=False)
        return code or 0
    except UsageError as error:
        message = error.format_message().rstrip(".")
        if not message:  # a command group without arguments has printed its help
            return EXIT_WRONG_INPUT
        raise UserError(f"{message}; see {error.ctx.command_path if error.ctx else 'pretrain'} --help") from None


def print_error(error: BaseException) -> int:
    """Print an error on stderr, in one line if it is an expected one, and return the exit code."""
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:  # raised where no code expected it
        error = StorageError(f"{error}; check the disk, the mount, permissions and limits, and start again")
    if not isinstance(error, (*WRONG_INPUT, Diverged, OutputLost)):
        print_traceback(error)
        return EXIT_FAILED
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    line = " ".join(f"{error}{notes}".splitlines())
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error:", "bold red"), " ", line), highlight=False)
    return EXIT_WRONG_INPUT if isinstance(error, WRONG_INPUT) and not isinstance(error, StorageError) else EXIT_FAILED


def print_traceback(error: BaseException) -> None:
    """Print a traceback on stderr, without the secrets of addresses in its messages."""
    print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
