"""A blueprint and a layout -> the engine of one rank, in the order in which one would explain it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallel import context, tensor
from parallel.engine import Blueprint, BuildOptimizer, Compute, Microbatch, Numbers, Part
from parallel.engines.torch.engine import OnePart, Runner, TorchEngine
from parallel.fsdp import shard
from parallel.layout import Layout
from parallel.local import local, local_part
from parallel.master_weights import split_masters
from parallel.mesh import build_mesh
from parallel.pipeline.runner import Pipeline, Stage, Tied
from parallel.pipeline.schedule import assign, splits_backward, stages_of
from parallel.recompute import recompute


def build_engine(
    blueprint: Blueprint, numbers: Numbers, *, layout: Layout, rank: int, device: torch.device
) -> TorchEngine:
    """The engine of `rank`, with the initial weights of its parts.

    Shapes come first, then how they are split, then memory, then values: no rank ever holds more than its part. With more than one rank
    the default process group must be there; one rank needs none, unless it offloads.
    """
    if layout.world_size == 1 and not layout.offload:
        model = _shapes(blueprint, range(blueprint.n_layers), numbers, layout)
        _give_values(model, blueprint, device)
        return one_process(model, blueprint.compute, blueprint.build_optimizer, numbers, device)
    return divided(blueprint, numbers, layout=layout, rank=rank, device=device)


def one_process(
    model: nn.Module, compute: Compute, build_optimizer: BuildOptimizer, numbers: Numbers, device: torch.device
) -> TorchEngine:
    """The engine of a whole model that has its values already: no process group, nothing is divided."""
    masters, refresh = split_masters(model, numbers.dtype)
    optimizer, runner = build_optimizer(masters.items()), OnePart(model, compute)
    return TorchEngine([model], masters, optimizer, runner, device=device, clip=numbers.clip, refresh=refresh)


def divided(blueprint: Blueprint, numbers: Numbers, *, layout: Layout, rank: int, device: torch.device) -> TorchEngine:
    """The engine of a rank whose parameters are divided, on a grid of any size."""
    mesh = build_mesh(layout, device.type)
    at = layout.coordinates(rank)
    ranges = assign(blueprint.n_layers, layout.n_stages, first_cost=blueprint.first_cost, last_cost=blueprint.last_cost)
    parts = {stage: _shapes(blueprint, ranges[stage], numbers, layout) for stage in stages_of(at["pipeline"], layout)}
    # Before they are split: zero bubble changes the class of linear layers, and what splits them makes subclasses of that.
    stages = (
        {stage: Stage(part, blueprint.compute, layout) for stage, part in parts.items()} if layout.pipeline > 1 else {}
    )
    for part in parts.values():
        _split(part, mesh, layout)
    sharded = [
        shard(stages.get(stage, part), cast(Part, part).units, mesh, layout, numbers.dtype)
        for stage, part in parts.items()
    ]
    for part in parts.values():
        _give_values(part, blueprint, torch.device("cpu") if layout.offload else device)
    masters, twins = _masters(parts.values())
    tied = Tied.of(parts, layout, mesh) if stages else None
    runner: Runner
    if stages:
        runner = Pipeline(
            stages,
            layout,
            mesh["pipeline"].get_group(),
            device=device,
            activation=numbers.dtype,
            width=blueprint.width,
            sequence_split=layout.tensor if layout.sequence else 1,
        )
    else:
        runner = OnePart(parts[0], blueprint.compute, sharded[0])

    def forget_gathered() -> None:
        for each in sharded:
            each.forget_gathered()

    def refresh() -> None:
        for master, twin in twins:
            local(twin).copy_(local(master))
        forget_gathered()

    def cut(microbatch: Microbatch) -> Microbatch:
        return context.cut(microbatch, context.held(microbatch.input_ids.shape[1], layout, at["context"]))

    return TorchEngine(
        list(parts.values()),
        masters,
        blueprint.build_optimizer(masters.items()),
        runner,
        device=device,
        clip=numbers.clip,
        layout=layout,
        rank=rank,
        n_copies=lambda name: 1 if tied is None else tied.n_copies(name),
        finish_gradients=(lambda: None) if tied is None else tied.sum_gradients,
        refresh=refresh,
        after_evaluation=forget_gathered,
        cut=cut if layout.context > 1 else lambda microbatch: microbatch,
    )


def _shapes(blueprint: Blueprint, layers: range, numbers: Numbers, layout: Layout) -> nn.Module:
    """The part on the meta device, with all that does not depend on how it is split."""
    with torch.device("meta"):
        part = blueprint.build(layers)
    described = cast(Part, part)
    recomputed = partial(
        recompute, described.layers, numbers.recompute, layers.start, numbers.recompute_every, numbers.recompute_keep
    )
    splits = splits_backward(layout.pipeline, layout.schedule)
    if not splits:
        recomputed()
    if numbers.compile:
        described.compile_parts()  # what is recomputed, too
    if splits:
        recomputed()  # around what is compiled: the compiler recomputes no block of which it leaves something out (`parallel.pipeline.zero_bubble`)
    return part


def _split(part: nn.Module, mesh: DeviceMesh, layout: Layout) -> None:
    """Divide what is computed; what is stored is divided by `shard`."""
    if layout.tensor > 1:
        tensor.split(
            part, mesh["tensor"], cast(Part, part).plan, sequence=layout.sequence, replicate_kv=layout.replicate_kv
        )
        if layout.async_tensor:
            tensor.enable_async(mesh["tensor"])
    if layout.context > 1:
        context.split(part, mesh["context"], layout.context_method)


def _give_values(part: nn.Module, blueprint: Blueprint, device: torch.device) -> None:
    """Memory on `device` for what this rank holds, and its initial values."""
    part.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            mine, offset, shape = local_part(parameter)
            blueprint.fill(name, mine, offset, shape)


def _masters(parts: Iterable[nn.Module]) -> tuple[dict[str, nn.Parameter], list[tuple[nn.Parameter, nn.Parameter]]]:
    """Parameters by canonical name; and (master, twin) where two parts on this rank hold the same one: the twin follows its master."""
    masters: dict[str, nn.Parameter] = {}
    twins = []
    for part in parts:
        for name, parameter in part.named_parameters():
            if name in masters:
                twins.append((masters[name], parameter))
            else:
                masters[name] = parameter
    return masters, twins
