"""Expert parallelism: who holds which expert of a mixture of experts, and what that changes in a layer.

`apply_expert_parallel` changes three things of each MoE layer:

- `experts`: rank i of the `expert` axis holds experts i*L to (i+1)*L - 1. Their parameters [E, ...] become DTensors,
  sharded along E, and the module computes with this rank's part as plain tensors. `parallel.fsdp` shards the parts
  further, over the ranks that hold the same experts.
- `dispatcher`: brings the tokens to the ranks of their experts (`parallel.dispatch`).
- `gate.row_ranks`: the ranks that hold the other tokens of the same rows, for what the router decides by full rows.

The tokens of an MoE layer are always split over the shard, context and tensor ranks. Under tensor parallelism without
`sequence` the layer's input is split along the sequence, and its output gathered (`parallel.tensor`, `split_tokens`).

With `expert_tensor` above 1, that many neighbours have the same experts and compute a part of the hidden width F each:
rank j its F/n rows of gate and of up, and its columns of down, for the tokens of all of them. This divides the experts'
products and activations. It does not divide the gathered weights: FSDP gathers all of F, because a DTensor cannot say
"these rows of gate and those of up" and still be saved, loaded and gathered by torch 2.11. Between steps they are
sharded over these ranks too. A rank keeps a copy of its rows of gate and up from the forward to the backward pass; with
recomputation only while a block's backward pass runs.

Shape suffixes: E experts, L experts of a rank, D model width, F hidden width, B rows, S tokens of a row on this rank, R
tokens of the full row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parallel.context import in_row_order, local_tokens
from parallel.deep_ep import DeepEPDispatcher, make_buffer
from parallel.dispatch import AllToAllDispatcher, Dispatcher, ExpertRows, ExpertTensorDispatcher
from parallel.layout import Layout
from parallel.mesh import ExpertMesh
from parallel.torch_compat import all_gather_tensor, all_reduce_tensor, mark_dynamic_rows, registered_parameter


class LocalDispatcher(Dispatcher, Protocol):
    """The dispatcher of one process, which a layer has before it is parallelized."""

    def for_experts(self, n_experts: int) -> Dispatcher:
        """One of the same kind for another number of experts, that drops assignments to expert `n_experts`."""


class HasRowRanks(Protocol):
    """A router that decides some things by full rows."""

    row_ranks: object


@runtime_checkable
class MoELayer(Protocol):
    """A mixture of experts. Its `experts` have the parameters `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F]."""

    gate: HasRowRanks
    experts: nn.Module
    dispatcher: Any
    """A `LocalDispatcher` at first, then a `Dispatcher`."""


def moe_layers(module: nn.Module) -> Iterator[MoELayer]:
    """The MoE layers inside `module`, in order."""
    for each in module.modules():
        if isinstance(each, MoELayer):
            yield each


def apply_expert_parallel(module: nn.Module, mesh: ExpertMesh, layout: Layout) -> None:
    """Give each rank its experts, in place.

    Args:
        module: a model, or a chunk of one, best on the meta device. With values, each rank keeps its part of its own.
        mesh: of all ranks.
        layout: of that mesh. Its `expert` divides the experts, and `expert_tensor` their hidden width.
    """
    ranks = mesh.axes["expert"]
    over_ranks = _dispatcher_maker(ranks.get_group(), layout)
    make_classes = _ClassMaker(mesh, layout)
    for layer in moe_layers(module):
        if layout.expert > 1:
            layer.dispatcher = over_ranks(layer)
            _distribute_experts(layer.experts, ranks)
        if layout.expert_tensor > 1:
            part = mesh.axes["expert_tensor"]
            layer.dispatcher = ExpertTensorDispatcher(layer.dispatcher, part.get_group())
            width = cast(Tensor, layer.experts.down_proj).shape[-1]
            first_feature = part.get_local_rank() * width // layout.expert_tensor
            layer.experts.first_feature = first_feature  # type: ignore[assignment]  # nn.Module wants tensors
        make_classes.change(layer)


def apply_row_ranks(module: nn.Module, mesh: DeviceMesh, layout: Layout) -> None:
    """Tell the routers which ranks hold the other tokens of their rows: context ranks and tensor ranks.

    Args:
        module: a model, or a chunk of one.
        mesh: of `parallel.mesh.build_mesh`.
        layout: of that mesh.
    """
    if layout.context * layout.tensor > 1:
        for layer in moe_layers(module):
            layer.gate.row_ranks = RowRanks(mesh["context"], mesh["tensor"], layout)


class RowRanks:
    """The context and tensor ranks that share the tokens of a row. Nothing here is differentiated."""

    def __init__(self, context: DeviceMesh, tensor: DeviceMesh, layout: Layout) -> None:
        """Context ranks split the row (`parallel.context`), and tensor ranks the part of each in equal pieces."""
        self._context, self._tensor = context.get_group(), tensor.get_group()
        self._context_rank, self._tensor_rank = context.get_local_rank(), tensor.get_local_rank()
        self._layout = layout

    @property
    def size(self) -> int:
        """Number of ranks that share a row."""
        return self._layout.context * self._layout.tensor

    def sum(self, counts_BE: Tensor) -> Tensor:
        """Add up the numbers of all these ranks."""
        for group in (self._context, self._tensor):
            if group.size() > 1:
                counts_BE = all_reduce_tensor(counts_BE, group.group_name)
        return counts_BE

    def gather(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] of each rank -> [B, R, ...] in the order of the row."""
        x_BS = x_BS.detach()
        if self._layout.tensor > 1:
            x_BS = torch.cat(_gather(x_BS, self._tensor), 1)
        if self._layout.context == 1:
            return x_BS
        both = self._layout.context_method == "gather"
        return in_row_order(_gather(x_BS, self._context), early_and_late=both, dim=1)

    def local(self, x_BR: Tensor) -> Tensor:
        """[B, R, ...] in the order of the row -> [B, S, ...], the tokens of this rank."""
        tokens = local_tokens(x_BR.shape[1], self._layout, self._context_rank)
        x_BS = torch.cat([x_BR[:, first:end] for first, end in tokens.ranges], 1)
        return x_BS.chunk(self._layout.tensor, 1)[self._tensor_rank]


def _gather(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    size = group.size()
    return list(all_gather_tensor(x.contiguous(), size, group.group_name).chunk(size))


def _dispatcher_maker(group: ProcessGroup, layout: Layout) -> Callable[[MoELayer], Dispatcher]:
    """A function that makes the dispatcher of a layer over the ranks that its experts are divided among."""
    buffer = cache(make_buffer)  # one for all layers

    def make(layer: MoELayer) -> Dispatcher:
        if layout.expert_dispatch == "all_to_all":
            return AllToAllDispatcher(layer.dispatcher, group)
        n_experts, width, _ = cast(Tensor, layer.experts.down_proj).shape
        local = layer.dispatcher.for_experts(n_experts // group.size())
        return DeepEPDispatcher(local, buffer(group, width), n_experts, n_experts // group.size())

    return make


def _distribute_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Turn the parameters into DTensors sharded over the experts."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if len(parameter) % mesh.size():
            raise ValueError(f"{len(parameter)} experts cannot be shared out to {mesh.size()} ranks")
        # Each rank takes its part of its own values: nothing is sent.
        local = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(local, requires_grad=parameter.requires_grad))


class _ClassMaker:
    """Makes one class for many layers: the compiler would compile each class anew."""

    def __init__(self, mesh: ExpertMesh, layout: Layout) -> None:
        self._mesh = mesh
        self._layout = layout
        self._classes: dict[type[nn.Module], type[nn.Module]] = {}

    def change(self, layer: MoELayer) -> None:
        """Change the classes of a layer and of its experts."""
        module = cast(nn.Module, layer)
        module.__class__ = self._find(type(module), _uncompiled)
        if self._layout.expert * self._layout.expert_tensor > 1:
            layer.experts.__class__ = self._find(type(layer.experts), self._local_experts)

    def _find(self, base: type[nn.Module], make: Callable[[type[nn.Module]], type[nn.Module]]) -> type[nn.Module]:
        if base not in self._classes:
            self._classes[base] = make(base)
        return self._classes[base]

    def _local_experts(self, base: type[nn.Module]) -> type[nn.Module]:
        return _make_experts_class(base, self._mesh, self._layout)


def _uncompiled(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose own forward is not compiled. The modules inside it are: router, experts, shared experts.

    FSDP's hooks on the experts and the exchange of tokens cannot be compiled. Between them the compiler would find many
    small pieces, and compile them again for every number of rows.
    """
    forward = torch.compiler.disable(base.forward, recursive=False)  # type: ignore[no-untyped-call]  # untyped in torch
    return type(f"ExpertParallel{base.__name__}", (base,), {"forward": forward})


def _make_experts_class(base: type[nn.Module], mesh: ExpertMesh, layout: Layout) -> type[nn.Module]:
    """A subclass whose `gate_up_proj` and `down_proj` are what this rank computes with. `parameters()` stay."""
    experts = mesh.axes["expert"]
    n_parts, part = layout.expert_tensor, mesh.axes.get_local_rank("expert_tensor")

    def local(module: nn.Module, name: str) -> Tensor | None:
        """This rank's experts as a plain tensor; None while FSDP2 shards them."""
        parameter: Tensor = registered_parameter(module, name)
        if isinstance(parameter, DTensor):
            if layout.expert == 1 or parameter.device_mesh != experts:
                return None
            parameter = parameter.to_local(grad_placements=[Shard(0)])
        return parameter

    def gate_up_proj(module: nn.Module) -> Tensor:
        full_LHD = local(module, "gate_up_proj")
        if full_LHD is None or n_parts == 1:
            return registered_parameter(module, "gate_up_proj") if full_LHD is None else full_LHD
        # The rows of gate, then those of up: of each this rank's part.
        parts_L2FD = torch.unflatten(full_LHD, 1, (2, -1)).chunk(n_parts, 2)[part]
        return parts_L2FD.flatten(1, 2)

    def down_proj(module: nn.Module) -> Tensor:
        full_LDF = local(module, "down_proj")
        if full_LDF is None or n_parts == 1:
            return registered_parameter(module, "down_proj") if full_LDF is None else full_LDF
        return full_LDF.chunk(n_parts, 2)[part]

    # Not compiled, but `base.forward` is. The marks must be set here: FSDP's hooks pass other tensors on.
    @partial(torch.compiler.disable, recursive=False)
    def forward(module: nn.Module, rows: ExpertRows) -> Tensor:
        mark_dynamic_rows(*(x for x in (rows.x_XD, rows.weight_X, rows.key_X) if x is not None))
        out_XD: Tensor = base.forward(module, rows)
        return out_XD

    members = {"gate_up_proj": property(gate_up_proj), "down_proj": property(down_proj), "forward": forward}
    return type(f"ExpertParallel{base.__name__}", (base,), members)
