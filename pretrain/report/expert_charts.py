"""The charts of a run's experts: curves by layer over the steps, and heat maps of the load of each expert.

Shape suffixes: N records, M layers with experts, E experts, R sources.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from pretrain.report.curves import MAX_POINTS, FloatArray, nan_to_gaps, thin
from pretrain.report.run_charts import DASHES, SYMBOLS, Timeline, curve, dots_or_line, figure_over_steps, smooth_twice
from pretrain.report.themes import N_LAYER_COLORS, N_SOURCE_COLORS
from pretrain.runs.routing import kl_to_uniform, load_over_mean

MAX_LAYER_CURVES = N_LAYER_COLORS
"""Up to so many layers have a curve each. Of more, three curves show the highest, the median and the lowest."""

MAX_SNAPSHOTS = 12
"""Validations that the heat map over time shows: the first, the last, and some between them."""

MAX_LOAD = 4
"""Load over the mean at which the colours end."""

SourceCounts = Mapping[str, Mapping[int, Sequence[int]]]
"""For each source and layer, how often each expert was chosen."""


def layer_figure(
    steps: Sequence[int], layers: Sequence[int], values_NM: FloatArray, timeline: Timeline, *, is_large: bool = False
) -> go.Figure:
    """Return curves over the steps, smoothed, from values of each layer. Faint dots are the highest layer's."""
    highest = curve(steps, values_NM.max(1), "highest layer", ".4~f", role="faint", mode=dots_or_line(steps), width=1)
    if len(layers) <= MAX_LAYER_CURVES:
        n_colors_apart = (N_LAYER_COLORS - 1) / max(1, len(layers) - 1)
        smoothed = [
            _smoothed(steps, values_NM[:, i], f"layer {layer}", f"layer{int(i * n_colors_apart)}", i)
            for i, layer in enumerate(layers)
        ]
    else:
        smoothed = [
            _smoothed(steps, values_NM.max(1), "highest layer, smoothed", "secondary", 0),
            _smoothed(steps, np.median(values_NM, 1), "median layer, smoothed", "primary", 1),
            _smoothed(steps, values_NM.min(1), "lowest layer, smoothed", "mark", 2),
        ]
    figure = figure_over_steps([highest, *smoothed], timeline)
    if is_large:
        figure.update_layout(height=330, showlegend=True, margin={"t": 34})
    return figure


