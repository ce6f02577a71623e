"""`pretrain config`: print a config with all its defaults, or the JSON schema for editors."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pretrain.cli.common import CONFIG_HELP, CONFIG_METAVAR
from pretrain.cli.settings_help import SettingsCommand
from pretrain.console import print_line

app = typer.Typer(help="Show a config, or the schema of all configs.", no_args_is_help=True)


@app.command(cls=SettingsCommand)
def show(
    args: Annotated[list[str] | None, typer.Argument(metavar=CONFIG_METAVAR, help=CONFIG_HELP)] = None,
) -> None:
    """Print every setting with its value and where the value comes from."""
    from pretrain.config import flatten
    from pretrain.config.loading import load_args

    loaded = load_args(args or [])
    console = Console(soft_wrap=True)
    for key, value in flatten(loaded.config).items():
        origin = loaded.origin.get(key)
        style = "dim" if origin is None else "bold"
        line = Text.assemble((f"{key}: {json.dumps(value)}", style), (f"  # {origin or 'default'}", "dim"))
        print_line(console, line)


@app.command()
def schema() -> None:
    """Print the JSON schema of a config file: editors complete and check settings with it."""
    from pretrain.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
