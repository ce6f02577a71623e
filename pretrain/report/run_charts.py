"""The charts of the report as Plotly figures. They carry no colours: those are in the two themes, and the page picks one."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from pretrain.console import format_decimal
from pretrain.runs.schema import Event, Metrics

MAX_POINTS = 2000
"""Points a curve shows at most. Longer runs keep the lowest and the highest value of each stretch, so that no spike is lost."""

SMOOTHED_FRACTION = 1 / 25
"""Length of one moving mean, as a fraction of the run."""

FloatArray = NDArray[np.float64]

BY_SOURCE = {
    "light": ("#1f5fae", "#c2410c", "#0f766e", "#a21caf", "#7a5c00", "#be123c", "#15803d", "#475569"),
    "dark": ("#7db4f5", "#fb9a5b", "#5eead4", "#e879f9", "#facc15", "#fb7185", "#86efac", "#cbd5e1"),
}
"""Colours of the curves of sources. Each has a dash and a symbol of its own as well: eight colours do not keep apart for everybody."""

DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")

THEMES = {
    "light": {
        "text": "#5b6474",
        "grid": "#e8eaef",
        "paper": "#ffffff",
        "raw": "#8db4e2",
        "smooth": "#1f5fae",
        "other": "#c2410c",
        "mark": "#8a93a3",
    },
    "dark": {
        "text": "#9aa4b5",
        "grid": "#2a303b",
        "paper": "#171b22",
        "raw": "#3d6390",
        "smooth": "#7db4f5",
        "other": "#fb9a5b",
        "mark": "#6b7587",
    },
}
"""Blue and orange keep apart for every kind of colour vision; the two lines have 3:1 contrast on their paper or more."""

EVENT_SYMBOLS = {
    "start": "triangle-right",
    "resume": "triangle-right",
    "save": "circle",
    "stop": "square",
    "skip_checkpoint": "x",
    "skip_data": "x",
    "finish": "diamond",
}
TURNING_POINTS = {"start", "resume", "stop", "skip_checkpoint"}
"""Events that also get a line across the curves."""


def charts(metrics: Metrics, events: Sequence[Event]) -> dict[str, go.Figure]:
    """The figures of the page by name. Every curve that is longer than MAX_POINTS is thinned."""
    marks: dict[int, list[Event]] = {}
    for event in events:
        if event.step is not None and event.kind in EVENT_SYMBOLS:
            marks.setdefault(event.step, []).append(event)
    steps = [record.step for record in metrics.steps]
    last = max([0, *steps, *marks, *(record.step for record in metrics.validations)])
    loss = _curves(steps, [record.loss for record in metrics.steps], "training loss", ".4f")
    rates = np.asarray([record.lr for record in metrics.steps], dtype=np.float64)
    lr = _trace(
        steps, rates, "learning rate", ".2e", meta="smooth", mode="lines" if len(rates) > 1 else "markers", width=2
    )
    grad_norm = _curves(steps, [record.grad_norm for record in metrics.steps], "gradient norm", ".3f")
    speed = _curves(steps, [record.tokens_per_s for record in metrics.steps], "tokens/s", ",.0f")
    figures = {
        "loss": _figure([*loss, _validation(metrics), _event_lane(marks)], marks, last, large=True),
        "lr": _figure([lr], marks, last),
        "grad_norm": _figure(grad_norm, marks, last),
        "tokens_per_s": _figure(speed, marks, last),
    }
    figures["lr"].update_yaxes(exponentformat="e", showexponent="all", rangemode="tozero")
    if (by_source := _by_source(metrics)) is not None:
        figures["by_source"] = _figure(by_source, marks, last)
        figures["by_source"].update_layout(height=330, showlegend=True, margin={"t": 34})
    for name in ("grad_norm", "tokens_per_s"):
        figures[name].update_yaxes(rangemode="tozero")
    return figures


def themes() -> dict[str, dict[str, object]]:
    """The look of every chart, light and dark: Plotly's template, and the colour of each role (a trace names its role in `meta`)."""
    return {
        name: {
            "template": _template(colors).to_plotly_json(),
            "colors": colors | {f"source{i}": color for i, color in enumerate(BY_SOURCE[name])},
        }
        for name, colors in THEMES.items()
    }