def _smoothed(steps: Sequence[int], y: FloatArray, name: str, role: str, i: int) -> go.Scatter:
    mean = smooth_twice(y)[0]
    shown = thin(mean, MAX_POINTS // 4)
    return go.Scatter(
        x=np.asarray(steps)[shown].tolist(),
        y=nan_to_gaps(np.round(mean[shown], 4)),
        name=name,
        meta=role,
        mode="lines" if len(steps) > 1 else "markers",
        line={"width": 2, "dash": DASHES[i % len(DASHES)], "simplify": False},
        hovertemplate="%{y:.4~f}",
    )


def load_map(snapshots: Mapping[int, Mapping[int, Sequence[int]]]) -> go.Figure:
    """Return the load of every expert of every layer, with a slider over the validations.

    Args:
        snapshots: after a step, for each layer how often each expert was chosen.
    """
    kept = np.unique(np.linspace(0, len(snapshots) - 1, min(len(snapshots), MAX_SNAPSHOTS)).round().astype(int))
    shown = [list(snapshots.items())[i] for i in kept]
    layers = list(shown[-1][1])
    maps = {f"{step:,}": load_over_mean(list(by_layer.values())) for step, by_layer in shown}
    return _heat_maps(
        maps,
        rows=layers,
        row_title="layer",
        hover="layer %{y}, expert %{x}: %{z:.2f} times the mean load<extra></extra>",
        slider="after step ",
        shown=len(maps) - 1,
    )


def source_map(by_source: SourceCounts) -> go.Figure:
    """Return the load of each expert by the tokens of each source, with a slider over the layers.

    It begins at the layer whose experts differ the most between sources.
    """
    names, layers = list(by_source), list(next(iter(by_source.values())))
    load_MRE = np.stack([[load_over_mean(by_source[name][layer]) for name in names] for layer in layers])
    return _heat_maps(
        {f"{layer}": load_MRE[i] for i, layer in enumerate(layers)},
        rows=[html.escape(name) for name in names],
        row_title="",
        hover="%{y}, expert %{x}: %{z:.2f} times the mean load<extra></extra>",
        slider="layer ",
        shown=int(load_MRE.std(1).mean(1).argmax()),
    )


def specialisation_figure(by_source: SourceCounts) -> go.Figure:
    """Return the KL divergence of the experts' load from an even one, by layer, of each source and of all tokens."""
    layers = list(next(iter(by_source.values())))
    counts_RME = np.asarray([[counts[layer] for layer in layers] for counts in by_source.values()])
    figure = go.Figure()
    for i, name in enumerate(by_source):
        _add_kl(figure, layers, counts_RME[i], html.escape(name), i)
    _add_kl(figure, layers, counts_RME.sum(0), "all together", None)
    figure.update_layout(
        height=300,
        template=None,
        xaxis={"title": {"text": "layer"}, "tickvals": layers if len(layers) <= 16 else None, "hoverformat": "d"},
        yaxis={"rangemode": "tozero", "title": {"text": "nats"}},
        showlegend=True,
        margin={"l": 56, "r": 12, "t": 34, "b": 44},
    )
    return figure


def _add_kl(figure: go.Figure, layers: Sequence[int], counts_ME: FloatArray, name: str, i: int | None) -> None:
    figure.add_scatter(
        x=list(layers),
        y=np.round(kl_to_uniform(counts_ME), 4).tolist(),
        name=name,
        mode="lines+markers",
        meta="mark" if i is None else f"source{i % N_SOURCE_COLORS}",
        line={"width": 1.5, "dash": "dot" if i is None else DASHES[i % len(DASHES)]},
        marker={"size": 7, "symbol": "circle-open" if i is None else SYMBOLS[i % len(SYMBOLS)]},
        hovertemplate="%{y:.4f}",
    )


def _heat_maps(
    maps: Mapping[str, FloatArray], *, rows: Sequence[int | str], row_title: str, hover: str, slider: str, shown: int
) -> go.Figure:
    """Return heat maps of load over mean, of which a slider shows one. Their columns are experts."""
    n_rows, n_experts = next(iter(maps.values())).shape
    gap = 1 if n_rows * n_experts <= 1024 else 0
    figure = go.Figure(
        [
            go.Heatmap(
                x=list(range(n_experts)),
                y=list(rows),
                z=np.round(load, 2).tolist(),
                zmin=0,
                zmax=MAX_LOAD,
                meta="load",
                visible=i == shown,
                xgap=gap,
                ygap=gap,
                hovertemplate=hover,
                colorbar={
                    "thickness": 12,
                    "outlinewidth": 0,
                    "tickvals": list(range(MAX_LOAD + 1)),
                    "ticktext": [*(f"{load} ×" for load in range(MAX_LOAD)), f"≥ {MAX_LOAD} ×"],
                },
            )
            for i, load in enumerate(maps.values())
        ]
    )
    height = min(520, max(150, 26 * n_rows))
    top, bottom = 12, 40 + (70 if len(maps) > 1 else 0)
    figure.update_layout(
        height=top + height + bottom,
        template=None,
        hovermode="closest",
        margin={"l": 56, "r": 12, "t": top, "b": bottom},
        xaxis={"title": {"text": "expert", "standoff": 4}, "dtick": 1 if n_experts <= 32 else None, "showgrid": False},
        yaxis={
            "autorange": "reversed",
            "title": {"text": row_title},
            "tickvals": list(rows) if n_rows <= 24 else None,
            "showgrid": False,
            "automargin": True,
        },
    )
    if len(maps) > 1:
        figure.update_layout(sliders=[_slider(list(maps), slider, shown, height)])
    return figure


def _slider(labels: Sequence[str], prefix: str, shown: int, height: int) -> dict[str, object]:
    """Return a slider below the chart that makes one trace visible."""
    return {
        "active": shown,
        "currentvalue": {"prefix": prefix, "xanchor": "left"},
        "x": 0,
        "len": 1,
        "y": -40 / height,
        "yanchor": "top",
        "pad": {"t": 0, "b": 0},
        "steps": [
            {"method": "restyle", "label": label, "args": [{"visible": [j == i for j in range(len(labels))]}]}
            for i, label in enumerate(labels)
        ],
    }
