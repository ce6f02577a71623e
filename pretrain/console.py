"""Numbers as people read them, the same on the terminal and in the report."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """`8 s`, `3 min 12 s`, `2 h 05 min`, `4 d 07 h`: the two largest units."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02d} h"
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"


def amount(number: float) -> str:
    """Three digits and a unit: `950`, `12.6M`, `1.40T`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            scaled = number / size
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{number:.0f}"


def decimal(number: float, digits: int = 3) -> str:
    """A fixed number of decimals; a number that is not finite says so."""
    return f"{number:.{digits}f}" if math.isfinite(number) else "not finite"
