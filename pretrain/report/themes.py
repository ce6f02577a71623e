"""The light and the dark theme of the charts.

Figures hold no colours: a trace names a colour role (a heat map: a colour scale) in `meta`, and page.js looks it up.
"""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

ROLE_COLORS = {
    "light": {
        "text": "#5b6474",
        "grid": "#e8eaef",
        "paper": "#ffffff",
        "faint": "#8db4e2",
        "primary": "#1f5fae",
        "secondary": "#c2410c",
        "mark": "#8a93a3",
    },
    "dark": {
        "text": "#9aa4b5",
        "grid": "#2a303b",
        "paper": "#171b22",
        "faint": "#3d6390",
        "primary": "#7db4f5",
        "secondary": "#fb9a5b",
        "mark": "#6b7587",
    },
}
"""The primary blue and the secondary orange differ for every kind of colour vision. Their contrast to the paper is 3:1
or more."""

SOURCE_COLORS = {
    "light": ("#1f5fae", "#c2410c", "#0f766e", "#a21caf", "#7a5c00", "#be123c", "#15803d", "#475569"),
    "dark": ("#7db4f5", "#fb9a5b", "#5eead4", "#e879f9", "#facc15", "#fb7185", "#86efac", "#cbd5e1"),
}
"""Colours of the curves of data sources. Not everybody can tell eight colours apart, so each curve also has a dash and
a symbol."""

N_SOURCE_COLORS = len(SOURCE_COLORS["light"])

LAYER_COLORS = {
    "light": ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f8f80", "#2a9d60", "#4d9a2f"),
    "dark": ("#8ea4f0", "#6fb2f2", "#4cc3e6", "#3fd1cb", "#4ade9f", "#86e068", "#c3e345", "#fde725"),
}
"""Colours of curves of layers, from the first to the last: the order shows in hue and lightness."""

N_LAYER_COLORS = len(LAYER_COLORS["light"])

COLOR_SCALES = {
    "light": {"load": ((0, "#8a2c0d"), (0.125, "#e08a5b"), (0.25, "#f1f2f4"), (0.5, "#6ea3dd"), (1, "#123a70"))},
    "dark": {"load": ((0, "#ff9a5c"), (0.125, "#8f522c"), (0.25, "#242a33"), (0.5, "#3d74b4"), (1, "#b5d8ff"))},
}
"""Colours of heat maps. `load` runs from 0 to 4 times the mean: orange has too little, blue too much."""


def chart_themes() -> dict[str, dict[str, object]]:
    """Return for each theme the Plotly template of every chart, and the colour of each role."""
    return {
        name: {
            "template": _plotly_template(colors).to_plotly_json(),
            "colors": colors
            | {f"source{i}": color for i, color in enumerate(SOURCE_COLORS[name])}
            | {f"layer{i}": color for i, color in enumerate(LAYER_COLORS[name])},
            "scales": COLOR_SCALES[name],
        }
        for name, colors in ROLE_COLORS.items()
    }


def _plotly_template(colors: Mapping[str, str]) -> go.layout.Template:
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
            "sliderdefaults": {
                "bgcolor": colors["mark"],
                "activebgcolor": colors["primary"],
                "bordercolor": colors["mark"],
                "tickcolor": colors["mark"],
                "font": {"color": colors["text"], "size": 12},
            },
            "annotationdefaults": {"font": {"color": colors["text"], "size": 12}},
            "shapedefaults": {"line": {"color": colors["mark"], "width": 1, "dash": "dot"}},
        }
    )
