"""Build the engine of one rank from a model spec and a layout: shapes, parallelism, memory, values, optimizer."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.context import apply_context_parallel
from parallel.engine import (
    BuildOptimizer,
    EngineOptions,
    ForwardStep,
    InspectableEngine,
    ModelChunk,
    ModelSpec,
    RoutedLayer,
)
from parallel.engines.torch.engine import Runner, SingleStageRunner, TorchEngine
from parallel.engines.torch.rank_model import ShardedModel, UnshardedModel
from parallel.expert import apply_expert_parallel, apply_row_ranks
from parallel.fsdp import apply_fsdp
from parallel.layout import Layout
from parallel.local import local_shard
from parallel.mesh import ExpertMesh, build_expert_mesh, build_mesh
from parallel.pipeline.runner import PipelineRunner
from parallel.pipeline.schedule import assign_layers, has_split_backward, stages_of_rank
from parallel.pipeline.stage import StageModule
from parallel.recompute import apply_recompute
from parallel.tensor import apply_tensor_parallel, enable_async


def build_engine(
    spec: ModelSpec, options: EngineOptions, *, layout: Layout, rank: int, device: torch.device
) -> InspectableEngine:
    """Build the engine of `rank`, with the initial weights of its layers.

    With more than one rank the default process group must exist. One rank needs none, unless it offloads.
    """
    if layout.world_size > 1 or layout.offload:
        return build_parallel_engine(spec, options, layout=layout, rank=rank, device=device)
    model = _build_chunk(spec, range(spec.n_layers), options, layout)
    _init_weights(model, spec, device, device)
    return build_single_process_engine(
        model, spec.forward_step, spec.build_optimizer, options, device, (spec.n_layers, spec.routing_width)
    )


def build_single_process_engine(
    model: nn.Module,
    forward_step: ForwardStep,
    build_optimizer: BuildOptimizer,
    options: EngineOptions,
    device: torch.device,
    routing_shape: tuple[int, int] = (0, 0),
) -> TorchEngine:
    """Build the engine of a full model that has its values. Needs no process group and shards nothing."""
    rank_model = UnshardedModel(model, options.dtype)
    return TorchEngine(
        rank_model,
        SingleStageRunner(model, forward_step),
        build_optimizer(rank_model.master_weights.items()),
        layout=Layout(),
        rank=0,
        device=device,
        max_grad_norm=options.max_grad_norm,
        routing_shape=routing_shape,
    )


def build_parallel_engine(
    spec: ModelSpec, options: EngineOptions, *, layout: Layout, rank: int, device: torch.device
) -> TorchEngine:
    """Build the engine of a rank of a mesh of any size. At no time does a rank hold more than its own shards."""
    mesh = build_mesh(layout, device.type)
    coordinates = layout.coordinates(rank)

    # Shapes: the layers of this rank on the meta device, one chunk per pipeline stage.
    layers = assign_layers(spec.costs, layout.n_stages)
    stages = stages_of_rank(coordinates["pipeline"], layout)
    chunks = {stage: _build_chunk(spec, layers[stage], options, layout) for stage in stages}

    # Pipeline stages come before tensor parallelism: zero bubble replaces the class of linear layers, and tensor
    # parallelism makes subclasses of whatever class it finds.
    stage_modules: dict[int, StageModule] = {}
    if layout.pipeline > 1:
        stage_modules = {i: StageModule(chunk, spec.forward_step, layout) for i, chunk in chunks.items()}
    expert_mesh = build_expert_mesh(mesh, layout) if spec.routing_width and layout.splits_experts else None
    for chunk in chunks.values():
        _split_computation(chunk, mesh, expert_mesh, layout)
    fsdp_roots = [
        apply_fsdp(
            stage_modules.get(i, chunk), cast(ModelChunk, chunk).fsdp_units, mesh, layout, options.dtype, expert_mesh
        )
        for i, chunk in chunks.items()
    ]

    # Memory and values of this rank's shards.
    for chunk in chunks.values():
        _init_weights(chunk, spec, torch.device("cpu") if layout.offload else device, device)

    model = ShardedModel(chunks, fsdp_roots, mesh, layout, coordinates["context"])
    runner: Runner
    if stage_modules:
        runner = PipelineRunner(
            stage_modules,
            layout,
            mesh["pipeline"].get_group(),
            device=device,
            dtype=options.dtype,
            d_model=spec.d_model,
            sequence_shards=layout.tensor if layout.sequence else 1,
        )
    else:
        runner = SingleStageRunner(chunks[0], spec.forward_step, fsdp_roots[0])
    return TorchEngine(
        model,
        runner,
        spec.build_optimizer(model.master_weights.items()),
        layout=layout,
        rank=rank,
        device=device,
        max_grad_norm=options.max_grad_norm,
        routing_shape=(spec.n_layers, spec.routing_width),
    )


def _build_chunk(spec: ModelSpec, layers: range, options: EngineOptions, layout: Layout) -> nn.Module:
    """Build the layers on the meta device, with recomputation and compilation."""
    with torch.device("meta"):
        module = spec.build(layers)
    chunk = cast(ModelChunk, module)
    # torch.compile does not recompute a block that contains uncompiled code. A split backward pass leaves the linear
    # layers uncompiled (`parallel.pipeline.zero_bubble`), and experts with a mesh of their own leave FSDP's hooks and
    # the exchange of tokens. There recomputation must be the outer wrapper.
    has_nested_units = spec.routing_width > 0 and layout.splits_experts
    compile_first = has_nested_units or has_split_backward(layout.pipeline, layout.schedule)
    if options.compile and compile_first:
        chunk.compile_submodules()
    apply_recompute(
        chunk.layers,
        options.recompute,
        layers.start,
        options.recompute_every,
        options.recompute_keep,
        has_nested_units=has_nested_units,
    )
    if options.compile and not compile_first:
        chunk.compile_submodules()
    return module


def _split_computation(chunk: nn.Module, mesh: DeviceMesh, expert_mesh: ExpertMesh | None, layout: Layout) -> None:
    """Apply expert, tensor and context parallelism. They split what is computed; FSDP shards what is stored."""
    apply_row_ranks(chunk, mesh, layout)
    if expert_mesh is not None:
        apply_expert_parallel(chunk, expert_mesh, layout)
    if layout.tensor > 1:
        apply_tensor_parallel(
            chunk,
            mesh["tensor"],
            cast(ModelChunk, chunk).tp_plan,
            sequence=layout.sequence,
            replicate_kv=layout.replicate_kv,
        )
        if layout.async_tensor:
            enable_async(mesh["tensor"])
    if layout.context > 1:
        apply_context_parallel(chunk, mesh["context"], layout.context_method)


def _init_weights(chunk: nn.Module, spec: ModelSpec, home: torch.device, device: torch.device) -> None:
    """Allocate this rank's shards on the device `home` and write their initial values.

    Buffers lie on the `device` of the passes: FSDP brings offloaded parameters there, but not buffers.
    """
    chunk.to_empty(device=home)
    for module in chunk.modules():
        if isinstance(module, RoutedLayer):
            module.reset_buffers(device)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            shard, offset, shape = local_shard(parameter)
            spec.init_shard(name, shard, offset, shape)
