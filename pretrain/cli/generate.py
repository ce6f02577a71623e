"""`pretrain generate`: continue a text with the newest checkpoint of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text


def check_finite(value: float | None) -> float | None:
    """Refuse `nan` and `inf`, which the bounds of an option let pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def generate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory. Its newest checkpoint is used.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue. An empty one starts a new document.")] = "",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of tokens to generate. The context length of the model is a limit as well."
        ),
    ] = 200,
    temperature: Annotated[
        float,
        typer.Option(
            min=0,
            callback=check_finite,
            help="0 always picks the most likely token; 1 samples from the model's own probabilities.",
        ),
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample only from this many most likely tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=check_finite,
            help="Sample only from the most likely tokens whose probabilities add up to this.",
        ),
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text with a trained model."""
    import torch

    from pretrain.inference.sample import SamplingOptions, continue_text, load_trained_run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console, skipped = Console(soft_wrap=True, highlight=False), list[str]()
    model, tokenizer, _, path = load_trained_run(run_dir, device, lambda _, problems: skipped.append(problems[0]))
    pieces = continue_text(model, tokenizer, prompt, SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed))
    for problem in skipped:
        console.print(Text.assemble(("skipped: ", "yellow"), problem))
    console.print(Text(str(path), "dim"))
    typer.secho(prompt, nl=False, bold=True)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
