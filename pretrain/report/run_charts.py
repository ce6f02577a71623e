"""The charts of a run as Plotly figures. Colours come from `themes`."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from pretrain.console import format_decimal
from pretrain.report.curves import MAX_POINTS, FloatArray, nan_to_gaps, smooth, thin
from pretrain.report.themes import N_SOURCE_COLORS
from pretrain.runs.schema import Event, Metrics

SMOOTHED_FRACTION = 1 / 25
"""Length of one moving mean, as a fraction of the run."""

DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")

EVENT_SYMBOLS = {
    "start": "triangle-right",
    "resume": "triangle-right",
    "save": "circle",
    "stop": "square",
    "skip_checkpoint": "x",
    "skip_data": "x",
    "finish": "diamond",
}
LINE_EVENTS = {"start", "resume", "stop", "skip_checkpoint"}
"""Events that also get a vertical line through the curves."""

EventsByStep = Mapping[int, Sequence[Event]]


@dataclass(frozen=True)
class Timeline:
    """The steps that every chart of a run shows, and what happened at them."""

    by_step: EventsByStep
    last_step: int

    @classmethod
    def of(cls, metrics: Metrics, events: Sequence[Event]) -> Timeline:
        """Return the timeline up to the last step that has a record or an event."""
        by_step: dict[int, list[Event]] = {}
        for event in events:
            if event.step is not None and event.kind in EVENT_SYMBOLS:
                by_step.setdefault(event.step, []).append(event)
        recorded = [*(record.step for record in metrics.steps), *(record.step for record in metrics.validations)]
        return cls(by_step, max([0, *by_step, *recorded]))


def run_figures(metrics: Metrics, timeline: Timeline) -> dict[str, go.Figure]:
    """Return the figures of a run's page by name. Curves longer than MAX_POINTS are thinned."""
    steps = [record.step for record in metrics.steps]
    loss = _curve_and_mean(steps, [record.loss for record in metrics.steps], "training loss", ".4f")
    grad_norm = _curve_and_mean(steps, [record.grad_norm for record in metrics.steps], "gradient norm", ".3f")
    speed = _curve_and_mean(steps, [record.tokens_per_s for record in metrics.steps], "tokens/s", ",.0f")
    lr = np.asarray([record.lr for record in metrics.steps], dtype=np.float64)
    lr_mode = "lines" if len(lr) > 1 else "markers"
    lr_curve = curve(steps, lr, "learning rate", ".2e", role="primary", mode=lr_mode, width=2)
    figures = {
        "loss": figure_over_steps(
            [*loss, _validation_curve(metrics), _event_strip(timeline.by_step)], timeline, is_large=True
        ),
        "lr": figure_over_steps([lr_curve], timeline),
        "grad_norm": figure_over_steps(grad_norm, timeline),
        "tokens_per_s": figure_over_steps(speed, timeline),
    }
    figures["lr"].update_yaxes(exponentformat="e", showexponent="all", rangemode="tozero")
    for name in ("grad_norm", "tokens_per_s"):
        figures[name].update_yaxes(rangemode="tozero")
    if (source_curves := _source_curves(metrics)) is not None:
        figures["by_source"] = figure_over_steps(source_curves, timeline)
        figures["by_source"].update_layout(height=330, showlegend=True, margin={"t": 34})
    return figures


def _curve_and_mean(steps: Sequence[int], values: Sequence[float], name: str, number_format: str) -> list[go.Scatter]:
    """Return the values, faint, and their moving mean."""
    y = np.asarray(values, dtype=np.float64)
    mean, reach = smooth_twice(y)
    label = f"smoothed over ±{reach:,} steps"
    return [
        curve(steps, y, name, number_format, role="faint", mode=dots_or_line(steps), width=1),
        curve(steps, mean, label, number_format, role="primary", mode="lines", width=2),
    ]


def dots_or_line(steps: Sequence[int]) -> str:
    """Return the mode of faint values: dots, but a line if they are thinned.

    Dots of the extremes alone would look like a hollow band.
    """
    return "markers" if len(steps) <= MAX_POINTS else "lines"


def smooth_twice(y: FloatArray) -> tuple[FloatArray, int]:
    """Return the smoothed values, and how many steps on each side they depend on.

    Smoothed once, a single spike would leave a plateau; smoothed twice, it leaves a small hill.
    """
    radius = max(2, round(len(y) * SMOOTHED_FRACTION / 2))
    return smooth(smooth(y, radius), radius), 2 * radius


def curve(
    steps: Sequence[int], y: FloatArray, name: str, number_format: str, *, role: str, mode: str, width: float
) -> go.Scatter:
    """Return one curve, thinned. `role` names its colour, see `themes`."""
    shown = thin(y)
    return go.Scatter(
        x=np.asarray(steps)[shown].tolist(),
        y=nan_to_gaps(y[shown]),
        name=name,
        meta=role,
        mode=mode,
        marker={"size": 4},
        line={"width": width, "simplify": False},
        hovertemplate=f"%{{y:{number_format}}}",
    )


