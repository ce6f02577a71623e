"""Arguments of the commands that read a prepared data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataPath = Annotated[Path, typer.Argument(metavar="DATA", help="A prepared data set: the `data.path` of its config.")]
ExternalPaths = Annotated[
    list[Path] | None,
    typer.Option(
        "--external",
        metavar="FOLDER",
        help="A folder or file outside of DATA from which it may read tokens, as in `data.external`.",
    ),
]
