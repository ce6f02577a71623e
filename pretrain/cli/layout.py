"""`pretrain layout`: who would hold what, and what would move, on any number of processes; needs none of them, no GPU and no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pretrain.cli.settings_help import CONFIG_HELP, TrainCommand

if TYPE_CHECKING:
    from parallel.layout import Layout
    from pretrain.config import RunConfig
    from pretrain.estimate.rank_memory import Holding

GIB = 2**30
WIDTH_OF_FILES = 140


def layout(
    words: Annotated[list[str], typer.Argument(metavar="[CONFIG] [key=value]...", help=CONFIG_HELP)],
    world_size: Annotated[int, typer.Option(min=1, help="Processes, one a GPU.")],
    rank: Annotated[int | None, typer.Option(min=0, help="Tell of this rank alone, and of its peers.")] = None,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
) -> None:
    """Print what each rank of a layout holds and what its collectives move in a step. `auto` is decided as on a cluster of GPUs."""
    from pretrain.config.loading import load_words
    from pretrain.errors import UserError
    from pretrain.setup.resolve import resolve_for_cluster

    if rank is not None and rank >= world_size:
        raise UserError(
            f"--rank={rank} is not one of the ranks of --world-size={world_size}: use 0 to {world_size - 1}"
        )
    resolved = resolve_for_cluster(load_words(words).config, world_size)
    config, found = resolved.config, resolved.layout
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    for decision in resolved.decisions:
        if decision.key.startswith("parallel.") or decision.key == "train.micro_batch_size":
            console.print(
                Text.assemble((f"{decision.key} = ", "dim"), str(decision.value), (f" ({decision.reason})", "dim")),
                soft_wrap=True,
            )
    _draw_axes(config, found, ranks_per_node, console)
    if rank is not None:
        _draw_place(found, rank, console)
    ranks = [i * found.stride("pipeline") for i in range(found.pipeline)] if rank is None else [rank]
    _draw_holdings(config, found, ranks, console)
    _draw_traffic(config, found, ranks, ranks_per_node, console)
    if found.pipeline > 1:
        _heading(console, "Pipeline")
        console.print(Text(resolved.pipeline), soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    """Hang the command into `pretrain`."""
    app.command(cls=TrainCommand, no_args_is_help=True)(layout)


def _heading(console: Console, title: str, remark: str = "") -> None:
    console.print()
    console.print(Text.assemble((title, "bold"), (f"  {remark}" if remark else "", "dim")), soft_wrap=True)


def _table(names: int, *headings: str) -> Table:
    """A table whose first columns are names, and the others numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < names else "right", overflow="fold")
    return table


def _size(count: float) -> str:
    """Bytes as people compare them with a GPU's memory."""
    if count < 0.01 * GIB:
        return f"{count / 2**20:,.2f} MiB"
    return f"{count / GIB:,.2f} GiB"


def _draw_axes(config: RunConfig, layout: Layout, ranks_per_node: int, console: Console) -> None:
    from parallel.layout import AXES
    from pretrain.console import format_count
    from pretrain.estimate.flops import parameter_count

    axes = [f"{axis}={getattr(layout, axis)}" for axis in AXES]
    axes[0], axes[-1] = f"{axes[0]} (outermost)", f"{axes[-1]} (innermost)"
    nodes = -(-layout.world_size // ranks_per_node)
    ranks = f"{layout.world_size:,} {'ranks' if layout.world_size > 1 else 'rank'}"
    console.print(
        Text.assemble(
            (f"{format_count(parameter_count(config.model))} parameters on {ranks}", "bold"),
            f", {nodes:,} {'nodes' if nodes > 1 else 'node'} of {ranks_per_node}: {' x '.join(axes)}",
            (f"; zero={layout.zero}", "dim"),
        ),
        soft_wrap=True,
    )


def _draw_place(layout: Layout, rank: int, console: Console) -> None:
    from parallel.layout import AXES

    at = layout.coordinates(rank)
    _heading(console, f"Rank {rank}", f"reads part {layout.data_rank(rank)} of {layout.data} of each batch")
    table = _table(1, "axis", "place", "peers")
    table.columns[2].justify = "left"
    for axis in AXES:
        peers = layout.peers(rank, axis)
        stride = layout.stride(axis)
        told = (
            ", ".join(map(str, peers))
            if len(peers) <= 16
            else f"{peers[0]}, {peers[1]}, ... {peers[-1]}, every {stride}"
        )
        table.add_row(axis, f"{at[axis]} of {len(peers)}", told if len(peers) > 1 else "")
    console.print(table)


def _draw_holdings(config: RunConfig, layout: Layout, ranks: list[int], console: Console) -> None:
    from pretrain.estimate.rank_memory import hold

    _heading(
        console,
        "Who holds what",
        "per rank; activations are an estimate, the rest is counted" + (", in host memory" * layout.offload),
    )
    headings = (
        "stages",
        "layers",
        "parameters",
        "masters",
        "copies",
        "gradients",
        "optimizer",
        "static",
        "activations",
    )
    first = "pipeline rank" if len(ranks) > 1 else "rank"
    table = _table(3, first, *headings)
    for rank in ranks:
        held = hold(config, layout, rank)
        sizes = (
            held.master_bytes,
            held.copy_bytes + held.gathered_bytes,
            held.gradient_bytes,
            held.optimizer_bytes,
            held.static_bytes,
            held.activation_bytes,
        )
        name = layout.coordinates(rank)["pipeline"] if len(ranks) > 1 else rank
        stages = ", ".join(map(str, held.stages))
        table.add_row(str(name), stages, _layers(config, held), f"{held.n_parameters:,}", *map(_size, sizes))
    console.print(table)


def _layers(config: RunConfig, held: Holding) -> str:
    """`embedding, 0-6; 63-69, head`."""
    told = []
    for layers in held.layers:
        words = ["embedding"] if layers.start == 0 else []
        words.append(f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else f"{layers.start}")
        told.append(", ".join([*words, *(["head"] if layers.stop == config.model.n_layers else [])]))
    return "; ".join(told)


def _draw_traffic(config: RunConfig, layout: Layout, ranks: list[int], ranks_per_node: int, console: Console) -> None:
    from pretrain.estimate.communication import Traffic, traffic

    most: Traffic = {}
    for rank in ranks:
        for axis, moved in traffic(config, layout, rank).items():
            for operation, count in moved.items():
                most.setdefault(axis, {})[operation] = max(count, most.get(axis, {}).get(operation, 0))
    if not most:
        return
    _heading(
        console, "What moves in a step", "bytes that a rank sends" + (", the most of any" if len(ranks) > 1 else "")
    )
    table = _table(3, "axis", "inside a node", "operation", "ranks", "bytes a step")
    for axis, moved in most.items():
        inside = all(
            layout.is_inside_node(part, ranks_per_node)
            for part in (("shard", "context") if axis == "fsdp" else (axis,))
        )
        size = layout.fsdp if axis == "fsdp" else getattr(layout, axis)
        for i, (operation, count) in enumerate(entry for entry in moved.items() if entry[1]):
            name, where = (axis, "yes" if inside else "no") if i == 0 else ("", "")
            table.add_row(name, where, operation, str(size) if i == 0 else "", _size(count))
    console.print(table)
