"""Data parallelism: replicated, ZeRO-1, 2 and 3 (arXiv:1910.02054), and hybrids of them, by FSDP2.

Each rank keeps its shard of the fp32 master weights and of the optimizer state at every ZeRO stage. The stages differ
in what lives between the first forward pass and the last backward pass of a step. In bytes per parameter, in bf16
with AdamW on N "fsdp" ranks:

| `zero` | compute weights   | gradients, fp32 | master weights, moments | all-gathers a step | reduce-scatters a step |
|--------|-------------------|-----------------|-------------------------|--------------------|------------------------|
| 1      | 2, all            | 4, all          | (4 + 8) / N             | 1                  | 1                      |
| 2      | 2, all            | 4 / N           | (4 + 8) / N             | 1                  | 1 a microbatch         |
| 3      | 2, few blocks     | 4 / N           | (4 + 8) / N             | 2 a microbatch     | 1 a microbatch         |

The experts of a mixture of experts are a unit of their own inside their block where they have a mesh of their own
(`parallel.expert`): N then counts the ranks that hold the same experts.

In fp32 compute weights take 4 bytes. `replicate` adds one all-reduce of the sharded gradients per step; with
`shard=1` it is plain data parallelism.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from parallel.expert import moe_layers
from parallel.layout import Layout
from parallel.local import to_local
from parallel.mesh import ExpertMesh, data_mesh, reshard_mesh
from parallel.torch_compat import fsdp_resharding_over


class FSDPRoot:
    """A sharded module, and what it does around each microbatch."""

    def __init__(self, root: nn.Module, layout: Layout) -> None:
        self._root = cast(FSDPModule, root)
        self._zero = layout.zero

    def prepare_microbatch(self, *, is_last: bool) -> None:
        """Call it before each microbatch. Only the last one of a step communicates what the ZeRO stage can delay."""
        self._root.set_is_last_backward(is_last)
        self._root.set_requires_gradient_sync(is_last or self._zero > 1)
        self._root.set_requires_all_reduce(is_last)
        self._root.set_reshard_after_backward(is_last or self._zero == 3)

    def reshard(self) -> None:
        """Free what a forward pass without a backward pass gathered. Then master weights may change."""
        for module in cast(nn.Module, self._root).modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def apply_fsdp(
    root: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    layout: Layout,
    dtype: torch.dtype,
    expert_mesh: ExpertMesh | None = None,
) -> FSDPRoot:
    """Shard the parameters of `root` in place. They become DTensors that hold this rank's fp32 master weights.

    Args:
        root: on the meta device or with values. If it has a method `loss`, that may be called like its forward.
        units: modules inside it. The parameters of a unit are gathered and freed together. In the order of their use.
            Parameters outside of the units stay gathered from the forward to the backward pass of the root.
        mesh: of `parallel.mesh.build_mesh`.
        layout: its `zero`, `reshard_to`, `prefetch` and `offload` are used here.
        dtype: of the forward and backward pass. Gradients are summed, not averaged, over the ranks in fp32.
        expert_mesh: if experts have a mesh of their own. Then those inside each unit are gathered when they are used.
            `reshard_to` does not hold for them: with ZeRO-3 they are sharded again over all ranks of their mesh.
    """
    data = data_mesh(mesh, layout)
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # RoPE's tables stay fp32
    )
    offload = CPUOffloadPolicy() if layout.offload else OffloadPolicy()
    policies: dict[str, Any] = {"mp_policy": precision, "offload_policy": offload}  # Any: arguments by name
    experts = {unit: [layer.experts for layer in moe_layers(unit)] if expert_mesh else [] for unit in units}
    for module in chain.from_iterable(experts.values()):
        assert expert_mesh is not None
        placement = partial(_expert_placement, n_ranks=expert_mesh.fsdp.size(-1))
        reshard = layout.zero == 3
        fully_shard(
            module, mesh=expert_mesh.fsdp, reshard_after_forward=reshard, shard_placement_fn=placement, **policies
        )
        _sum_gradients(module, expert_mesh.fsdp)
    reshard_to = layout.reshard_to if layout.zero == 3 and layout.reshard_to != layout.fsdp else None
    with nullcontext() if reshard_to is None else fsdp_resharding_over(reshard_mesh(mesh, layout)):
        for unit in units:
            fully_shard(unit, mesh=data, reshard_after_forward=reshard_to or layout.zero == 3, **policies)
    fully_shard(root, mesh=data, reshard_after_forward=False, **policies)
    # Modules under tensor parallelism return views. Nothing writes into what a unit returned.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    if hasattr(root, "loss"):
        register_fsdp_forward_method(root, "loss")
    for module in (root, *units):
        _sum_gradients(module, data)
    _set_prefetch(units, experts, layout.prefetch)
    return FSDPRoot(root, layout)


def _sum_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Do not average gradients over the ranks of `mesh`."""
    sharded = cast(FSDPModule, module)
    if mesh.size() > 1:  # with one rank FSDP2 would copy the gradients to divide them by 1
        sharded.set_gradient_divide_factor(1.0)
    # Otherwise a factor of 1 makes FSDP2 ask for NCCL's premultiplied sum.
    sharded.set_force_sum_reduction_for_comms(True)


def _expert_placement(parameter: nn.Parameter, *, n_ranks: int) -> Shard:
    """Full experts on each rank if their number divides, else a part of each: FSDP2 pads along dimension 0 only."""
    sizes = to_local(parameter).shape
    return Shard(next((dim for dim, size in enumerate(sizes) if size % n_ranks == 0), 0))


def _set_prefetch(units: Sequence[nn.Module], experts: Mapping[nn.Module, Sequence[nn.Module]], n_ahead: int) -> None:
    """Make each gathered unit start the gathers of the next `n_ahead` units. With 0, FSDP2 decides: it prefetches one.

    Below ZeRO-3 this changes nothing after the first forward pass of a step, because units stay gathered. Blocks start
    the gathers of their experts too. Experts start none: under recomputation their forward runs in the backward pass,
    when the next block has been used already.

    Args:
        units: in the order of their use.
        experts: the units inside each of them.
        n_ahead: number of units.
    """
    for i, unit in enumerate(units if n_ahead else ()):
        for order, prefetch in (
            (units[i + 1 : i + 1 + n_ahead], FSDPModule.set_modules_to_forward_prefetch),
            (units[max(0, i - n_ahead) : i][::-1], FSDPModule.set_modules_to_backward_prefetch),
        ):
            ahead = [*experts[unit], *(part for each in order for part in (each, *experts[each]))]
            if order:
                ahead = ahead[: -len(experts[order[-1]]) or None]  # the last unit starts its own
            prefetch(cast(FSDPModule, unit), cast(list[FSDPModule], ahead))
