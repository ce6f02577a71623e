"""`pretrain data inspect`: what a prepared data set holds, and what a run would read of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pretrain.cli.common import CONFIG_METAVAR, load_config
from pretrain.cli.data.paths import DataPath, ExternalPaths

if TYPE_CHECKING:
    from data_pipeline.reading.forecast import Forecast
    from pretrain.config import RunConfig

RUN_HELP = (
    "Config and settings of a run, as for `pretrain train`: adds what that run would read of DATA. "
    "The run's own data.path is ignored."
)


def inspect(
    path: DataPath,
    args: Annotated[list[str] | None, typer.Argument(metavar=CONFIG_METAVAR, help=RUN_HELP)] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show of each source.")] = 3,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write an HTML page instead. It is one file and needs no network."),
    ] = None,
    external: ExternalPaths = None,
) -> None:
    """Show what a prepared data set holds: documents, tokens, drops, lengths, samples; and what a run would read of it.

    `pretrain data inspect data/my my.yaml train.steps=5000` adds what that
    run reads: tokens, epochs and repeats of each source.
    """
    from data_pipeline.inspect import describe_data
    from data_pipeline.storage.tokenized import collect_trusted_paths

    config = load_config(args) if args else None
    trusted = [*(external or ()), *(collect_trusted_paths(config.data) if config else ())]
    description = describe_data(path, samples, trusted)
    forecast = forecast_run(path, config) if config else None
    if html is None:
        from pretrain.cli.data.description import print_description

        print_description(description, forecast, Console())
    else:
        from pretrain.report.data_page import write_data_page

        write_data_page(html, description, forecast)
        typer.echo(html)


def forecast_run(path: Path, config: RunConfig) -> Forecast:
    """Return what a run of this config reads of the data in `path`."""
    from data_pipeline.reading.forecast import forecast_reading
    from pretrain.setup.batch_schedule import BatchSchedule, check_seq_lens
    from pretrain.train.inputs import open_data

    batches = BatchSchedule.from_config(config.data, config.train)
    check_seq_lens(batches)
    train, _ = open_data(config.data.model_copy(update={"path": path}), config.run.seed, batches)
    return forecast_reading(train, batches.total_samples)
