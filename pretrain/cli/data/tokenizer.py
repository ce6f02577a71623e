"""`pretrain data tokenizer`: train a tokenizer."""

from __future__ import annotations

from rich.console import Console

from pretrain.cli.common import ConfigArgs, load_config, resumable
from pretrain.console import print_line


def tokenizer(args: ConfigArgs) -> None:
    """Train a tokenizer on `data.sources` and write it to `data.path`."""
    from data_pipeline.prepare import build_tokenizer
    from pretrain.cli.data.summary import show_progress

    data, console = load_config(args).data, Console()
    file = data.path / "tokenizer.json"
    with resumable(), show_progress(console) as progress:
        built = build_tokenizer(file, data, progress=progress)
    for note in built.notes:
        print_line(console, note)
    print_line(console, f"{file}: {built.vocab_size:,} tokens, fingerprint {built.fingerprint}")
