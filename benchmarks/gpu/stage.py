"""What every stage shares: its command line, its device, its rows of results, and the timer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import synchronize, time_calls
from pretrain.model import loss

MEAN_DOCUMENT_TOKENS = 500
"""Mean length of a document in packed rows: the chance that a token begins a new document is one in so many."""


class StageContext:
    """The command line of a stage, its device, and the file of its results."""

    def __init__(
        self, description: str | None, add_options: Callable[[argparse.ArgumentParser], object] = lambda _: None
    ) -> None:
        """Parse the command line. `add_options` adds the stage's own options to the parser."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rows", type=Path, metavar="FILE", help="append each result to this file as a JSON line")
        parser.add_argument("--small", action="store_true", help="use sizes for a CPU, to check that the code runs")
        add_options(parser)
        self.args = parser.parse_args()
        self.small: bool = self.args.small
        self.device = torch.device("cuda" if torch.cuda.is_available() and not self.small else "cpu")

    def add_row(self, **values: object) -> None:
        """Print a result and append it to the file at once, so that a crash later loses nothing."""
        rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}
        print("  ".join(f"{key}={value}" for key, value in rounded.items()), flush=True)
        if self.args.rows is not None:
            with self.args.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")


def median_seconds(
    function: Callable[[], object], device: torch.device, *, repeats: int = 10, warm_up: int = 3
) -> float:
    """Return the median seconds of a call: by CUDA events on a GPU, by the clock on a CPU.

    `warm_up` calls come first, which compile and fill caches.
    """
    for _ in range(warm_up):
        function()
    synchronize(device)
    if device.type == "cpu":
        return median(time_calls(function, device, repeats))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    synchronize(device)
    return median(start.elapsed_time(end) for start, end in events) / 1e3


@contextmanager
def override_loss_chunks(n_chunks: int | None) -> Iterator[None]:
    """Make the loss split its tokens into `n_chunks` chunks inside the block. None keeps the loss's own choice."""
    original = loss._chunks
    if n_chunks is not None:
        loss._chunks = lambda logits, device: n_chunks
    try:
        yield
    finally:
        loss._chunks = original
