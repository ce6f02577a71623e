"""The report of a run: key numbers, curves, events, samples and settings."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from data_pipeline.atomic import write_atomic
from data_pipeline.held_out import MIN_SEQUENCES
from pretrain.config import RunConfig, flatten
from pretrain.config.saved import read_config
from pretrain.console import format_count, format_decimal, format_duration
from pretrain.report.curves import MAX_POINTS
from pretrain.report.expert_section import expert_section
from pretrain.report.profile_tables import ProfileTables, latest_profile
from pretrain.report.render import Settings, Table, Tile, render_page
from pretrain.report.run_charts import Timeline, run_figures
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.runs.schema import Event, Metrics, ValidationRecord

CURVES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_s": "Tokens per second",
}
STATES = {"finish": "finished", "stop": "stopped", "start": "not finished", "resume": "not finished"}


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run directory hold."""

    name: str
    config: RunConfig
    metrics: Metrics
    events: list[Event]
    profile: ProfileTables | None = None


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the directory of a run, finished or in progress, and return its path.

    Raises:
        UserError: the directory has no `config.yaml`, or one of its files cannot be read.
    """
    events = read_events(run_dir / "events.jsonl")
    run = RunFiles(
        run_dir.resolve().name,
        read_config(run_dir / "config.yaml"),
        read_metrics(run_dir / "metrics.jsonl"),
        events,
        latest_profile(run_dir, events),
    )
    report = run_dir / "report.html"
    write_atomic(report, render_run(run).encode())
    return report


def render_run(run: RunFiles) -> str:
    """Return the page as HTML."""
    samples = {event.prompt: event for event in run.events if event.kind == "sample"}  # of each prompt the last one
    timeline = Timeline.of(run.metrics, run.events)
    figures = run_figures(run.metrics, timeline)
    experts = expert_section(run.metrics, timeline)
    return render_page(
        "run.html",
        title=run.name,
        state=run_state(run.events),
        subtitle=_subtitle(run),
        source="metrics.jsonl and events.jsonl",
        figures=figures if experts is None else figures | dict(experts.figures),
        tiles=_tiles(run),
        notices=_notices(run),
        curves=CURVES,
        by_source=_source_table(run.metrics.validations) if "by_source" in figures else None,
        remarks=_remarks(run),
        experts=experts,
        profile=run.profile,
        ancestry=run.config.run.ancestry,
        samples=list(samples.values()),
        events=[event for event in run.events if event.kind != "sample"],
        settings=_settings(run.config),
    )


def run_state(events: Sequence[Event]) -> str:
    """Return `finished`, `stopped`, `not finished` or `not started`."""
    return next((STATES[event.kind] for event in reversed(events) if event.kind in STATES), "not started")


def _model_tile(run: RunFiles) -> Tile:
    shape = f"{run.config.model.n_layers} layers, width {run.config.model.d_model:,}"
    start = next((event for event in reversed(run.events) if event.parameters), None)
    if start is None or start.parameters is None:
        return Tile("Model", shape)
    active = start.active_parameters or start.parameters
    note = f"{format_count(active)} active, {shape}" if active < start.parameters else shape
    return Tile("Parameters", format_count(start.parameters), note)


def _tiles(run: RunFiles) -> list[Tile]:
    steps, validations = run.metrics.steps, run.metrics.validations
    tiles = [_model_tile(run)]
    if steps:
        progress = f"{steps[-1].step:,} of {run.config.train.steps:,} steps"
        tiles.append(Tile("Tokens", format_count(steps[-1].tokens), progress))
    if validations:
        last = validations[-1]
        first = f"from {format_decimal(validations[0].val_loss)}, " if len(validations) > 1 else ""
        perplexity = f"perplexity {format_decimal(last.val_perplexity, 2)}"
        tiles.append(Tile("Validation loss", format_decimal(last.val_loss), first + perplexity))
    if steps:
        tiles.append(Tile("Training time", format_duration(_training_seconds(run)), _format_resumes(run.events)))
        speed = statistics.median(record.tokens_per_s for record in steps)
        mfus = [record.mfu for record in steps if record.mfu is not None]
        note = f"MFU {statistics.median(mfus):.1%} (medians)" if mfus else "median"
        tiles.append(Tile("Speed", f"{speed:,.0f} tokens/s", note))
    return tiles


def _training_seconds(run: RunFiles) -> float:
    """Return the time that the attempts took, each from its start to its last record.

    The time between attempts does not count.
    """
    times = [(event.time, event.kind in {"start", "resume"}) for event in run.events if event.kind != "settings"]
    times += [(record.time, False) for record in run.metrics.steps]
    times += [(record.time, False) for record in run.metrics.validations]
    times.sort()
    return sum(end - start for (start, _), (end, is_new_attempt) in pairwise(times) if not is_new_attempt)


def _format_resumes(events: Sequence[Event]) -> str:
    count = sum(event.kind == "resume" for event in events)
    return "in one go" if count == 0 else f"resumed {'once' if count == 1 else f'{count} times'}"


def _subtitle(run: RunFiles) -> str:
    model, train, optim = run.config.model, run.config.train, run.config.optim
    device = next((event.device for event in reversed(run.events) if event.device), None)
    parts = [f"{model.moe.n_experts} experts, {model.moe.top_k} per token"] if model.moe.n_experts else []
    parts += [
        f"{model.n_heads} heads over {model.n_kv_heads} key/value heads",
        f"vocabulary {model.vocab_size:,}",
        f"{train.batch_size} × {run.config.data.seq_len:,} tokens a step",
        f"{'Muon' if optim.kind == 'muon' else 'AdamW'}, {optim.schedule} schedule",
        train.precision if device is None else f"{train.precision} on {device}",
    ]
    return " · ".join(parts)


def _notices(run: RunFiles) -> list[str]:
    """Return what a reader must not miss: no steps, losses that are not finite, too little validation text."""
    notices = []
    if not run.metrics.steps:
        notices.append("No step has been recorded yet.")
    not_finite = [record.step for record in run.metrics.steps if not math.isfinite(record.loss)]
    if not_finite:
        notices.append(
            f"The loss of {len(not_finite):,} step{'s' * (len(not_finite) > 1)} was not finite, "
            f"first at step {not_finite[0]:,}: the curves have gaps there."
        )
    few_tokens = run.config.data.seq_len * (MIN_SEQUENCES - 1)
    by_source = run.metrics.validations[-1].by_source if run.metrics.validations else {}
    small = [f"{name} ({source.tokens:,} tokens)" for name, source in by_source.items() if source.tokens <= few_tokens]
    if small:
        notices.append(
            f"The validation loss is over little text of {', '.join(small)}: hold out more of it, "
            "or raise eval.batches."
        )
    return notices


def _remarks(run: RunFiles) -> str:
    """Return what the curves leave out, and what MFU means in this run."""
    remarks = ["Drag over a chart to zoom in, double-click to see all again."]
    n_steps = len(run.metrics.steps)
    if n_steps > MAX_POINTS:
        remarks.append(
            f"Curves show {MAX_POINTS:,} of the {n_steps:,} steps: the lowest and the highest value of every section."
        )
    statement = next((event.mfu_statement for event in reversed(run.events) if event.mfu_statement), None)
    return " ".join([*remarks, f"{statement}."] if statement else remarks)


def _source_table(validations: Sequence[ValidationRecord]) -> Table:
    """Return the first and the last validation loss of each source, and of all."""
    last = validations[-1]
    rows = []
    for name, source in last.by_source.items():
        first = next(record.by_source[name] for record in validations if name in record.by_source)
        rows.append(_loss_row(name, source.tokens, first.loss, source.loss, source.perplexity))
    rows.append(_loss_row("all", last.val_tokens, validations[0].val_loss, last.val_loss, last.val_perplexity))
    headings = ("Source", "Tokens predicted", "First loss", "Last loss", "Perplexity")
    return Table(headings, rows, has_total=True)


def _loss_row(name: str, tokens: int, first_loss: float, last_loss: float, perplexity: float) -> tuple[str, ...]:
    losses = (format_decimal(first_loss), format_decimal(last_loss), format_decimal(perplexity, 2))
    return (name, f"{tokens:,}", *losses)


def _settings(config: RunConfig) -> Settings:
    """Return every setting by section, and whether it differs from its default."""
    defaults = flatten(RunConfig())
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for key, value in flatten(config).items():
        section, _, name = key.partition(".")
        is_json = isinstance(value, list | dict | bool) or value is None
        shown = json.dumps(value, ensure_ascii=False) if is_json else str(value)
        sections.setdefault(section, []).append((name, shown, value != defaults[key]))
    return sections
