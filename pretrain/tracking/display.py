"""What a person sees while a run trains: a live panel on a terminal, plain lines everywhere else (CI, Slurm logs,
files)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain.console import format_decimal, format_duration
from pretrain.runs.schema import Event, RoutingStatistics, StepRecord, ValidationRecord
from pretrain.runs.throughput import AverageThroughput
from pretrain.signals import Activity, StopRequest

BLOCKS = "▁▂▃▄▅▆▇█"
MAX_SOURCES = 8
"""Sources whose validation loss one line shows."""
BAR_WIDTH = 80
"""Maximum. When a terminal gets narrower, rich leaves parts of longer lines behind."""
DIM_EVENTS = {"save", "settings"}
HIGHLIGHTED_EVENTS = {"stop", "skip_checkpoint", "notice", "output_lost", "logger_failed", "profile_failed"}


class Display:
    """Progress of one attempt.

    Use it as a context: `with Display(1000) as display: display.step(record, meter.average())`.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        console: Console | None = None,
        mfu_statement: str | None = None,
        every_s: float = 10.0,
        stop: StopRequest | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is shown yet.

        Args:
            total_steps: of the whole run; a resumed one continues at the step of its first record.
            console: standard output by default.
            mfu_statement: shown once, at the start.
            every_s: seconds between plain lines of steps when there is no terminal.
            stop: its notice is shown in the panel.
            clock: returns seconds.
        """
        self._total = total_steps
        self._console = console or Console()
        self._mfu_statement = mfu_statement
        self._every_s = every_s
        self._stop = StopRequest() if stop is None else stop  # StopRequest is false until a signal comes, so no `or`
        self._clock = clock
        self._last_line: float | None = None
        self._step: StepRecord | None = None
        self._average: AverageThroughput | None = None
        self._validation: ValidationRecord | None = None
        self._curve = Sparkline()
        self._ended = False
        # A dumb terminal cannot move its cursor, and rich would draw nothing there.
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=4) if live else None

    def __enter__(self) -> Display:
        if self._mfu_statement:
            self._print(Text(self._mfu_statement, style="dim"))
        if self._live:
            self._stop.in_panel = True
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        if self._live:
            self._live.stop()
            self._stop.in_panel = False

    def step(self, record: StepRecord, average: AverageThroughput | None = None) -> None:
        """Show a finished step.

        An average replaces the tokens/s and MFU of the single step, and adds the time left.
        """
        self._step, self._average = record, average
        self._curve.add(record.loss)
        now = self._clock()
        due = self._last_line is None or now - self._last_line >= self._every_s or record.step == self._total
        if self._live is None and due:
            self._last_line = now
            self._print(Text(plain_line(record, average, self._total)))
            if record.routing is not None:
                self._print(Text(f"  {experts_line(record, record.routing)}"))

    def validation(self, record: ValidationRecord) -> None:
        """Show a validation; the panel keeps the latest one."""
        self._validation = record
        loss, perplexity = format_decimal(record.val_loss), format_decimal(record.val_perplexity, 2)
        line = f"validation after step {record.step}: loss {loss}, perplexity {perplexity}"
        self._print(Text(line, style="bold"))
        if len(record.by_source) > 1:
            self._print(Text(f"  {sources_line(record)}"))

    def event(self, event: Event) -> None:
        """Show what happened, above the panel."""
        head = event.kind.replace("_", " ") + ("" if event.step is None else f" at step {event.step}")
        style = "dim" if event.kind in DIM_EVENTS else "yellow" if event.kind in HIGHLIGHTED_EVENTS else "cyan"
        body = event.text if event.prompt is None else event.prompt + event.text
        self._print(Text.assemble((head, style), ": ", body))

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=self._live is None, highlight=False)

    def _panel(self) -> RenderableType:
        """Return the live panel: progress bar, numbers under their names, loss curve, and what a stop waits for."""
        return Group(*self._progress(), *self._activity())

    def _activity(self) -> list[RenderableType]:
        """Return the notice of a stop, and how long the current activity has taken if it is not a step or delays a
        stop."""
        if self._ended:
            return []
        activity = (
            "the first step"
            if self._step is None and self._stop.activity is Activity.STEP
            else self._stop.activity.value
        )
        waiting = format_duration(max(0.0, self._clock() - self._stop.since))
        if self._stop:
            return [
                Text(self._stop.notice, style="bold yellow"),
                Text(f"waiting for {activity} ({waiting})", style="dim"),
            ]
        return [] if activity == Activity.STEP.value else [Text(f"{activity} is running ({waiting})", style="dim")]

    def _progress(self) -> list[RenderableType]:
        if self._step is None:
            return []
        done = self._step.step
        bar = Table.grid(padding=(0, 2))
        bar.add_column(ratio=1)
        bar.add_row(
            ProgressBar(total=self._total, completed=done, complete_style="cyan", finished_style="green"),
            Text(f"step {done} of {self._total}", style="bold"),
            Text(
                f"{format_duration(self._average.seconds_left)} left" if self._average and done < self._total else "",
                style="dim",
            ),
        )
        bar.expand = True
        curve = Text.assemble((self._curve.draw(min(60, self._console.width - 20)), "cyan"), ("  training loss", "dim"))
        numbers = _numbers(self._step, self._average, self._validation)
        return [Text(), Constrain(bar, BAR_WIDTH), numbers, *self._by_source(), *self._experts(), curve]

    def _by_source(self) -> Iterator[Text]:
        """Yield one line with the latest validation loss of as many sources as fit; nothing for a single source."""
        if self._validation is None or len(self._validation.by_source) < 2:
            return
        cells = [f"{name} {format_decimal(source.loss)}" for name, source in self._validation.by_source.items()]
        line, room = "by source", self._console.width - len("  +9999")
        for shown, cell in enumerate(cells):
            if len(line) + 2 + len(cell) > room:
                line += f"  +{len(cells) - shown}"
                break
            line += f"  {cell}"
        yield Text(line, style="dim")

    def _experts(self) -> Iterator[Text]:
        if self._step is not None and self._step.routing is not None:
            line = Text(experts_line(self._step, self._step.routing), style="dim")
            line.truncate(self._console.width, overflow="ellipsis")
            yield line


def experts_line(record: StepRecord, routing: RoutingStatistics) -> str:
    """Return a line about the experts of a step: the layer with the least even load, dead experts, and what was
    dropped and added to the loss where that can be."""
    load, layer = max(zip(routing.load_max, routing.layers, strict=True))
    parts = [f"experts: load max/mean {format_decimal(load, 2)} in layer {layer}", f"{sum(routing.dead)} dead"]
    if routing.dropped is not None:
        parts.append(f"{statistics.fmean(routing.dropped):.2%} dropped")
    if record.aux_loss is not None:
        parts.append(f"aux loss {format_decimal(record.aux_loss, 4)}")
    if record.router_z_loss is not None:
        parts.append(f"router z-loss {format_decimal(record.router_z_loss, 4)}")
    return ", ".join(parts)


def sources_line(record: ValidationRecord) -> str:
    """Return a line with the validation loss and perplexity of each source, up to MAX_SOURCES."""
    cells = [
        f"{name} {format_decimal(source.loss)} (perplexity {format_decimal(source.perplexity, 2)})"
        for name, source in record.by_source.items()
    ]
    more = f", and {len(cells) - MAX_SOURCES} more in metrics.jsonl" if len(cells) > MAX_SOURCES else ""
    return "by source: " + ", ".join(cells[:MAX_SOURCES]) + more


def plain_line(record: StepRecord, average: AverageThroughput | None, total_steps: int) -> str:
    """Return one log line for a step."""
    parts = [
        f"step {record.step}/{total_steps}",
        f"loss {format_decimal(record.loss, 4)}",
        f"lr {record.lr:.2e}",
        f"grad norm {format_decimal(record.grad_norm, 2)}",
        f"{(average or record).tokens_per_s:,.0f} tokens/s",
    ]
    mfu = (average or record).mfu
    if mfu is not None:
        parts.append(f"MFU {mfu:.1%}")
    if average and record.step < total_steps:
        parts.append(f"{format_duration(average.seconds_left)} left")
    return "  ".join(parts)


def _numbers(record: StepRecord, average: AverageThroughput | None, validation: ValidationRecord | None) -> Table:
    """Return a table of the current numbers, names above values."""
    cells = {"loss": format_decimal(record.loss)}
    if validation is not None:
        cells["validation"] = format_decimal(validation.val_loss)
    cells |= {
        "learning rate": f"{record.lr:.2e}",
        "grad norm": format_decimal(record.grad_norm, 2),
        "tokens/s": f"{(average or record).tokens_per_s:,.0f}",
    }
    mfu = (average or record).mfu
    if mfu is not None:
        cells["MFU"] = f"{mfu:.1%}"
    table = Table.grid(padding=(0, 4, 0, 0))
    table.add_row(*(Text(name, style="dim") for name in cells))
    table.add_row(*(Text(value, style="bold") for value in cells.values()))
    return table


class Sparkline:
    """A curve of any length in one line of text. Keeps at most `capacity` means of equally many values each."""

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._means: list[float] = []
        self._per_mean = 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Append a value. A value that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        if len(self._open) == self._per_mean:
            self._means.append(sum(self._open) / len(self._open))
            self._open = []
        if len(self._means) == self._capacity:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._per_mean *= 2

    def draw(self, width: int) -> str:
        """Return at most `width` block characters, scaled from the lowest to the highest value."""
        if not self._means:
            return ""
        columns = min(max(1, width), len(self._means))
        edges = [len(self._means) * i // columns for i in range(columns + 1)]
        heights = [sum(self._means[a:b]) / (b - a) for a, b in pairwise(edges)]
        low, high = min(heights), max(heights)
        top = len(BLOCKS) - 1
        return "".join(BLOCKS[round((h - low) / (high - low) * top) if high > low else top // 2] for h in heights)
