"""A model spec and a layout -> the engine of one rank, in the order in which one would explain it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallel import context, tensor
from parallel.engine import BuildOptimizer, EngineOptions, ForwardStep, Microbatch, ModelChunk, ModelSpec
from parallel.engines.torch.engine import Runner, SingleStageRunner, TorchEngine
from parallel.fsdp import apply_fsdp
from parallel.layout import Layout
from parallel.local import local, local_shard
from parallel.master_weights import split_master_weights
from parallel.mesh import build_mesh
from parallel.pipeline.runner import PipelineRunner, StageModule, TiedEmbedding
from parallel.pipeline.schedule import assign_layers, has_split_backward, stages_of_rank
from parallel.recompute import apply_recompute


def build_engine(
    spec: ModelSpec, options: EngineOptions, *, layout: Layout, rank: int, device: torch.device
) -> TorchEngine:
    """The engine of `rank`, with the initial weights of its parts.

    Shapes come first, then how they are split, then memory, then values: no rank ever holds more than its part. With more than one rank
    the default process group must be there; one rank needs none, unless it offloads.
    """
    if layout.world_size == 1 and not layout.offload:
        model = _shapes(spec, range(spec.n_layers), options, layout)
        _give_values(model, spec, device)
        return one_process(model, spec.forward_step, spec.build_optimizer, options, device)
    return divided(spec, options, layout=layout, rank=rank, device=device)


def one_process(
    model: nn.Module,
    forward_step: ForwardStep,
    build_optimizer: BuildOptimizer,
    options: EngineOptions,
    device: torch.device,
) -> TorchEngine:
    """The engine of a whole model that has its values already: no process group, nothing is divided."""
    master_weights, refresh = split_master_weights(model, options.dtype)
    optimizer, runner = build_optimizer(master_weights.items()), SingleStageRunner(model, forward_step)
    return TorchEngine(
        [model], master_weights, optimizer, runner, device=device, max_grad_norm=options.max_grad_norm, refresh=refresh
    )


def divided(spec: ModelSpec, options: EngineOptions, *, layout: Layout, rank: int, device: torch.device) -> TorchEngine:
    """The engine of a rank whose parameters are divided, on a grid of any size."""
    mesh = build_mesh(layout, device.type)
    at = layout.coordinates(rank)
    ranges = assign_layers(spec.n_layers, layout.n_stages, first_cost=spec.first_cost, last_cost=spec.last_cost)
    parts = {stage: _shapes(spec, ranges[stage], options, layout) for stage in stages_of_rank(at["pipeline"], layout)}
    # Before they are split: zero bubble changes the class of linear layers, and what splits them makes subclasses of that.
    several = layout.pipeline > 1
    stages = {i: StageModule(part, spec.forward_step, layout) for i, part in parts.items() if several}
    for part in parts.values():
        _split(part, mesh, layout)
    sharded = [
        apply_fsdp(stages.get(stage, part), cast(ModelChunk, part).fsdp_units, mesh, layout, options.dtype)
        for stage, part in parts.items()
    ]
    for part in parts.values():
        _give_values(part, spec, torch.device("cpu") if layout.offload else device)
    master_weights, twins = _masters(parts.values())
    tied = TiedEmbedding.of(parts, layout, mesh) if stages else None
    runner: Runner
    if stages:
        runner = PipelineRunner(
            stages,
            layout,
            mesh["pipeline"].get_group(),
            device=device,
            activation=options.dtype,
            d_model=spec.d_model,
            sequence_split=layout.tensor if layout.sequence else 1,
        )
    else:
        runner = SingleStageRunner(parts[0], spec.forward_step, sharded[0])

    def reshard() -> None:
        for each in sharded:
            each.reshard()

    def refresh() -> None:
        for master, twin in twins:
            local(twin).copy_(local(master))
        reshard()

    def cut(microbatch: Microbatch) -> Microbatch:
        return context.shard_sequence(
            microbatch, context.local_tokens(microbatch.input_ids.shape[1], layout, at["context"])
        )

    return TorchEngine(
        list(parts.values()),
        master_weights,
        spec.build_optimizer(master_weights.items()),
        runner,
        device=device,
        max_grad_norm=options.max_grad_norm,
        layout=layout,
        rank=rank,
        n_copies=lambda name: 1 if tied is None else tied.n_copies(name),
        finish_gradients=(lambda: None) if tied is None else tied.sum_gradients,
        refresh=refresh,
        after_evaluation=reshard,
        cut=cut if layout.context > 1 else lambda microbatch: microbatch,
    )


def _shapes(spec: ModelSpec, layers: range, options: EngineOptions, layout: Layout) -> nn.Module:
    """The part on the meta device, with all that does not depend on how it is split."""
    with torch.device("meta"):
        part = spec.build(layers)
    described = cast(ModelChunk, part)
    recomputed = partial(
        apply_recompute,
        described.layers,
        options.recompute,
        layers.start,
        options.recompute_every,
        options.recompute_keep,
    )
    splits = has_split_backward(layout.pipeline, layout.schedule)
    if not splits:
        recomputed()
    if options.compile:
        described.compile_submodules()  # what is recomputed, too
    if splits:
        recomputed()  # around what is compiled: the compiler recomputes no block of which it leaves something out (`parallel.pipeline.zero_bubble`)
    return part


def _split(part: nn.Module, mesh: DeviceMesh, layout: Layout) -> None:
    """Divide what is computed; what is stored is divided by `apply_fsdp`."""
    if layout.tensor > 1:
        tensor.apply_tensor_parallel(
            part,
            mesh["tensor"],
            cast(ModelChunk, part).tp_plan,
            sequence=layout.sequence,
            replicate_kv=layout.replicate_kv,
        )
        if layout.async_tensor:
            tensor.enable_async(mesh["tensor"])
    if layout.context > 1:
        context.apply_context_parallel(part, mesh["context"], layout.context_method)


def _give_values(part: nn.Module, spec: ModelSpec, device: torch.device) -> None:
    """Memory on `device` for what this rank holds, and its initial values."""
    part.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            mine, offset, shape = local_shard(parameter)
            spec.init_shard(name, mine, offset, shape)


def _masters(parts: Iterable[nn.Module]) -> tuple[dict[str, nn.Parameter], list[tuple[nn.Parameter, nn.Parameter]]]:
    """Parameters by canonical name; and (master, twin) where two parts on this rank hold the same one: the twin follows its master."""
    master_weights: dict[str, nn.Parameter] = {}
    twins = []
    for part in parts:
        for name, parameter in part.named_parameters():
            if name in master_weights:
                twins.append((master_weights[name], parameter))
            else:
                master_weights[name] = parameter
    return master_weights, twins
