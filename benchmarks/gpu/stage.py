"""What every stage shares: its command line, its device, its rows, and how it times things."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from benchmarks.common import synchronize
from pretrain.model import loss

MEAN_DOCUMENT = 500
"""Tokens of a document in packed rows; a place between tokens begins another one with probability 1 / MEAN_DOCUMENT."""


class StageContext:
    """The options of a stage's command line, and where its results go."""

    def __init__(
        self, description: str | None, add: Callable[[argparse.ArgumentParser], object] = lambda _: None
    ) -> None:
        """Parse the command line. `add`: adds the stage's own options."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument(
            "--rows", type=Path, metavar="FILE", help="append each result to this file, as a line of JSON"
        )
        parser.add_argument("--small", action="store_true", help="sizes for a CPU, to see that the code runs")
        add(parser)
        self.options = parser.parse_args()
        self.small: bool = self.options.small
        self.device = torch.device("cuda" if torch.cuda.is_available() and not self.small else "cpu")

    def row(self, **values: object) -> None:
        """Print a result and append it to the file at once: the next one may never come."""
        rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}
        print("  ".join(f"{key}={value}" for key, value in rounded.items()), flush=True)
        if self.options.rows is not None:
            with self.options.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")


def seconds_of(function: Callable[[], object], device: torch.device, *, repeats: int = 10, warm_up: int = 3) -> float:
    """Median seconds of one call, by events on a GPU and by the clock on a CPU.

    Every call is timed by itself, after `warm_up` calls that compile and fill caches.
    """
    for _ in range(warm_up):
        function()
    synchronize(device)
    if device.type == "cpu":
        times = []
        for _ in range(repeats):
            began = perf_counter()
            function()
            times.append(perf_counter() - began)
        return median(times)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()  # type: ignore[no-untyped-call]  # untyped in torch
        function()
        end.record()  # type: ignore[no-untyped-call]
    synchronize(device)
    return median(start.elapsed_time(end) for start, end in events) / 1e3  # type: ignore[no-untyped-call]


@contextmanager
def loss_in_chunks(n_chunks: int | None) -> Iterator[None]:
    """In here the loss cuts its tokens into so many chunks; None leaves the choice to it."""
    chosen = loss._chunks
    if n_chunks is not None:
        loss._chunks = lambda logits, device: n_chunks
    try:
        yield
    finally:
        loss._chunks = chosen
