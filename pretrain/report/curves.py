"""Curves of any length for a chart: a moving mean that survives spikes, and fewer points that keep every extreme."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 2000
"""Most points of a drawn curve. A longer one keeps the lowest and the highest value of each section, so that no spike
is lost."""

FloatArray = NDArray[np.float64]


def smooth(values: FloatArray, radius: int) -> FloatArray:
    """Return the mean over each value and up to `radius` neighbours on each side.

    Near the start the window shrinks on both sides, so that it does not bend the steep beginning of a loss curve. Near
    the end it only misses the values that are not there. Values that are not finite are left out of every mean and stay
    gaps.
    """
    finite = np.isfinite(values)
    index = np.arange(len(values))
    width = np.minimum(radius, index)
    low, high = index - width, np.minimum(index + width + 1, len(values))
    total = _window_sums(np.where(finite, values, 0.0), low, high)
    count = _window_sums(finite.astype(np.float64), low, high)
    return np.where(finite, total / np.maximum(1, count), np.nan)


def _window_sums(values: FloatArray, low: NDArray[np.intp], high: NDArray[np.intp]) -> FloatArray:
    """Return the sum of values[low:high] for each pair of `low` and `high`.

    Differences of one cumulative sum would be faster, but wrong: after a spike of 1e20, fp64 has no digits left for
    losses around 3. So each window is added up from sums of 1, 2, 4, ... values, one for each bit of its length.
    """
    sums, begin, width, length = np.zeros(len(low)), low.copy(), high - low, 1
    while len(values) and length <= width.max():  # values[i] is now the sum of `length` values from i on
        has_bit = (width & length) > 0
        sums[has_bit] += values[begin[has_bit]]
        begin[has_bit] += length
        values, length = values[:-length] + values[length:], 2 * length
    return sums


def thin(values: FloatArray, max_points: int = MAX_POINTS) -> NDArray[np.intp]:
    """Return the indices of the values to draw: all, or the two ends and the lowest and highest of each section.

    Gaps stay visible.
    """
    if len(values) <= max_points:
        return np.arange(len(values))
    # One section fewer than edges leaves room for both ends.
    edges = np.linspace(0, len(values), max_points // 2, dtype=np.intp)
    keep = {0, len(values) - 1}
    for begin, end in pairwise(edges):
        section = values[begin:end]
        # Where the section holds a NaN, argmin and argmax return the first one.
        keep |= {int(begin + np.argmin(section)), int(begin + np.argmax(section))}
    return np.array(sorted(keep), dtype=np.intp)


def nan_to_gaps(values: Iterable[float]) -> list[float | None]:
    """Replace values that are not finite by None, which Plotly draws as a gap. JSON has no NaN."""
    return [float(value) if math.isfinite(value) else None for value in values]
