"""`pretrain convert upcycle`: a dense model becomes a mixture of experts."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from pretrain.cli.convert.common import SourceRun, Target, write_with_progress
from pretrain.cli.settings_help import SettingsCommand
from pretrain.console import print_line


class UpcycleCommand(SettingsCommand):
    """Takes the settings of experts."""

    sections = ("model.moe",)


def upcycle(
    run: SourceRun,
    out: Target,
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="model.moe.KEY=VALUE...",
            help="Settings of the experts, such as `model.moe.n_experts=8`; all are listed below.",
            show_default=False,
        ),
    ],
    noise_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Fraction of the hidden features of each routed expert that begin as noise instead of a copy, with "
            "the mean and deviation of the dense weights (arXiv:2502.19261 recommends 0.5 for long training).",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="Seed of the routers and of the noise.")] = 0,
) -> None:
    """Turn a dense model into a mixture of experts (arXiv:2212.05055).

    Every expert is a copy of the dense MLP, or of a slice of it: with
    model.moe.d_ff = model.d_ff / 8, of an eighth. Slices of n_shared_experts
    become the shared experts. The routers are new, and the optimizer starts
    afresh. At first the new model computes what the dense one does, if the
    weights of a token's experts are normalised and model.moe.top_k is a
    multiple of the number of routed slices. The command says so if not.
    """
    from pretrain.convert import upcycle as conversion
    from pretrain.convert.run import check_target, open_source

    console = Console(soft_wrap=True, highlight=False)
    check_target(out)
    source = open_source(run)
    converted, plan = conversion.upcycle(source, settings, noise_fraction, seed)
    write_with_progress(out, source, converted, console)
    same = "it computes what the dense model computes"
    if plan.inexact_because:
        same = f"it does not compute exactly what the dense model computes: {plan.inexact_because}"
    print_line(console, same)
