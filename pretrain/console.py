"""Terminal output that the whole program shares: numbers as text, plain tables, headings, unwrapped lines."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text


def format_duration(seconds: float) -> str:
    """The two largest units: `8 s`, `3 min 12 s`, `2 h 05 min`, `4 d 07 h`."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02d} h"
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"


def format_count(number: float) -> str:
    """Three digits and a unit: `950`, `12.6M`, `1.40T`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            scaled = number / size
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{number:.0f}"


def format_decimal(number: float, digits: int = 3) -> str:
    """A fixed number of decimals, or `not finite`."""
    return f"{number:.{digits}f}" if math.isfinite(number) else "not finite"


def format_memory(n_bytes: float, digits: int = 2) -> str:
    """Memory in binary units, as GPUs are specified: `8.00 GiB`, `512.00 MiB`, `0.25 KiB`."""
    exponent, unit = next((item for item in ((30, "GiB"), (20, "MiB")) if n_bytes >= 2 ** item[0]), (10, "KiB"))
    return f"{n_bytes / 2**exponent:,.{digits}f} {unit}"


def format_disk_size(n_bytes: int) -> str:
    """Disk space in decimal units, rounded down: `1.5 GB`, `2.0 MB`, `900,000 bytes`."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if n_bytes >= size:
            return f"{n_bytes // (size // 10) / 10:,.1f} {unit}"
    return f"{n_bytes:,} bytes"


def print_line(console: Console, text: str | Text, style: str = "") -> None:
    """Print one line without wrapping, markup or highlighting: what it names can be copied from a log."""
    console.print(Text(text) if isinstance(text, str) else text, style=style or None, soft_wrap=True)


def print_heading(console: Console, title: str, note: str = "") -> None:
    """Print an empty line, then one line: the title in bold, the note dim."""
    console.print()
    print_line(console, Text.assemble((title, "bold"), (f"  {note}" if note else "", "dim")))


def plain_table(*headings: str, text_columns: int = 1, wrap_numbers: bool = False) -> Table:
    """Return a table without lines: `text_columns` columns of text, then columns of numbers aligned to the right.

    Args:
        headings: one for each column.
        text_columns: how many of the first columns hold text, which wraps where the terminal is too narrow.
        wrap_numbers: let numbers wrap as well. Without it rich cuts them off once the text cannot get narrower.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in headings[:text_columns]:
        table.add_column(heading, overflow="fold")
    for heading in headings[text_columns:]:
        table.add_column(heading, justify="right", overflow="fold", no_wrap=not wrap_numbers)
    return table
