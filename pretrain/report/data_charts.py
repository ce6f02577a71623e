"""The charts of a data set as Plotly figures: one panel for each source, all on the same axes.

Colours come from `themes`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from data_pipeline.inspect import SourceDescription

_LENGTHS_HEIGHT = 110
_REASON_HEIGHT = 34
_PANEL_GAP = 34
"""Heights in pixels: a histogram of lengths, a drop reason with its bar, the space between two panels."""

_TOP_MARGIN, _BOTTOM_MARGIN = 60, 48
"""Pixels above the first panel, for its title and the legend, and below the last one, for the axis."""


def lengths_figure(sources: Sequence[SourceDescription]) -> go.Figure:
    """Return the distribution of document lengths, as shares of a source's documents and of its tokens."""
    figure = _panels([source.name for source in sources], [_LENGTHS_HEIGHT] * len(sources))
    lows = [entry.low for source in sources for entry in source.lengths]
    bins = [1 << k for k in range(min(lows).bit_length() - 1, max(lows).bit_length())]
    bin_labels = [f"{low:,} to {2 * low - 1:,} tokens" if low > 1 else "1 token" for low in bins]
    largest_share = 0.0
    for row, source in enumerate(sources, start=1):
        by_low = {entry.low: entry for entry in source.lengths}
        entries = [by_low.get(low) for low in bins]
        for unit, role, total in (("documents", "primary", source.documents), ("tokens", "secondary", source.tokens)):
            counts = [getattr(entry, unit) if entry else 0 for entry in entries]
            largest_share = max(largest_share, *(count / total for count in counts))
            figure.add_bar(
                x=[_short_power(low) for low in bins],
                y=[count / total for count in counts],
                name=f"share of the {unit}",
                meta=role,
                customdata=[f"{label}: {count:,} {unit}" for label, count in zip(bin_labels, counts, strict=True)],
                hovertemplate="%{customdata} (%{y:.1%})<extra></extra>",
                showlegend=row == 1,
                legendgroup=unit,
                row=row,
                col=1,
            )
    figure.update_xaxes(type="category", tickangle=0, fixedrange=True)
    figure.update_xaxes(title="tokens in a document, from this many to twice as many", row=len(sources), col=1)
    figure.update_yaxes(range=[0, 1.05 * largest_share], tickformat=".0%", nticks=4, fixedrange=True)
    figure.update_layout(hovermode="closest", bargap=0.25, bargroupgap=0.05)
    return figure


def drops_figure(sources: Sequence[SourceDescription]) -> go.Figure:
    """Return dropped documents by reason, the most frequent first, as shares of the documents read from the source."""
    figure = _panels([source.name for source in sources], [_REASON_HEIGHT * len(source.drops) for source in sources])
    largest_share = max(count / source.read for source in sources for count in source.drops.values())
    for row, source in enumerate(sources, start=1):
        reasons = [html.escape(reason) for reason in source.drops]
        counts = list(source.drops.values())
        figure.add_bar(
            x=[count / source.read for count in counts],
            y=reasons,
            orientation="h",
            meta="primary",
            width=0.3,
            offset=0.06,
            customdata=[f"{count:,} documents" for count in counts],
            hovertemplate="%{y}: %{customdata} (%{x:.2%})<extra></extra>",
            showlegend=False,
            row=row,
            col=1,
        )
        # A reason stands above its bar: beside it there is no room on a phone.
        figure.add_scatter(
            x=[0] * len(reasons),
            y=reasons,
            mode="text",
            text=[
                f"{reason}  {count:,} ({count / source.read:.2%})"
                for reason, count in zip(reasons, counts, strict=True)
            ],
            textposition="top right",
            cliponaxis=False,
            hoverinfo="skip",
            showlegend=False,
            meta="text",
            row=row,
            col=1,
        )
    figure.update_xaxes(range=[0, 1.02 * largest_share], tickformat="~%", nticks=6, fixedrange=True)
    figure.update_yaxes(autorange="reversed", showticklabels=False, showgrid=False, fixedrange=True)
    figure.update_layout(hovermode="closest", margin={"l": 8, "t": _PANEL_GAP})
    return figure


def _panels(names: Sequence[str], heights: Sequence[int]) -> go.Figure:
    """Return empty panels of these heights in a column, each with its name above it."""
    inner_height = sum(heights) + _PANEL_GAP * (len(names) - 1)
    figure = make_subplots(
        rows=len(names),
        shared_xaxes=True,
        subplot_titles=[f"<b>{html.escape(name)}</b>" for name in names],
        row_heights=list(heights),
        vertical_spacing=_PANEL_GAP / inner_height if len(names) > 1 else 0,
    )
    figure.update_annotations(x=0, xanchor="left", font=None)
    figure.update_layout(
        height=inner_height + _TOP_MARGIN + _BOTTOM_MARGIN,
        margin={"l": 48, "r": 12, "t": _TOP_MARGIN, "b": _BOTTOM_MARGIN},
        template=None,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
    )
    return figure


def _short_power(power: int) -> str:
    """Return a power of two in few characters: `512`, `64k`."""
    exponent = power.bit_length() - 1
    return f"{1 << exponent % 10}{('', 'k', 'M', 'G')[exponent // 10]}"
