"""Draws docs/architecture.svg: `python -m docs.draw_architecture`.

Positions are in the table below; arrows come from the imports. An arrow says that one room imports another. A room may
also import what its arrows lead to through others, so that few arrows are enough (a transitive reduction).
`tests/test_docs.py` compares the drawing with the imports.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import grimp
import networkx as nx

DRAWING = Path(__file__).with_name("architecture.svg")
PACKAGES = ("pretrain", "parallel", "data_pipeline", "launch")
SHARED = "shared"
"""The single files of `pretrain`: errors, console and the like. They are drawn as one room."""

WIDTH, HEIGHT, ROOM_WIDTH, ROOM_HEIGHT = 940, 896, 172, 54
BATCH, CHECKPOINT = "#1f6feb", "#c2410c"


@dataclass(frozen=True)
class Room:
    """A box of the drawing: its left upper corner, what it does, and its stops on the two ways."""

    x: int
    y: int
    text: str
    batch: str = ""
    checkpoint: str = ""


ROOMS = {
    "pretrain.cli": Room(384, 20, "commands and their help"),
    "pretrain.train": Room(384, 106, "run, loop, batches, resume", batch="3", checkpoint="A"),
    "pretrain.convert": Room(20, 106, "experts from dense, GQA"),
    "pretrain.inference": Room(120, 192, "generate text", checkpoint="F"),
    "pretrain.report": Room(384, 192, "HTML pages", batch="8"),
    "pretrain.tracking": Room(648, 192, "recorder, display, loggers", batch="7"),
    "pretrain.setup": Room(20, 278, "auto values, layout, engine", checkpoint="D"),
    "pretrain.checkpoint": Room(640, 364, "save, verify, load, prune", checkpoint="C"),
    "pretrain.runs": Room(436, 364, "run directory, records"),
    "pretrain.optim": Room(20, 450, "AdamW, Muon, schedules", batch="6"),
    "pretrain.estimate": Room(320, 450, "memory, traffic, FLOPs"),
    "pretrain.model": Room(115, 536, "layers, loss, architectures", batch="5"),
    "pretrain.config": Room(115, 622, "settings, presets, loading"),
    SHARED: Room(300, 708, "errors, console, signals, ..."),
    "parallel": Room(560, 812, "layout, mesh, engine", batch="4", checkpoint="B E"),
    "data_pipeline": Room(300, 812, "text, shards, batches", batch="1 2"),
    "launch": Room(760, 812, "starts processes"),
}


def room_of(module: str) -> str:
    """Return the room a module belongs to."""
    package, *rest = module.split(".")
    if package != "pretrain":
        return package
    if not rest or rest[0] == "__main__":
        return "pretrain.cli"
    return f"pretrain.{rest[0]}" if f"pretrain.{rest[0]}" in ROOMS else SHARED


def imports() -> set[tuple[str, str]]:
    """Return every pair of rooms of which the first imports the second."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    pairs = ((room_of(a), room_of(b)) for a in graph.modules for b in graph.find_modules_directly_imported_by(a))
    return {(a, b) for a, b in pairs if a != b}


def arrows(edges: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the fewest arrows from which all imports follow.

    Raises:
        networkx.NetworkXError: the imports go in a circle.
    """
    return sorted(nx.transitive_reduction(nx.DiGraph(set(edges))).edges)


def draw(edges: list[tuple[str, str]]) -> str:
    """Return the SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif">',
        "<title>The packages, who imports whom, and the way of a batch and of a checkpoint through them</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#57606a"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        '<rect x="6" y="6" width="828" height="772" rx="10" fill="#f6f8fa" stroke="#d0d7de"/>',
        '<text x="822" y="30" font-size="14" text-anchor="end" fill="#57606a">pretrain</text>',
        *(arrow(edge, edges) for edge in edges),
        *(box(name, room) for name, room in ROOMS.items()),
        *legend(),
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def arrow(edge: tuple[str, str], edges: list[tuple[str, str]]) -> str:
    """Return the curve of one import, from the lower side of a room to the upper side of another."""
    start, end = ROOMS[edge[0]], ROOMS[edge[1]]
    leaving = sorted((b for a, b in edges if a == edge[0]), key=lambda name: ROOMS[name].x)
    arriving = sorted((a for a, b in edges if b == edge[1]), key=lambda name: ROOMS[name].x)
    x0 = start.x + ROOM_WIDTH * (leaving.index(edge[1]) + 1) / (len(leaving) + 1)
    x1 = end.x + ROOM_WIDTH * (arriving.index(edge[0]) + 1) / (len(arriving) + 1)
    y0, y1 = start.y + ROOM_HEIGHT, end.y - 1
    bend = (y1 - y0) / 2
    return (
        f'<path data-from="{edge[0]}" data-to="{edge[1]}" fill="none" stroke="#57606a" stroke-width="1.3" '
        f'marker-end="url(#head)" d="M{x0:.0f} {y0}C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1}"/>'
    )


def box(name: str, room: Room) -> str:
    """Return a room with its name, what it does and its stops."""
    label = "shared modules" if name == SHARED else name.removeprefix("pretrain.")
    middle = room.x + ROOM_WIDTH // 2
    stops = [(stop, BATCH) for stop in room.batch.split()] + [(stop, CHECKPOINT) for stop in room.checkpoint.split()]
    title, text = f'x="{middle}" y="{room.y + 22}" font-size="15"', f'x="{middle}" y="{room.y + 41}" font-size="12"'
    return "\n".join(
        [
            f'<g data-room="{name}"><rect x="{room.x}" y="{room.y}" width="{ROOM_WIDTH}" height="{ROOM_HEIGHT}" rx="7" '
            'fill="#ffffff" stroke="#57606a"/>',
            f'<text {title} font-weight="600" text-anchor="middle">{label}</text>',
            f'<text {text} text-anchor="middle" fill="#57606a">{room.text}</text>',
            *(badge(room.x + ROOM_WIDTH - 22 * i, room.y, *stop) for i, stop in enumerate(reversed(stops))),
            "</g>",
        ]
    )


def badge(x: int, y: int, text: str, colour: str) -> str:
    """Return a round mark with a number or a letter."""
    return (
        f'<circle cx="{x}" cy="{y}" r="10" fill="{colour}"/>'
        f'<text x="{x}" y="{y + 4}" font-size="12" font-weight="600" text-anchor="middle" fill="#ffffff">{text}</text>'
    )


def legend() -> list[str]:
    """Return what the marks mean."""
    entries = (("1", BATCH, "the way of a batch"), ("A", CHECKPOINT, "the way of a checkpoint"))
    return [
        badge(20, 812 + 26 * i, text, colour) + f'<text x="38" y="{816 + 26 * i}" font-size="13">{meaning}</text>'
        for i, (text, colour, meaning) in enumerate(entries)
    ] + ['<text x="12" y="869" font-size="13">arrow: imports</text>']


if __name__ == "__main__":
    DRAWING.write_text(draw(arrows(imports())))
