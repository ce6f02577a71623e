"""The report of a run: what it is, its curves, its events, what it writes and its settings."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import plotly.graph_objects as go

from data_pipeline.atomic import write_atomic
from data_pipeline.held_out import MIN_SEQUENCES
from pretrain.config import RunConfig, flatten
from pretrain.config.saved import read_config
from pretrain.console import format_count, format_decimal, format_duration
from pretrain.report import render
from pretrain.report.render import text
from pretrain.report.run_charts import MAX_POINTS, charts, themes
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.runs.schema import Event, Metrics, ValidationRecord

SECTIONS = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_s": "Tokens per second",
}
STATES = {"finish": "finished", "stop": "stopped", "start": "not finished", "resume": "not finished"}


@dataclass(frozen=True)
class Run:
    """All that a run directory says."""

    name: str
    config: RunConfig
    metrics: Metrics
    events: list[Event]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory, of a finished run or one still going, and return its path.

    UserError: the directory holds no `config.yaml`, or a file in it cannot be read.
    """
    run = Run(
        run_dir.resolve().name,
        read_config(run_dir / "config.yaml"),
        read_metrics(run_dir / "metrics.jsonl"),
        read_events(run_dir / "events.jsonl"),
    )
    report = run_dir / "report.html"
    write_atomic(report, _page(run).encode())
    return report


