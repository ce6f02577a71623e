"""The charts of a data set's page as Plotly figures: a panel for each source, all on the same axes. Colours as in `charts.py`."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from data_pipeline.inspect import SourceDescription

_PANEL = 110
_ROW = 34
_GAP = 34
"""Heights in pixels: of the lengths of one source, of a reason with its bar, and between two panels."""

_ABOVE, _BELOW = 60, 48
"""Margins in pixels: the first panel's title and the legend, the axis."""


def lengths(sources: Sequence[SourceDescription]) -> go.Figure:
    """How many documents, and how many of the tokens, are of which length: as shares of the source's."""
    figure = _panels([source.name for source in sources], [_PANEL] * len(sources))
    lows = [entry.low for source in sources for entry in source.lengths]
    every = [1 << k for k in range(min(lows).bit_length() - 1, max(lows).bit_length())]
    most = 0.0
    for row, source in enumerate(sources, start=1):
        there = {entry.low: entry for entry in source.lengths}
        bins = [there.get(low) for low in every]
        words = [f"{low:,} to {2 * low - 1:,} tokens" if low > 1 else "1 token" for low in every]
        for what, role, total in (("documents", "smooth", source.documents), ("tokens", "other", source.tokens)):
            counts = [getattr(entry, what) if entry else 0 for entry in bins]
            most = max(most, *(count / total for count in counts))
            figure.add_bar(
                x=[_short(low) for low in every],
                y=[count / total for count in counts],
                name=f"share of the {what}",
                meta=role,
                customdata=[f"{word}: {count:,} {what}" for word, count in zip(words, counts, strict=True)],
                hovertemplate="%{customdata} (%{y:.1%})<extra></extra>",
                showlegend=row == 1,
                legendgroup=what,
                row=row,
                col=1,
            )
    figure.update_xaxes(type="category", tickangle=0, fixedrange=True)
    figure.update_xaxes(title="tokens in a document, from this many to twice as many", row=len(sources), col=1)
    figure.update_yaxes(range=[0, 1.05 * most], tickformat=".0%", nticks=4, fixedrange=True)
    figure.update_layout(hovermode="closest", bargap=0.25, bargroupgap=0.05)
    return figure


def drops(sources: Sequence[SourceDescription]) -> go.Figure:
    """Dropped documents by reason, the most frequent first: as shares of those read of the source."""
    figure = _panels([source.name for source in sources], [_ROW * len(source.drops) for source in sources])
    most = max(count / source.read for source in sources for count in source.drops.values())
    for row, source in enumerate(sources, start=1):
        reasons = [html.escape(reason) for reason in source.drops]
        figure.add_bar(
            x=[count / source.read for count in source.drops.values()],
            y=reasons,
            orientation="h",
            meta="smooth",
            width=0.3,
            offset=0.06,
            customdata=[f"{count:,} documents" for count in source.drops.values()],
            hovertemplate="%{y}: %{customdata} (%{x:.2%})<extra></extra>",
            showlegend=False,
            row=row,
            col=1,
        )
        # A reason stands above its bar and not beside it: on a telephone there is no room beside.
        figure.add_scatter(
            x=[0] * len(reasons),
            y=reasons,
            mode="text",
            text=[
                f"{reason}  {count:,} ({count / source.read:.2%})"
                for reason, count in zip(reasons, source.drops.values(), strict=True)
            ],
            textposition="top right",
            cliponaxis=False,
            hoverinfo="skip",
            showlegend=False,
            meta="text",
            row=row,
            col=1,
        )
    figure.update_xaxes(range=[0, 1.02 * most], tickformat="~%", nticks=6, fixedrange=True)
    figure.update_yaxes(autorange="reversed", showticklabels=False, showgrid=False, fixedrange=True)
    figure.update_layout(hovermode="closest", margin={"l": 8, "t": _GAP})
    return figure


def _panels(names: Sequence[str], heights: Sequence[int]) -> go.Figure:
    """Empty panels of these heights below each other, each with its name on the left above it."""
    inner = sum(heights) + _GAP * (len(names) - 1)
    figure = make_subplots(
        rows=len(names),
        shared_xaxes=True,
        subplot_titles=[f"<b>{html.escape(name)}</b>" for name in names],
        row_heights=list(heights),
        vertical_spacing=_GAP / inner if len(names) > 1 else 0,
    )
    figure.update_annotations(x=0, xanchor="left", font=None)
    figure.update_layout(
        height=inner + _ABOVE + _BELOW, margin={"l": 48, "r": 12, "t": _ABOVE, "b": _BELOW}, template=None
    )
    figure.update_layout(legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"})
    return figure


def _short(power: int) -> str:
    """A power of two in few characters: `512`, `64k`."""
    exponent = power.bit_length() - 1
    return f"{1 << exponent % 10}{('', 'k', 'M', 'G')[exponent // 10]}"
