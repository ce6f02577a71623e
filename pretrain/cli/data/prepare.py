"""`pretrain data prepare`: raw text to shards of tokens."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from pretrain.cli.common import ConfigArgs, load_config, resumable


def prepare(
    args: ConfigArgs,
    keep_rejects: Annotated[
        bool, typer.Option(help="Write dropped documents with the reasons to `rejects/` in `data.path`.")
    ] = False,
) -> None:
    """Turn `data.sources` into shards of tokens in `data.path`: filter, deduplicate, tokenize.

    Trains a tokenizer on the sources if there is none. The same command
    again does nothing. After a stop or a crash it resumes from the
    finished chunks. `data.path` only looks like prepared data once
    everything is written.
    """
    from data_pipeline.prepare import prepare as prepare_data
    from pretrain.cli.data.summary import print_summary, show_progress

    data, console = load_config(args).data, Console()
    with resumable():
        with show_progress(console) as progress:
            prepared = prepare_data(data.path, data, keep_rejects=keep_rejects, progress=progress)
        print_summary(prepared, data.seq_len, console)
