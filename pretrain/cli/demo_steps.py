"""The steps of `pretrain demo`: prepare text, train, stop half way, resume, show the result.

Nothing is simulated: the stop is a real SIGINT to this process, and the resume reads the checkpoint that it saved.
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

import torch
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from data_pipeline.prepare import prepare
from pretrain.cli.data.summary import print_summary, show_progress
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.console import format_duration, print_line
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.runs.schema import StepRecord, ValidationRecord
from pretrain.train.loop import Outcome
from pretrain.train.run import train

EXCLUDED_FOLDERS = (
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"),
)
"""Folders of the standard library that are no good examples of Python: installed packages, tables, generated text, odd
encodings."""


class StopAfterStep:
    """A logger that sends this process SIGINT, the signal of Ctrl-C, after one step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.has_stopped = False

    def log(self, record: StepRecord | ValidationRecord) -> None:
        """Send the signal if this is the step."""
        if isinstance(record, StepRecord) and record.step == self.step:
            self.has_stopped = True
            signal.raise_signal(signal.SIGINT)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def run_demo(directory: Path, console: Console, *, moe: bool = False) -> Outcome:
    """Run every step under a heading of its own. STOPPED if the user stopped it.

    Args:
        directory: for the data and the runs.
        console: where it is shown.
        moe: train a mixture of experts, on three kinds of text.
    """
    start = time.monotonic()
    config = moe_demo_config(directory) if moe else demo_config(directory)
    text = config.data.sources[0].paths[0]
    note = f"text: {text}, the sources of Python's standard library"
    more = "; headers of PyTorch in C++; descriptions of the installed packages in English" if moe else ""
    print_chapter(console, "Text -> tokenizer -> shards", note + more)
    with show_progress(console) as progress:
        prepared = prepare(config.data.path, config.data, progress=progress)
    print_summary(prepared, config.data.seq_len, console)

    half = config.train.steps // 2
    is_past_half = any(record.step >= half for record in read_metrics(config.run.dir / "metrics.jsonl").steps)
    note = f"Ctrl-C's signal will stop this run after step {half}, to show how it resumes"
    print_chapter(console, "Train", "" if is_past_half else note)
    stopper = StopAfterStep(half)
    outcome = train(config, console, [stopper])
    if outcome is Outcome.STOPPED and stopper.has_stopped:
        print_chapter(console, "Resume", "the same command again: it finds the checkpoint and continues")
        outcome = train(config, console)
    if outcome is Outcome.STOPPED:  # by the user
        return outcome

    print_chapter(console, "Result", "")
    print_losses(config, console)
    console.print(f"\nThe whole demo took {format_duration(time.monotonic() - start)}. Try:", highlight=False)
    program = "pretrain" if shutil.which("pretrain") else sys.argv[0]
    print_line(console, f"  {program} generate {config.run.dir} 'def main():'")
    print_line(console, f"  {program} data inspect {config.data.path}")
    return outcome


def demo_config(directory: Path) -> RunConfig:
    """Return `configs/demo.yaml` with this machine's standard library as text, and the next run directory."""
    return _load(directory, [standard_library()])


def moe_demo_config(directory: Path) -> RunConfig:
    """Return the same with experts, and three sources of text that every installation of this program has."""
    package = Path(torch.__file__).parent
    headers = [str(package / "include" / folder) for folder in ("c10", "torch")]
    sources: list[dict[str, object]] = [
        {**standard_library(), "name": "python"},
        {"name": "cpp", "kind": "text", "paths": headers, "pattern": "*.h"},
        {"name": "english", "kind": "text", "paths": [f"{package.parent}/*.dist-info/METADATA"]},
    ]
    mixture = {"by": "tokens", "weights": {"python": 0.5, "cpp": 0.3, "english": 0.2}}
    return _load(directory, sources, "model.preset=moe-demo", f"data.mixture={json.dumps(mixture)}")


def standard_library() -> dict[str, object]:
    """Return the source that reads Python's standard library."""
    return {
        "name": "stdlib",
        "kind": "text",
        "paths": [sysconfig.get_paths()["stdlib"]],
        "pattern": "*.py",
        "exclude": EXCLUDED_FOLDERS,
    }


def _load(directory: Path, sources: list[dict[str, object]], *more: str) -> RunConfig:
    data = directory / f"data-python-{platform.python_version()}"  # another Python has another standard library
    settings = [f"data.sources={json.dumps(sources)}", f"data.path={data}", f"run.dir={next_run_dir(directory)}"]
    return load("demo", [*settings, *more]).config


def next_run_dir(directory: Path) -> Path:
    """Return the first of run-1, run-2, ... that is not finished: a finished run is kept, an unfinished one resumes."""
    number = 1
    while any(event.kind == "finish" for event in read_events(directory / f"run-{number}" / "events.jsonl")):
        number += 1
    return directory / f"run-{number}"


def print_losses(config: RunConfig, console: Console) -> None:
    """Print the first and the last validation loss of the run."""
    first, *_, last = read_metrics(config.run.dir / "metrics.jsonl").validations
    console.print(
        f"validation loss [bold]{first.val_loss:.3f} -> {last.val_loss:.3f}[/] "
        f"({last.val_loss / first.val_loss:.0%} of the first), "
        f"perplexity {math.exp(first.val_loss):,.0f} -> [bold]{math.exp(last.val_loss):,.1f}[/]",
        highlight=False,
    )


def print_chapter(console: Console, title: str, note: str) -> None:
    """Print a title with a rule, and a dim note below it."""
    console.print()
    console.print(Rule(f"[bold]{title}[/]", align="left"))
    if note:
        console.print(Text(note, "dim"), soft_wrap=True)
