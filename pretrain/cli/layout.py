"""`pretrain layout`: what each rank of a layout holds and sends, for any number of processes.

Needs no processes, GPUs or data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from pretrain.cli.common import ConfigArgs, load_config
from pretrain.console import format_memory, plain_table, print_heading, print_line

if TYPE_CHECKING:
    from parallel.layout import Layout
    from pretrain.config import RunConfig
    from pretrain.estimate.rank_memory import RankMemory

NON_TERMINAL_WIDTH = 140
"""Columns of the output in files and pipes, which have no width of their own."""
MAX_LISTED_PEERS = 16


def layout(
    args: ConfigArgs,
    world_size: Annotated[int, typer.Option(min=1, help="Number of processes, one per GPU.")],
    rank: Annotated[int | None, typer.Option(min=0, help="Print this rank only, with its peers on each axis.")] = None,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="GPUs in a node.")] = 8,
) -> None:
    """Print what each rank of a layout holds and how much its collectives send in a step.

    Settings that are `auto` get the values that they would have on GPUs.
    """
    from pretrain.errors import UserError
    from pretrain.setup.memory import suggest_expert_ranks
    from pretrain.setup.resolve import resolve_for_cluster

    if rank is not None and rank >= world_size:
        raise UserError(
            f"--rank={rank} is not one of the ranks of --world-size={world_size}: use 0 to {world_size - 1}"
        )
    resolved = resolve_for_cluster(load_config(args), world_size)
    config, layout = resolved.config, resolved.layout
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = NON_TERMINAL_WIDTH
    for decision in resolved.decisions:
        if decision.key.startswith("parallel.") or decision.key == "train.micro_batch_size":
            print_line(console, decision.as_text())
    print_axes(config, layout, ranks_per_node, console)
    if rank is not None:
        print_peers(config, layout, rank, console)
    ranks = [i * layout.stride("pipeline") for i in range(layout.pipeline)] if rank is None else [rank]
    print_memory(config, layout, ranks, console)
    print_traffic(config, layout, ranks, ranks_per_node, console)
    suggestion = suggest_expert_ranks(config, layout, ranks_per_node)
    if suggestion:
        print_heading(console, "Experts")
        print_line(console, suggestion)
    if layout.pipeline > 1:
        print_heading(console, "Pipeline")
        print_line(console, resolved.pipeline)


def print_axes(config: RunConfig, layout: Layout, ranks_per_node: int, console: Console) -> None:
    """Print the size of the model, the number of ranks and nodes, and the size of each axis."""
    from parallel.layout import AXES, EXPERT_AXES
    from pretrain.estimate.flops import describe_parameters

    axes = [f"{axis}={getattr(layout, axis)}" for axis in AXES]
    axes[0], axes[-1] = f"{axes[0]} (outermost)", f"{axes[-1]} (innermost)"
    nodes = -(-layout.world_size // ranks_per_node)
    ranks = f"{layout.world_size:,} {'ranks' if layout.world_size > 1 else 'rank'}"
    line = Text.assemble(
        (f"{describe_parameters(config.model)} on {ranks}", "bold"),
        f", {nodes:,} {'nodes' if nodes > 1 else 'node'} of {ranks_per_node}: {' x '.join(axes)}",
        (f"; zero={layout.zero}", "dim"),
    )
    print_line(console, line)
    if config.model.moe.n_experts and layout.splits_experts:
        folded = " x ".join(f"{axis}={getattr(layout, axis)}" for axis in EXPERT_AXES)
        n_local = config.model.moe.n_experts // layout.expert
        print_line(console, f"experts: {folded} (innermost), {n_local} of {config.model.moe.n_experts} on each rank")


def print_peers(config: RunConfig, layout: Layout, rank: int, console: Console) -> None:
    """Print a rank's coordinate on each axis, and the ranks that it communicates with there."""
    from parallel.layout import AXES, EXPERT_AXES

    coordinates = layout.coordinates(rank) | layout.expert_coordinates(rank)
    has_expert_axes = config.model.moe.n_experts and layout.splits_experts
    note = f"reads part {layout.data_rank(rank)} of {layout.data} of each batch"
    print_heading(console, f"Rank {rank}", note)
    table = plain_table("axis", "coordinate", "peers", wrap_numbers=True)
    table.columns[2].justify = "left"
    for axis in (*AXES, *(EXPERT_AXES if has_expert_axes else ())):
        peers = layout.peers(rank, axis)
        listed = ", ".join(map(str, peers))
        if len(peers) > MAX_LISTED_PEERS:
            listed = f"{peers[0]}, {peers[1]}, ... {peers[-1]}, every {layout.stride(axis)}"
        table.add_row(axis, f"{coordinates[axis]} of {len(peers)}", listed if len(peers) > 1 else "")
    console.print(table)


