"""`pretrain config`: what a config says once everything is put together, and its schema for editors."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pretrain.cli.settings_help import CONFIG_HELP, SettingsCommand

app = typer.Typer(help="Show a config, or the schema of all configs.", no_args_is_help=True)


@app.command(cls=SettingsCommand)
def show(
    words: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [key=value]...", help=CONFIG_HELP)] = None,
) -> None:
    """Print every setting with its value and where the value comes from."""
    from pretrain.config import flatten
    from pretrain.config.loading import load_words

    loaded = load_words(words or [])
    console = Console(soft_wrap=True)
    for key, value in flatten(loaded.config).items():
        origin = loaded.origin.get(key)
        style = "dim" if origin is None else "bold"
        console.print(Text.assemble((f"{key}: {json.dumps(value)}", style), (f"  # {origin or 'default'}", "dim")))


@app.command()
def schema() -> None:
    """Print the JSON schema of a config file, for completion and checks in editors."""
    from pretrain.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
