"""`--help` that lists the settings: each with its default and the sentence under its field."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from parallel.world import World

DEFAULT_WIDTH = 34
"""Characters of a default in the column for it; longer ones follow the sentence."""

CONFIG_HELP = (
    "A YAML file or the name of a preset, then settings that win over it, such as `train.steps=5000 model.preset=125m`."
)


class SettingsCommand(TyperCommand):
    """A command that takes a config: its help ends with every setting it may be given."""

    sections: tuple[str, ...] | None = None
    """Sections to list; None lists all."""

    preparing: bool = True
    """Whether to list what only `pretrain data prepare` reads."""

    def format_help(
        self, ctx: Any, formatter: Any
    ) -> None:  # typer carries a private click: its types have no public name
        """Typer's help, then the settings; of several processes that torchrun started, one shows it."""
        if World.from_environment().is_main:
            super().format_help(ctx, formatter)
            Console().print(settings_table(self.sections, preparing=self.preparing))


class DataCommand(SettingsCommand):
    """A command of `pretrain data`: it reads that section alone."""

    sections = ("data",)


class TrainCommand(SettingsCommand):
    """A command that trains: it reads prepared data."""

    preparing = False


def settings_table(sections: tuple[str, ...] | None, *, preparing: bool = True) -> Table:
    """Key, default and sentence of every setting of those sections."""
    from pretrain.config import RunConfig, flatten, prepares, walk

    defaults = flatten(RunConfig())
    table = Table(
        title="Settings, given as key=value",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for heading, width in (("key", None), ("default", DEFAULT_WIDTH), ("", None)):
        table.add_column(heading, header_style="dim", overflow="fold", max_width=width)
    for key, field in walk():
        if (sections is None or key.split(".")[0] in sections) and (preparing or not prepares(key)):
            sentence, default = " ".join((field.description or "").split()), str(defaults[key])
            if len(default) > DEFAULT_WIDTH:
                sentence, default = f"{sentence} Default: {default}", ""
            table.add_row(f"[cyan]{key}[/]", escape(default), Text(sentence))
    if not preparing:
        table.caption = "What prepares data: `pretrain data prepare --help`"
        table.caption_justify = "left"
    return table