def smooth(values: FloatArray, reach: int) -> FloatArray:
    """Mean over each value and its neighbours up to `reach` on both sides.

    At the steep start the window shrinks on both sides, so that the curve is not bent; at the end it only loses what is not there yet.
    Values that are not finite count for nothing and stay gaps.
    """
    finite = np.isfinite(values)
    at = np.arange(len(values))
    width = np.minimum(reach, at)
    low, high = at - width, np.minimum(at + width + 1, len(values))
    total, count = (
        _window_sums(addends, low, high) for addends in (np.where(finite, values, 0.0), finite.astype(np.float64))
    )
    return np.where(finite, total / np.maximum(1, count), np.nan)


def _window_sums(values: FloatArray, low: NDArray[np.intp], high: NDArray[np.intp]) -> FloatArray:
    """Sum of values[low:high] for each pair, of those numbers alone.

    Differences of one running sum would be quicker, and after a spike of 1e20 hold nothing of losses around 3.
    """
    sums, begin, width, length = np.zeros(len(low)), low.copy(), high - low, 1
    while len(values) and length <= width.max():  # values[i] is here the sum of `length` numbers from i on
        takes = (width & length) > 0
        sums[takes] += values[begin[takes]]
        begin[takes] += length
        values, length = values[:-length] + values[length:], 2 * length
    return sums


def thin(values: FloatArray, most: int = MAX_POINTS) -> NDArray[np.intp]:
    """Which values to draw: all, or the first and last and the lowest and highest of each stretch. Gaps stay visible."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(
        0, len(values), most // 2, dtype=np.intp
    )  # one stretch fewer than edges leaves room for both ends
    keep = {0, len(values) - 1}
    for begin, end in pairwise(edges):
        stretch = values[begin:end]
        keep |= {
            int(begin + np.argmin(stretch)),
            int(begin + np.argmax(stretch)),
        }  # argmin and argmax answer the first NaN, if any
    return np.array(sorted(keep), dtype=np.intp)


def _curves(steps: Sequence[int], values: Sequence[float], name: str, number: str) -> list[go.Scatter]:
    """The values, faint, and their moving mean. A thinned curve is a line: its extremes as dots would look like a hollow band."""
    y = np.asarray(values, dtype=np.float64)
    reach = max(2, round(len(y) * SMOOTHED_FRACTION / 2))
    mean = smooth(smooth(y, reach), reach)  # twice: a single spike then leaves a small hill and no plateau
    return [
        _trace(steps, y, name, number, meta="raw", mode="markers" if len(y) <= MAX_POINTS else "lines", width=1),
        _trace(steps, mean, f"smoothed over ±{2 * reach:,} steps", number, meta="smooth", mode="lines", width=2),
    ]


def _trace(
    steps: Sequence[int], y: FloatArray, name: str, number: str, *, meta: str, mode: str, width: float
) -> go.Scatter:
    shown = thin(y)
    return go.Scatter(
        x=np.asarray(steps)[shown].tolist(),
        y=_gaps(y[shown]),
        name=name,
        meta=meta,
        mode=mode,
        marker={"size": 4},
        line={"width": width, "simplify": False},
        hovertemplate=f"%{{y:{number}}}",
    )


def _validation(metrics: Metrics) -> go.Scatter:
    """Validation loss; its first and last value are written beside their points."""
    losses = [record.val_loss for record in metrics.validations]
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    ends = {finite[0], finite[-1]} if finite else set()
    return go.Scatter(
        x=[record.step for record in metrics.validations],
        y=_gaps(losses),
        name="validation loss",
        mode="lines+markers+text",
        meta="other",
        line={"width": 1.5, "dash": "dot", "simplify": False},
        marker={"size": 8},
        text=[format_decimal(loss) if i in ends else "" for i, loss in enumerate(losses)],
        textposition=["middle right" if i == 0 else "top left" for i in range(len(losses))],
        cliponaxis=False,
        hovertemplate="%{y:.4f}",
    )


def _by_source(metrics: Metrics) -> list[go.Scatter] | None:
    """The validation loss of each source, sorted as in the newest record; None where there are not several sources."""
    names = dict.fromkeys(name for record in reversed(metrics.validations) for name in record.by_source)
    if len(names) < 2:
        return None
    traces = []
    for i, name in enumerate(names):
        told = [
            (record.step, record.by_source[name].loss) for record in metrics.validations if name in record.by_source
        ]
        traces.append(
            go.Scatter(
                x=[step for step, _ in told],
                y=_gaps(loss for _, loss in told),
                name=html.escape(name),
                mode="lines+markers",
                meta=f"source{i % len(BY_SOURCE['light'])}",
                line={"width": 1.5, "dash": DASHES[i % len(DASHES)], "simplify": False},
                marker={"size": 7, "symbol": SYMBOLS[i % len(SYMBOLS)]},
                hovertemplate="%{y:.4f}",
            )
        )
    return traces


def _event_lane(marks: Mapping[int, Sequence[Event]]) -> go.Scatter:
    """One symbol a step in the strip below the curves, that of the step's last event; hovering tells them all."""
    return go.Scatter(
        x=list(marks),
        y=[0.5] * len(marks),
        yaxis="y2",
        name="events",
        mode="markers",
        meta="mark",
        marker={"size": 9, "symbol": [EVENT_SYMBOLS[events[-1].kind] for events in marks.values()]},
        text=[
            "<br>".join(f"{_label(event)}: {html.escape(event.text)}" for event in events) for events in marks.values()
        ],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
        cliponaxis=False,
    )


