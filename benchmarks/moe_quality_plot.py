"""Draws the results of `benchmarks.moe_quality` as SVG: load over the steps, losses beside the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

WIDTH, HEIGHT, TOP, BOTTOM = 940, 360, 56, 300
LOAD_LEFT, LOAD_RIGHT = 50, 560
LOSS_LEFT, LOSS_RIGHT = 690, 920
COLOURS = {
    "global batch": "#1f6feb",
    "sequence": "#0f766e",
    "microbatch": "#7c3aed",
    "bias": "#c2410c",
    "none": "#57606a",
}
POINTS = 80
"""Points of a curve; each is a mean over the steps around it."""


def draw(loads: Mapping[str, Sequence[float]], losses: Mapping[tuple[int, bool], float]) -> str:
    """Return the drawing.

    Args:
        loads: {balancing method: load of each step}.
        losses: {(seed, has experts): validation loss}.
    """
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="12" fill="#24292f">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            *load_panel(loads),
            *loss_panel(losses),
            "</svg>",
            "",
        ]
    )


def load_panel(loads: Mapping[str, Sequence[float]]) -> list[str]:
    """Return a curve for each method, on an axis from 1 (even) to 4 (two experts get all)."""

    def y(load: float) -> float:
        return BOTTOM - (load - 1) / 3 * (BOTTOM - TOP)

    parts = [title(LOAD_LEFT, "Load of the busiest expert / mean, over the steps")]
    parts += [grid(LOAD_LEFT, LOAD_RIGHT, y(load), f"{load:g}") for load in (1, 1.5, 2, 3, 4)]
    for i, (method, values) in enumerate(loads.items()):
        colour = COLOURS[method]
        points = [
            (LOAD_LEFT + (at + 0.5) / len(means) * (LOAD_RIGHT - LOAD_LEFT), y(value))
            for means in [chunk_means(values)]
            for at, value in enumerate(means)
        ]
        path = " ".join(f"{x:.1f},{height:.1f}" for x, height in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        x = LOAD_LEFT + 100 * i
        parts.append(f'<line x1="{x}" x2="{x + 16}" y1="332" y2="332" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 21}" y="336">{method}</text>')
    n_steps = max((len(values) for values in loads.values()), default=0)
    parts.append(f'<text x="{LOAD_RIGHT}" y="{BOTTOM + 16}" text-anchor="end">step {n_steps}</text>')
    return parts


def chunk_means(values: Sequence[float]) -> list[float]:
    """Return the means of at most POINTS parts of about equal length."""
    n = min(POINTS, len(values))
    return [mean(values[len(values) * i // n : len(values) * (i + 1) // n]) for i in range(n)]


def loss_panel(losses: Mapping[tuple[int, bool], float]) -> list[str]:
    """Return two dots for each seed that has both losses, joined by a line."""
    seeds = sorted(seed for seed, has_experts in losses if has_experts and (seed, False) in losses)
    parts = [title(LOSS_LEFT, "Validation loss, nats a token")]
    if not seeds:
        return parts
    shown = [losses[seed, has_experts] for seed in seeds for has_experts in (False, True)]
    low, high = min(shown) - 0.01, max(shown) + 0.01

    def y(loss: float) -> float:
        return BOTTOM - (loss - low) / (high - low) * (BOTTOM - TOP)

    ticks = [low + (high - low) * i / 4 for i in range(5)]
    parts += [grid(LOSS_LEFT, LOSS_RIGHT, y(tick), f"{tick:.3f}") for tick in ticks]
    for i, seed in enumerate(seeds):
        x = LOSS_LEFT + (i + 0.5) / len(seeds) * (LOSS_RIGHT - LOSS_LEFT)
        dense, experts = y(losses[seed, False]), y(losses[seed, True])
        parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{dense:.1f}" y2="{experts:.1f}" stroke="#d0d7de"/>')
        parts.append(f'<circle cx="{x:.0f}" cy="{dense:.1f}" r="5" fill="{COLOURS["none"]}"/>')
        parts.append(f'<circle cx="{x:.0f}" cy="{experts:.1f}" r="5" fill="{COLOURS["global batch"]}"/>')
        parts.append(f'<text x="{x:.0f}" y="{BOTTOM + 16}" text-anchor="middle">seed {seed}</text>')
    for x, colour, text in (
        (LOSS_LEFT, COLOURS["none"], "dense"),
        (LOSS_LEFT + 90, COLOURS["global batch"], "experts"),
    ):
        parts.append(f'<circle cx="{x + 6}" cy="332" r="5" fill="{colour}"/><text x="{x + 17}" y="336">{text}</text>')
    return parts


def title(x: int, text: str) -> str:
    """Return the heading of a panel."""
    return f'<text x="{x}" y="30" font-size="15" font-weight="600">{text}</text>'


def grid(left: int, right: int, y: float, label: str) -> str:
    """Return a horizontal line with its value."""
    return (
        f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d0d7de"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#57606a">{label}</text>'
    )
