"""`pretrain demo`: the whole job on text that every machine has, told as it goes.

Every part is the real one: the stop in the middle is a signal to this process, and what goes on afterwards comes from the checkpoint.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from pretrain.cli.data import prepare_data, tell_prepared
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.console import format_duration
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.runs.schema import StepRecord, ValidationRecord
from pretrain.train.loop import Outcome
from pretrain.train.run import train

NOT_SOURCES = ("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data")
"""Folders of the standard library's directory that teach nothing of Python: installed packages, odd encodings, tables, generated text."""


class StopAt:
    """Hears every step, and sends this process SIGINT (what Ctrl-C sends) after one of them."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.done = False

    def log(self, record: StepRecord | ValidationRecord) -> None:
        """Stop at the step."""
        if isinstance(record, StepRecord) and record.step == self.step:
            self.done = True
            signal.raise_signal(signal.SIGINT)

    def close(self) -> None:
        """Nothing is held."""


def demo(directory: Path, console: Console) -> Outcome:
    """Text, tokenizer, shards, training, a stop, a resumption, validation, generated text, a report; each under its heading."""
    began = time.monotonic()
    config = demo_config(directory)
    _chapter(
        console,
        "Text -> tokenizer -> shards",
        f"the text: {config.data.sources[0].paths[0]}, the sources of Python's standard library",
    )
    tell_prepared(prepare_data(config.data, console), config.data.seq_len, console)

    half = config.train.steps // 2
    done = any(record.step >= half for record in read_metrics(config.run.dir / "metrics.jsonl").steps)
    _chapter(
        console,
        "Train",
        "" if done else f"this run will be stopped by Ctrl-C's signal after step {half}, to show what happens then",
    )
    stop = StopAt(half)
    outcome = train(config, console, [stop])
    if outcome is Outcome.STOPPED and stop.done:
        _chapter(console, "Resume", "the same command again: it finds the checkpoint and goes on")
        outcome = train(config, console)
    if outcome is Outcome.STOPPED:  # by somebody else
        return outcome

    _chapter(console, "Result", "")
    _tell_result(config, console)
    console.print(f"\nThe whole demo took {format_duration(time.monotonic() - began)}. Try:", highlight=False)
    program = "pretrain" if shutil.which("pretrain") else sys.argv[0]
    console.print(Text(f"  {program} generate {config.run.dir} 'def main():'"), soft_wrap=True)
    console.print(Text(f"  {program} data inspect {config.data.path}"), soft_wrap=True)
    return outcome


def demo_config(directory: Path) -> RunConfig:
    """`configs/demo.yaml` on this machine's standard library, in the first run directory below `directory` that is not finished."""
    source = {
        "name": "stdlib",
        "kind": "text",
        "paths": [sysconfig.get_paths()["stdlib"]],
        "pattern": "*.py",
        "exclude": NOT_SOURCES,
    }
    data = f"data-python-{platform.python_version()}"  # another Python is another text
    words = [f"data.sources={json.dumps([source])}", f"data.path={directory / data}", f"run.dir={_next_run(directory)}"]
    return load("demo", words).config


def _next_run(directory: Path) -> Path:
    """run-1, run-2, ...: a finished run is kept, an unfinished one is resumed."""
    number = 1
    while any(event.kind == "finish" for event in read_events(directory / f"run-{number}" / "events.jsonl")):
        number += 1
    return directory / f"run-{number}"


def _tell_result(config: RunConfig, console: Console) -> None:
    """What the run's own records say."""
    first, *_, last = read_metrics(config.run.dir / "metrics.jsonl").validations
    console.print(
        f"validation loss [bold]{first.val_loss:.3f} -> {last.val_loss:.3f}[/] ({last.val_loss / first.val_loss:.0%} of the first), "
        f"perplexity {math.exp(first.val_loss):,.0f} -> [bold]{math.exp(last.val_loss):,.1f}[/]",
        highlight=False,
    )


def _chapter(console: Console, title: str, subtitle: str) -> None:
    console.print()
    console.print(Rule(f"[bold]{title}[/]", align="left"))
    if subtitle:
        console.print(Text(subtitle, "dim"), soft_wrap=True)