def print_memory(config: RunConfig, layout: Layout, ranks: list[int], console: Console) -> None:
    """Print the memory of each of these ranks by kind."""
    from pretrain.estimate.rank_memory import estimate_rank_memory

    location = ", in host memory" if layout.offload else ""
    print_heading(console, "Memory", f"per rank; activations are an estimate, everything else is exact{location}")
    table = plain_table(
        *("pipeline\nrank" if len(ranks) > 1 else "\nrank", "\nstages", "\nlayers"),
        *("\nparameters", "master\nweights", "compute\nweights", "\ngradients", "\noptimizer"),
        *("\nstatic", "\nactivations"),
        text_columns=3,
        wrap_numbers=True,
    )
    for rank in ranks:
        memory = estimate_rank_memory(config, layout, rank)
        sizes = (
            memory.master_bytes,
            memory.compute_weight_bytes + memory.gathered_bytes,
            memory.gradient_bytes,
            memory.optimizer_bytes,
            memory.static_bytes,
            memory.activation_bytes,
        )
        name = layout.coordinates(rank)["pipeline"] if len(ranks) > 1 else rank
        stages = ", ".join(map(str, memory.stages))
        layers = format_layers(config, memory)
        table.add_row(str(name), stages, layers, f"{memory.n_parameters:,}", *map(format_memory, sizes))
    console.print(table)


def format_layers(config: RunConfig, memory: RankMemory) -> str:
    """Return the layers of each stage: `embedding, 0-6; 63-69, head`."""
    stages = []
    for layers in memory.layers:
        parts = ["embedding"] if layers.start == 0 else []
        parts.append(f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else f"{layers.start}")
        stages.append(", ".join([*parts, *(["head"] if layers.stop == config.model.n_layers else [])]))
    return "; ".join(stages)


def print_traffic(config: RunConfig, layout: Layout, ranks: list[int], ranks_per_node: int, console: Console) -> None:
    """Print the bytes that each collective sends in a step: the most of any of these ranks."""
    from pretrain.estimate.communication import Traffic, estimate_traffic

    most: Traffic = {}
    for rank in ranks:
        for axis, sent in estimate_traffic(config, layout, rank).items():
            for operation, n_bytes in sent.items():
                most.setdefault(axis, {})[operation] = max(n_bytes, most.get(axis, {}).get(operation, 0))
    if not most:
        return
    note = "bytes that a rank sends" + (", the most of any rank" if len(ranks) > 1 else "")
    print_heading(console, "Communication in a step", note)
    table = plain_table(
        "axis", "inside a node", "operation", "ranks", "bytes a step", text_columns=3, wrap_numbers=True
    )
    for axis, sent in most.items():
        parts = {"fsdp": ("shard", "context"), "expert_fsdp": ("expert_data", "expert_tensor")}.get(axis, (axis,))
        inside = all(layout.is_inside_node(part, ranks_per_node) for part in parts)
        size = getattr(layout, axis)
        for i, (operation, n_bytes) in enumerate(entry for entry in sent.items() if entry[1]):
            cells = (axis, "yes" if inside else "no", operation, str(size)) if i == 0 else ("", "", operation, "")
            table.add_row(*cells, format_memory(n_bytes))
    console.print(table)
