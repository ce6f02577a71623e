"""`--help` that ends with a table of the settings: key, default, description."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from parallel.world import World

DEFAULT_WIDTH = 34
"""Width of the column of defaults. A longer default goes behind the description."""


class SettingsCommand(TyperCommand):
    """A command that takes a config: its help lists the settings."""

    sections: tuple[str, ...] | None = None
    """Sections of the config to list, such as `model.moe`; None lists all."""

    with_prepare_keys: bool = True
    """Whether to list settings that only `pretrain data prepare` reads."""

    # `Any`: typer bundles its own click, whose types have no public name.
    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print typer's help, then the settings. Under torchrun only the main process prints."""
        if World.from_environment().is_main:
            super().format_help(ctx, formatter)
            Console().print(settings_table(self.sections, with_prepare_keys=self.with_prepare_keys))


class DataCommand(SettingsCommand):
    """A command of `pretrain data`: it reads only the section `data`."""

    sections = ("data",)


class TrainCommand(SettingsCommand):
    """A command that reads prepared data."""

    with_prepare_keys = False


def settings_table(sections: tuple[str, ...] | None, *, with_prepare_keys: bool = True) -> Table:
    """Return the key, default and description of every setting in these sections."""
    from pretrain.config import AUTO, RunConfig, flatten, is_prepare_key, walk

    defaults = flatten(RunConfig())
    table = Table(title="Settings, given as key=value", title_justify="left", title_style="bold")
    table.box, table.pad_edge, table.padding = None, False, (0, 2, 0, 0)
    for heading, width in (("key", None), ("default", DEFAULT_WIDTH), ("", None)):
        table.add_column(heading, header_style="dim", overflow="fold", max_width=width)
    for key, field in walk():
        listed = sections is None or any(key.startswith(f"{section}.") for section in sections)
        if listed and (with_prepare_keys or not is_prepare_key(key)):
            # RunConfig() has resolved some `auto`s already.
            default = AUTO if field.default == AUTO else str(defaults[key])
            description = " ".join((field.description or "").split())
            if len(default) > DEFAULT_WIDTH:
                description, default = f"{description} Default: {default}", ""
            table.add_row(f"[cyan]{key}[/]", escape(default), Text(description))
    if not with_prepare_keys:
        table.caption = "Settings of data preparation: `pretrain data prepare --help`"
        table.caption_justify = "left"
    return table
