"""`pretrain`: the command line. Imports nothing heavy at the top: `pretrain --help` must answer at once."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.text import Text

from data_pipeline.errors import DataError
from pretrain.cli import config, data, run
from pretrain.errors import Diverged, UserError

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2

app = typer.Typer(
    name="pretrain",
    help="Pretrain large language models from raw text, on anything from a laptop to a GPU cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run.add_to(app)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")


def main() -> None:
    """Entry point: a wrong input or a diverged run is one line on stderr; anything else that fails keeps its traceback."""
    try:
        app()
    except (UserError, DataError, Diverged) as error:
        line = " ".join(str(error).splitlines())
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error:", "bold red"), " ", line), highlight=False)
        sys.exit(EXIT_FAILED if isinstance(error, Diverged) else EXIT_WRONG_INPUT)