def _page(run: Run) -> str:
    figures = charts(run.metrics, run.events)
    sections = "".join(
        render.card(name, title, render.chart(name, f"{title} over the steps")) for name, title in SECTIONS.items()
    )
    body = [
        render.tiles(_tiles(run)),
        render.notices(_notices(run)),
        f'<div class="charts">{sections}</div>',
        _by_source(figures, run.metrics.validations),
        f'<p class="note">{text(_remarks(run))}</p>',
        _ancestry(run.config),
        _samples(run.events),
        _events(run.events),
        _config(run.config),
    ]
    source = "metrics.jsonl and events.jsonl"
    return render.page(run.name, _state(run.events), _subtitle(run), "\n".join(body), source, figures, themes())


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures a reader looks for first: name, value, a remark."""
    steps, validations = run.metrics.steps, run.metrics.validations
    model = run.config.model
    parameters = next((event.parameters for event in reversed(run.events) if event.parameters), None)
    shape = f"{model.n_layers} layers, width {model.d_model:,}"
    tiles = [("Parameters", format_count(parameters), shape) if parameters else ("Model", shape, "")]
    if steps:
        tiles.append(
            ("Tokens", format_count(steps[-1].tokens), f"{steps[-1].step:,} of {run.config.train.steps:,} steps")
        )
    if validations:
        last = validations[-1]
        first = f"from {format_decimal(validations[0].val_loss)}, " if len(validations) > 1 else ""
        tiles.append(
            (
                "Validation loss",
                format_decimal(last.val_loss),
                f"{first}perplexity {format_decimal(last.val_perplexity, 2)}",
            )
        )
    if steps:
        tiles.append(("Training time", format_duration(_seconds_at_work(run)), _attempts(run.events)))
        speed = statistics.median(record.tokens_per_s for record in steps)
        shares = [record.mfu for record in steps if record.mfu is not None]
        tiles.append(
            (
                "Speed",
                f"{speed:,.0f} tokens/s",
                f"MFU {statistics.median(shares):.1%} (medians)" if shares else "median",
            )
        )
    return tiles


def _seconds_at_work(run: Run) -> float:
    """From the start to the last sign of life of every attempt, without the time between attempts."""
    signs = [(event.time, event.kind in {"start", "resume"}) for event in run.events if event.kind != "settings"]
    signs += [(record.time, False) for record in run.metrics.steps] + [
        (record.time, False) for record in run.metrics.validations
    ]
    signs.sort()
    return sum(later - earlier for (earlier, _), (later, begins) in pairwise(signs) if not begins)


def _attempts(events: Sequence[Event]) -> str:
    resumes = sum(event.kind == "resume" for event in events)
    return "in one go" if resumes == 0 else f"resumed {'once' if resumes == 1 else f'{resumes} times'}"


def _state(events: Sequence[Event]) -> str:
    return next((STATES[event.kind] for event in reversed(events) if event.kind in STATES), "not started")


def _subtitle(run: Run) -> str:
    model, train, optim = run.config.model, run.config.train, run.config.optim
    device = next((event.device for event in reversed(run.events) if event.device), None)
    parts = [
        f"{model.n_heads} heads over {model.n_kv_heads} key/value heads",
        f"vocabulary {model.vocab_size:,}",
        f"{train.batch_size} × {run.config.data.seq_len:,} tokens a step",
        f"{'Muon' if optim.kind == 'muon' else 'AdamW'}, {optim.schedule} schedule",
        train.precision if device is None else f"{train.precision} on {device}",
    ]
    return " · ".join(parts)


def _notices(run: Run) -> list[str]:
    notices = []
    if not run.metrics.steps:
        notices.append("No step has been recorded yet.")
    bad = [record.step for record in run.metrics.steps if not math.isfinite(record.loss)]
    if bad:
        notices.append(
            f"The loss of {len(bad):,} step{'s' * (len(bad) > 1)} was not finite, first at step {bad[0]:,}: the curves have gaps there."
        )
    few = run.config.data.seq_len * (MIN_SEQUENCES - 1)
    by_source = run.metrics.validations[-1].by_source if run.metrics.validations else {}
    small = [f"{name} ({source.tokens:,} tokens)" for name, source in by_source.items() if source.tokens <= few]
    if small:
        notices.append(
            f"The validation loss is over little text of {', '.join(small)}: hold out more of it, or raise eval.batches."
        )
    return notices


def _remarks(run: Run) -> str:
    """What the curves leave out, and what MFU means here."""
    remarks = ["Drag over a chart to zoom in, double-click to see all again."]
    if len(run.metrics.steps) > MAX_POINTS:
        remarks.append(
            f"Curves show {MAX_POINTS:,} of the {len(run.metrics.steps):,} steps: the lowest and the highest of every stretch."
        )
    statement = next((event.mfu_statement for event in reversed(run.events) if event.mfu_statement), None)
    return " ".join([*remarks, f"{statement}."] if statement else remarks)


def _by_source(figures: Mapping[str, go.Figure], validations: Sequence[ValidationRecord]) -> str:
    """The curve of each source, and a table of the newest values. Empty where there are not several sources."""
    if "by_source" not in figures:
        return ""
    last = validations[-1]
    rows = []
    for name, source in last.by_source.items():
        first = next(record.by_source[name] for record in validations if name in record.by_source)
        rows.append(
            (
                name,
                f"{source.tokens:,}",
                format_decimal(first.loss),
                format_decimal(source.loss),
                format_decimal(source.perplexity, 2),
            )
        )
    rows.append(
        (
            "all",
            f"{last.val_tokens:,}",
            format_decimal(validations[0].val_loss),
            format_decimal(last.val_loss),
            format_decimal(last.val_perplexity, 2),
        )
    )
    table = render.table(("Source", "Tokens predicted", "First loss", "Last loss", "Perplexity"), rows, total=True)
    chart = render.chart("by_source", "Validation loss by source over the steps")
    note = "The last row is the mean over all these tokens."
    return render.card("by_source", "Validation loss by source", f'{chart}<div class="scroll">{table}</div>', note)


def _samples(events: Sequence[Event]) -> str:
    samples = {event.prompt: event for event in events if event.kind == "sample"}.values()  # the last attempt's
    if not samples:
        return ""
    figures = "".join(f'<pre class="sample"><b>{text(s.prompt or "")}</b>{text(s.text)}</pre>' for s in samples)
    return render.card("samples", "What it writes", figures, "The prompt is bold.")


def _ancestry(config: RunConfig) -> str:
    """The checkpoints that the run began from, nearest first; nothing for a run from initial weights."""
    if not config.run.ancestry:
        return ""
    taken = {"weights": "weights", "full": "weights, optimizer, data position"}
    rows = "".join(
        f'<tr><td class="number">{ancestor.step:,}</td><td>{text(ancestor.run)}</td><td>{taken[ancestor.mode]}</td>'
        f"<td>{text(ancestor.generation)}</td></tr>"
        for ancestor in config.run.ancestry
    )
    head = '<tr><th class="number">Step</th><th>Run</th><th>Taken over</th><th>Checkpoint</th></tr>'
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    return render.card("ancestry", "Began from", table, "The nearest checkpoint first, then that run's own beginning.")


def _events(events: Sequence[Event]) -> str:
    told = [event for event in events if event.kind != "sample"]
    if not told:
        return ""
    began = told[0].time
    rows = "".join(
        f'<tr><td class="number">{"" if e.step is None else f"{e.step:,}"}</td><td><span class="kind {text(e.kind)}">'
        f'{text(e.kind.replace("_", " "))}</span></td><td>{text(e.text)}</td><td class="number" title="{render.when(e.time)}">'
        f"{format_duration(e.time - began)}</td></tr>"
        for e in told
    )
    head = '<tr><th class="number">Step</th><th>Event</th><th></th><th class="number">After</th></tr>'
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    return render.card("events", "Events", table, f"Since {render.when(began)}.")


def _config(config: RunConfig) -> str:
    """Sections that open and close; what differs from the defaults is bold."""
    defaults = flatten(RunConfig())
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for key, value in flatten(config).items():
        section, _, name = key.partition(".")
        word = json.dumps(value, ensure_ascii=False) if isinstance(value, list | bool) or value is None else str(value)
        sections.setdefault(section, []).append((name, word, value != defaults[key]))
    return render.card("config", "Settings", render.settings(sections), "What differs from the defaults is bold.")