def _turns(marks: Mapping[int, Sequence[Event]], last_step: int, *, named: bool) -> dict[str, list[dict[str, object]]]:
    """A dotted line at every stop and resume; on the large chart the line says why it is there."""
    turns = {
        step: [_label(e) for e in events if e.kind in TURNING_POINTS] for step, events in marks.items() if step > 0
    }
    turns = {step: kinds for step, kinds in turns.items() if kinds}
    lines = [
        {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"} for step in turns
    ]
    if not named:
        return {"shapes": lines}
    words = [
        {"x": step, "y": 1, "yref": "paper", "yanchor": "top", "showarrow": False, "text": ", ".join(kinds)}
        | ({"xanchor": "left", "xshift": 4} if step <= last_step / 2 else {"xanchor": "right", "xshift": -4})
        for step, kinds in turns.items()
    ]
    return {"shapes": lines, "annotations": words}


def _label(event: Event) -> str:
    return event.kind.replace("_", " ")


def _figure(
    traces: Sequence[go.Scatter], marks: Mapping[int, Sequence[Event]], last_step: int, *, large: bool = False
) -> go.Figure:
    """Traces over the step, with the run's turning points. The large chart has a strip below for the marks of events."""
    figure = go.Figure(traces)
    margin = 0.015 * max(1, last_step)
    figure.update_layout(
        height=430 if large else 240,
        xaxis={"range": [-margin, last_step + margin], "hoverformat": ",d", "anchor": "y2" if large else "y"},
        xaxis_dtick=1 if last_step < 6 else None,
        showlegend=large,
        margin={"l": 48, "r": 12, "t": 34 if large else 12, "b": 48 if large else 28},
        template=None,
        **_turns(marks, last_step, named=large),
    )
    if large:
        figure.update_xaxes(title={"text": "step"})
        figure.update_layout(
            yaxis={"domain": [0.1, 1]},
            yaxis2={"domain": [0, 0.06], "range": [0, 1], "visible": False, "fixedrange": True},
        )
    return figure


def _template(colors: dict[str, str]) -> go.layout.Template:
    axis = {"gridcolor": colors["grid"], "zeroline": False, "linecolor": colors["grid"], "tickcolor": colors["grid"]}
    return go.layout.Template(
        layout={
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": colors["text"], "size": 12},
            "xaxis": axis,
            "yaxis": axis,
            "hovermode": "x unified",
            "hoverlabel": {"bgcolor": colors["paper"], "bordercolor": colors["grid"]},
            "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "xanchor": "left"},
            "annotationdefaults": {"font": {"color": colors["text"], "size": 12}},
            "shapedefaults": {"line": {"color": colors["mark"], "width": 1, "dash": "dot"}},
        }
    )


def _gaps(values: Iterable[float]) -> list[float | None]:
    """Plotly draws a gap for None; JSON has no NaN."""
    return [float(value) if math.isfinite(value) else None for value in values]
