"""The section of a run's page about its experts: load, entropy, drops, losses, and specialisation by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from pretrain.console import format_decimal
from pretrain.report.expert_charts import SourceCounts, layer_figure, load_map, source_map, specialisation_figure
from pretrain.report.render import Table
from pretrain.report.run_charts import Timeline
from pretrain.runs.routing import kl_to_uniform, load_over_mean
from pretrain.runs.schema import Metrics, StepRecord, ValidationRecord

CURVES = {
    "load_max": "Load of the fullest expert over the mean",
    "entropy": "Router entropy over log(experts)",
    "dropped": "Fraction of the assignments dropped",
    "dead": "Experts without a token in a step",
    "aux_loss": "Auxiliary loss, without its weight",
    "router_z_loss": "Router z-loss, without its weight",
}
"""Title of the chart of each field of `RoutingStatistics`."""

AXES = {
    "load_max": {"rangemode": "normal"},
    "entropy": {"range": [0, 1.05]},
    "dropped": {"rangemode": "tozero", "tickformat": "~%"},
}
"""Vertical axes that do not just begin at 0."""


@dataclass(frozen=True)
class ExpertSection:
    """What the page says about the experts."""

    figures: Mapping[str, go.Figure]
    """By the names of their charts."""
    curves: Mapping[str, str]
    """Title of each chart over the steps by its name. The first is large."""
    notices: Sequence[str]
    note: str
    has_map: bool
    """Whether there is a heat map of the load: a validation has counted."""
    by_source: Table | None
    """None with fewer than two sources."""


def expert_section(metrics: Metrics, timeline: Timeline) -> ExpertSection | None:
    """Return the section; None for a run without experts."""
    records = [record for record in metrics.steps if record.routing is not None]
    snapshots = {record.step: counts for record in metrics.validations if (counts := _all_counts(record))}
    if not records and not snapshots:
        return None
    figures = _curves_by_layer(records, timeline)
    curves = {f"experts_{field}": title for field, title in CURVES.items() if f"experts_{field}" in figures}
    if snapshots:
        figures["experts_map"] = load_map(snapshots)
    counted = [record for record in metrics.validations if len(_source_counts(record)) > 1]
    if counted:
        by_source = _source_counts(counted[-1])
        figures["experts_sources"] = source_map(by_source)
        figures["experts_kl"] = specialisation_figure(by_source)
    return ExpertSection(
        figures,
        curves,
        _notices(records),
        _note(records),
        bool(snapshots),
        _source_table(counted) if counted else None,
    )


def _source_counts(record: ValidationRecord) -> SourceCounts:
    return {name: source.expert_counts for name, source in record.by_source.items() if source.expert_counts}


def _all_counts(record: ValidationRecord) -> dict[int, list[int]]:
    """Return the counts of all sources together by layer; empty without experts."""
    by_source = list(_source_counts(record).values())
    if not by_source:
        return {}
    total_ME = np.sum([list(by_layer.values()) for by_layer in by_source], axis=0)
    return dict(zip(by_source[0], total_ME.tolist(), strict=True))


def _curves_by_layer(records: Sequence[StepRecord], timeline: Timeline) -> dict[str, go.Figure]:
    """Return a figure for each field that the records have."""
    routings = [record.routing for record in records if record.routing is not None]
    if not routings:
        return {}
    steps = [record.step for record in records]
    figures: dict[str, go.Figure] = {}
    for field in CURVES:
        values = [getattr(routing, field) for routing in routings]
        if any(value is None for value in values):
            continue
        figure = layer_figure(steps, routings[-1].layers, np.asarray(values, float), timeline, is_large=not figures)
        figure.update_yaxes(AXES.get(field, {"rangemode": "tozero"}))
        figures[f"experts_{field}"] = figure
    return figures


def _notices(records: Sequence[StepRecord]) -> list[str]:
    """Return what a reader must not miss: dead experts in the last step."""
    routing = records[-1].routing if records else None
    if routing is None or not sum(routing.dead):
        return []
    n_dead = sum(routing.dead)
    where = ", ".join(f"{n} in layer {layer}" for layer, n in zip(routing.layers, routing.dead, strict=True) if n)
    return [f"{n_dead:,} expert{'s' * (n_dead > 1)} had no token in the last step: {where}."]


def _note(records: Sequence[StepRecord]) -> str:
    parts = [
        "Load counts what the router chose, before any drop.",
        "Lines are smoothed; faint dots are the highest layer of each step.",
    ]
    if records:
        last = records[-1]
        added = [
            f"{name} {format_decimal(value, 4)}"
            for name, value in (("auxiliary loss", last.aux_loss), ("router z-loss", last.router_z_loss))
            if value is not None
        ]
        if added:
            parts.append(f"Added to the training loss in the last step, all layers together: {', '.join(added)}.")
    return " ".join(parts)


def _source_table(validations: Sequence[ValidationRecord]) -> Table:
    """Return how specialised the experts are on each source, in the first and in the last validation."""
    first, last = _source_counts(validations[0]), _source_counts(validations[-1])
    rows = [_source_row(name, first.get(name), by_layer) for name, by_layer in last.items()]
    headings = ("Source", "First KL", "Last KL", "Highest in layer", "Most used expert")
    return Table(headings, rows)


def _source_row(
    name: str, first: Mapping[int, Sequence[int]] | None, last: Mapping[int, Sequence[int]]
) -> tuple[str, ...]:
    layers, kl_M = list(last), kl_to_uniform(list(last.values()))
    load_ME = load_over_mean(list(last.values()))
    layer, expert = np.unravel_index(load_ME.argmax(), load_ME.shape)
    return (
        name,
        "" if first is None else format_decimal(float(kl_to_uniform(list(first.values())).mean())),
        format_decimal(float(kl_M.mean())),
        f"{layers[int(kl_M.argmax())]} ({format_decimal(float(kl_M.max()))})",
        f"{expert} in layer {layers[int(layer)]} ({load_ME.max() / load_ME.shape[1]:.0%} of its choices)",
    )
