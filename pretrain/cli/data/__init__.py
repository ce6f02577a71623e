"""`pretrain data`: train a tokenizer, prepare shards of tokens, inspect them, verify them. Each command is a module."""

from __future__ import annotations

import typer

from pretrain.cli.data import inspect, prepare, tokenizer, verify
from pretrain.cli.settings_help import DataCommand

app = typer.Typer(help="Turn raw text into token shards, and inspect them.", no_args_is_help=True)
app.command(cls=DataCommand, no_args_is_help=True)(tokenizer.tokenizer)
app.command(cls=DataCommand, no_args_is_help=True)(prepare.prepare)
app.command()(inspect.inspect)
app.command()(verify.verify)