def _validation_curve(metrics: Metrics) -> go.Scatter:
    """Return the validation loss, with its first and last value written beside their points."""
    losses = [record.val_loss for record in metrics.validations]
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    labelled = {finite[0], finite[-1]} if finite else set()
    return go.Scatter(
        x=[record.step for record in metrics.validations],
        y=nan_to_gaps(losses),
        name="validation loss",
        mode="lines+markers+text",
        meta="secondary",
        line={"width": 1.5, "dash": "dot", "simplify": False},
        marker={"size": 8},
        text=[format_decimal(loss) if i in labelled else "" for i, loss in enumerate(losses)],
        textposition=["middle right" if i == 0 else "top left" for i in range(len(losses))],
        cliponaxis=False,
        hovertemplate="%{y:.4f}",
    )


def _source_curves(metrics: Metrics) -> list[go.Scatter] | None:
    """Return the validation loss of each source, in the order of the newest record; None for fewer than two."""
    names = dict.fromkeys(name for record in reversed(metrics.validations) for name in record.by_source)
    if len(names) < 2:
        return None
    curves = []
    for i, name in enumerate(names):
        points = [
            (record.step, record.by_source[name].loss) for record in metrics.validations if name in record.by_source
        ]
        curves.append(
            go.Scatter(
                x=[step for step, _ in points],
                y=nan_to_gaps(loss for _, loss in points),
                name=html.escape(name),
                mode="lines+markers",
                meta=f"source{i % N_SOURCE_COLORS}",
                line={"width": 1.5, "dash": DASHES[i % len(DASHES)], "simplify": False},
                marker={"size": 7, "symbol": SYMBOLS[i % len(SYMBOLS)]},
                hovertemplate="%{y:.4f}",
            )
        )
    return curves


def _event_strip(by_step: EventsByStep) -> go.Scatter:
    """Return one symbol for each step with events, that of its last event. Hovering shows all of them."""
    return go.Scatter(
        x=list(by_step),
        y=[0.5] * len(by_step),
        yaxis="y2",
        name="events",
        mode="markers",
        meta="mark",
        marker={"size": 9, "symbol": [EVENT_SYMBOLS[events[-1].kind] for events in by_step.values()]},
        text=[
            "<br>".join(f"{_label(event)}: {html.escape(event.text)}" for event in events)
            for events in by_step.values()
        ],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
        cliponaxis=False,
    )


def _event_lines(by_step: EventsByStep, last_step: int, *, with_labels: bool) -> dict[str, list[dict[str, object]]]:
    """Return a dotted line at every stop and resume. Labels say which event it is."""
    labels = {
        step: ", ".join(_label(event) for event in events if event.kind in LINE_EVENTS)
        for step, events in by_step.items()
        if step > 0
    }
    labels = {step: label for step, label in labels.items() if label}
    lines = [
        {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"} for step in labels
    ]
    if not with_labels:
        return {"shapes": lines}
    annotations = [
        {"x": step, "y": 1, "yref": "paper", "yanchor": "top", "showarrow": False, "text": label}
        | ({"xanchor": "left", "xshift": 4} if step <= last_step / 2 else {"xanchor": "right", "xshift": -4})
        for step, label in labels.items()
    ]
    return {"shapes": lines, "annotations": annotations}


def _label(event: Event) -> str:
    return event.kind.replace("_", " ")


def figure_over_steps(curves: Sequence[go.Scatter], timeline: Timeline, *, is_large: bool = False) -> go.Figure:
    """Return a figure over the steps, with lines at stops and resumes.

    A large one has a strip of events below the curves.
    """
    by_step, last_step = timeline.by_step, timeline.last_step
    figure = go.Figure(curves)
    margin = 0.015 * max(1, last_step)
    figure.update_layout(
        height=430 if is_large else 240,
        xaxis={"range": [-margin, last_step + margin], "hoverformat": ",d", "anchor": "y2" if is_large else "y"},
        xaxis_dtick=1 if last_step < 6 else None,
        showlegend=is_large,
        margin={"l": 48, "r": 12, "t": 34 if is_large else 12, "b": 48 if is_large else 28},
        template=None,
        **_event_lines(by_step, last_step, with_labels=is_large),
    )
    if is_large:
        figure.update_xaxes(title={"text": "step"})
        figure.update_layout(
            yaxis={"domain": [0.1, 1]},
            yaxis2={"domain": [0, 0.06], "range": [0, 1], "visible": False, "fixedrange": True},
        )
    return figure
