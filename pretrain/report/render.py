"""Turn a template and its content into a page: one HTML file that needs neither network nor fonts.

A page is about 2 MB. Plotly's own script of 4.8 MB is embedded gzipped, and the browser unpacks it
(DecompressionStream, in all browsers since 2023). To add a page, write `templates/NAME.html` that extends `base.html`
and a module that calls `render_page("NAME.html", ...)`.
"""

from __future__ import annotations

import base64
import gzip
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from pretrain.console import format_duration
from pretrain.report.themes import chart_themes


@dataclass(frozen=True)
class Tile:
    """One of the numbers at the top of a page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first columns hold text and whose other columns hold numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    has_total: bool = False
    """Whether the last of several rows is their sum."""


Settings = Mapping[str, Sequence[tuple[str, str, bool]]]
"""Sections of settings; a setting is (name, value, whether it differs from the default)."""


def render_page(
    template: str,
    *,
    title: str,
    state: str,
    subtitle: str,
    source: str,
    figures: Mapping[str, go.Figure],
    **content: object,
) -> str:
    """Return a whole page as HTML. Every text is escaped.

    Args:
        template: a file in `templates/` that extends `base.html`.
        title: heading of the page.
        state: a word or two beside the title.
        subtitle: a line below the title.
        source: the files that the page was made from, for the footer.
        figures: the charts. The one named `x` is drawn where the template has `chart("x", ...)`.
        content: what the template's own blocks use.
    """
    loader = PackageLoader("pretrain.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "duration": format_duration,
        "thousands": lambda number: f"{number:,}",
        "timestamp": format_timestamp,
    }
    css, js = (Markup(loader.get_source(environment, name)[0]) for name in ("page.css", "page.js"))
    charts = {name: figure.to_plotly_json() for name, figure in figures.items()}
    return environment.get_template(template).render(
        title=title,
        state=state,
        subtitle=subtitle,
        source=source,
        written=time.time(),
        css=css,
        js=js,
        figures=script_json({"charts": charts, "themes": chart_themes()}),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
        **content,
    )


def format_timestamp(unix_time: float) -> str:
    """Return a time to the second, in UTC."""
    return datetime.fromtimestamp(unix_time, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def script_json(data: object) -> Markup:
    """Return JSON for a script element. It holds no `<`, so that no text in it can end the element."""
    return Markup(str(to_json_plotly(data)).replace("<", "\\u003c"))
