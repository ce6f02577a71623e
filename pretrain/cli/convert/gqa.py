"""`pretrain convert gqa`: fewer key/value heads."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from pretrain.cli.convert.common import SourceRun, Target, write_with_progress


def gqa(
    run: SourceRun,
    out: Target,
    n_kv_heads: Annotated[
        int,
        typer.Option(min=1, help="Key/value heads of the new model, a divisor of those there are.", show_default=False),
    ],
) -> None:
    """Turn multi-head attention into grouped-query attention.

    The key/value heads of each group become their mean (arXiv:2305.13245).
    The new model computes something else: train it on, about 5% of the
    original steps in that paper.
    """
    from pretrain.convert.gqa import group_queries
    from pretrain.convert.run import check_target, open_source

    check_target(out)
    source = open_source(run)
    write_with_progress(out, source, group_queries(source, n_kv_heads), Console())
