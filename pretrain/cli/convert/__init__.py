"""`pretrain convert`: make a checkpoint of one model into one of another. Each command is a module."""

from __future__ import annotations

import typer

from pretrain.cli.convert import gqa, upcycle

app = typer.Typer(help="Turn a checkpoint of one model into a checkpoint of another.", no_args_is_help=True)
app.command(cls=upcycle.UpcycleCommand, no_args_is_help=True)(upcycle.upcycle)
app.command(no_args_is_help=True)(gqa.gqa)
