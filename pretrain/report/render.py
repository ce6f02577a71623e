"""The frame of our pages: one HTML file that needs nothing else, neither network nor fonts.

About 2 MB: Plotly's own script is 4.8 MB, and travels compressed; the browser unpacks it (DecompressionStream, in all since 2023).
"""

from __future__ import annotations

import base64
import gzip
import html
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from string import Template

import plotly.graph_objects as go
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

Themes = Mapping[str, Mapping[str, object]]
Row = tuple[str, ...]


def page(
    title: str, state: str, subtitle: str, body: str, source: str, figures: Mapping[str, go.Figure], themes: Themes
) -> str:
    """A whole page.

    Args:
        title: its heading.
        state: a word or two beside it.
        subtitle: a line below it.
        body: HTML; everything else is text.
        source: what it was made from, for the footer.
        figures: what to draw into the `chart` of each name.
        themes: `light` and `dark`: Plotly's template, and the colour of each role (a trace names its role in `meta`).
    """
    assets = files("pretrain.report")
    charts = {name: figure.to_plotly_json() for name, figure in figures.items()}
    return Template(assets.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        css=assets.joinpath("page.css").read_text(encoding="utf-8"),
        js=assets.joinpath("page.js").read_text(encoding="utf-8"),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
        figures=_script_json({"charts": charts, "themes": themes}),
        title=text(title),
        state=text(state),
        subtitle=text(subtitle),
        body=body,
        written=when(datetime.now(tz=UTC).timestamp()),
        source=text(source),
    )


def card(name: str, title: str, body: str, note: str = "") -> str:
    """A part of the page with a heading; `body` is HTML."""
    remark = f'<p class="note">{text(note)}</p>' if note else ""
    return f'<section class="card" id="{name}"><h2>{text(title)}</h2>{remark}{body}</section>'


def chart(name: str, label: str) -> str:
    """Where the figure of that name is drawn; `label` tells what it shows."""
    return f'<div class="chart" id="chart-{name}" role="img" aria-label="{text(label)}"></div>'


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """What a reader looks for first: name, value, a remark."""
    return f'<div class="tiles">{"".join(_tile(*figure) for figure in figures)}</div>'


def notices(sentences: Iterable[str]) -> str:
    """What a reader should not miss."""
    return "".join(f'<p class="notice">{text(sentence)}</p>' for sentence in sentences)


def table(head: Row, rows: Sequence[Row], words: int = 1, *, total: bool = False) -> str:
    """Columns of words, then columns of numbers; with `total` the last of several rows is their sum."""

    def row(cells: Row, kind: str, mark: str = "") -> str:
        marked = (f"<{kind}{' class=number' * (i >= words)}>{text(cell)}</{kind}>" for i, cell in enumerate(cells))
        return f"<tr{mark}>{''.join(marked)}</tr>"

    body = "".join(
        row(cells, "td", " class=total" * (total and i == len(rows) - 1 > 0)) for i, cells in enumerate(rows)
    )
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"


def settings(sections: Mapping[str, Iterable[tuple[str, str, bool]]]) -> str:
    """Sections that open and close, of (name, value, whether it differs from the default)."""
    return "".join(
        f"<details><summary>{text(name)}</summary><dl>{_terms(terms)}</dl></details>"
        for name, terms in sections.items()
    )


def text(plain: str) -> str:
    """Text as HTML."""
    return html.escape(plain)


def when(unix: float) -> str:
    """A moment, to the second."""
    return datetime.fromtimestamp(unix, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _terms(terms: Iterable[tuple[str, str, bool]]) -> str:
    rows = []
    for name, value, changed in terms:
        mark = ' class="changed"' if changed else ""
        rows.append(f"<dt{mark}>{text(name)}</dt><dd{mark}>{text(value)}</dd>")
    return "".join(rows)


def _tile(name: str, value: str, remark: str) -> str:
    rows = (("name", name), ("value", value), ("remark", remark))
    lines = "".join(f'<div class="{kind}">{text(words)}</div>' for kind, words in rows)
    return f'<div class="tile">{lines}</div>'


def _script_json(data: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return str(to_json_plotly(data)).replace("<", "\\u003c")
