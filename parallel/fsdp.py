"""Data parallelism: replicated, ZeRO-1, 2 and 3 (arXiv:1910.02054), and hybrids of them, by FSDP2.

Each rank keeps its part of the fp32 masters and of the optimizer state, whatever the stage. What the stages differ in is what lives
between the forward pass of a step's first microbatch and the backward pass of its last one, per parameter in bf16 with AdamW:

| `zero` | copies to compute with | gradients, fp32   | masters, AdamW's moments | all-gathers a step | reduce-scatters a step |
|--------|------------------------|-------------------|--------------------------|--------------------|------------------------|
| 1      | 2, all                 | 4, all            | (4 + 8) / N              | 1                  | 1                      |
| 2      | 2, all                 | 4 / N             | (4 + 8) / N              | 1                  | 1 a microbatch         |
| 3      | 2, of a few blocks     | 4 / N             | (4 + 8) / N              | 2 a microbatch     | 1 a microbatch         |

in bytes, N being the "fsdp" ranks. Compute copies are of `dtype`, 4 bytes in fp32. `replicate` adds an all-reduce of the sharded gradients,
once a step; with `shard=1` it is plain data parallelism.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import cast
from unittest.mock import patch

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
from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from parallel.layout import Layout
from parallel.mesh import data_mesh, reshard_mesh


class FSDPRoot:
    """A module whose parameters are sharded, and what it does around each microbatch."""

    def __init__(self, root: nn.Module, layout: Layout) -> None:
        self._root = cast(FSDPModule, root)
        self._zero = layout.zero

    def before(self, *, last: bool) -> None:
        """Called before a microbatch: only the last of a step moves what a stage can hold back."""
        self._root.set_is_last_backward(last)
        self._root.set_requires_gradient_sync(last or self._zero > 1)
        self._root.set_requires_all_reduce(last)
        self._root.set_reshard_after_backward(last or self._zero == 3)

    def reshard(self) -> None:
        """Free the copies that a forward pass without backward pass left behind: the masters may be written into now."""
        for module in cast(nn.Module, self._root).modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def apply_fsdp(
    root: nn.Module, units: Sequence[nn.Module], mesh: DeviceMesh, layout: Layout, dtype: torch.dtype
) -> FSDPRoot:
    """Shard the parameters of `root` in place; its parameters become DTensors that hold this rank's part of the fp32 masters.

    Args:
        root: on the meta device or with values. Its `loss`, if it has one, may be called like its forward.
        units: modules inside it whose parameters are gathered and freed together, in the order of their use; what is outside of them
            belongs to the root, which stays gathered from its forward to its backward pass.
        mesh: of `parallel.mesh.build_mesh`.
        layout: its `zero`, `reshard_to`, `prefetch` and `offload` count here.
        dtype: of the forward and backward pass; gradients are summed (not averaged) over the ranks in fp32.
    """
    data = data_mesh(mesh, layout)
    # Inputs are not cast: rotation tables are fp32 on purpose.
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy() if layout.offload else OffloadPolicy()
    some = layout.reshard_to if layout.zero == 3 and layout.reshard_to != layout.fsdp else None
    with nullcontext() if some is None else _resharded_over(reshard_mesh(mesh, layout)):
        for unit in units:
            fully_shard(
                unit,
                mesh=data,
                reshard_after_forward=some or layout.zero == 3,
                mp_policy=precision,
                offload_policy=offload,
            )
    fully_shard(root, mesh=data, reshard_after_forward=False, mp_policy=precision, offload_policy=offload)
    # Split modules return views; nothing writes into what a unit returned.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    if hasattr(root, "loss"):
        register_fsdp_forward_method(root, "loss")
    for module in (root, *units):
        sharded = cast(FSDPModule, module)
        if data.size() > 1:  # FSDP2 would divide by 1, in a copy
            sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # without it a factor of 1 asks for NCCL's premultiplied sum
    _prefetch([cast(FSDPModule, unit) for unit in units], layout.prefetch)
    return FSDPRoot(root, layout)


def fsdp_param_groups(root: FSDPModule) -> Iterator[_fsdp_param_group.FSDPParamGroup]:
    """What FSDP2 gathers and reduces as one, of all modules that share a root with this one, once a forward pass has found them.

    No public name leads there; torch's pipelines go this way too, in `perform_reduce_grad`.
    """
    for state in root._get_fsdp_state()._state_ctx.all_states:
        if state._fsdp_param_group is not None:
            yield state._fsdp_param_group


@contextmanager
def _resharded_over(near: DeviceMesh) -> Iterator[None]:
    """What is sharded in here with a number for `reshard_after_forward` is in parts over axis 1 of `near` after its forward pass.

    By itself FSDP2 makes a mesh for each module of that number: two process groups a block, in calls that all ranks of the world must make
    alike, while those of each tensor part or stage would make their own, and hang. No public name takes a mesh that is there: in here the
    two private ones are replaced by which FSDP2 finds the mesh and makes its parameters, the same in torch 2.11 to 2.13.
    """
    info = HSDPMeshInfo(near, shard_mesh_dim=1, replicate_mesh_dim=0)
    with (
        patch.object(_fully_shard, "_get_post_forward_mesh_info", lambda *_: info),
        patch.object(_fsdp_param_group, "FSDPParam", _Parameter),
    ):
        yield


class _Parameter(FSDPParam):
    """A parameter that may be split by tensor parallelism too.

    FSDP2 refuses to leave such a DTensor in parts over some ranks, for want of a placement to show meanwhile. Nobody looks at it then:
    what the backward pass gathers is the plain data beside it, made of a tensor part as of a whole parameter.
    """

    def to_sharded_post_forward(self) -> None:
        """As that of a parameter that is no DTensor."""
        split, self.is_dtensor = self.is_dtensor, False
        try:
            super().to_sharded_post_forward()
        finally:
            self.is_dtensor = split


def _prefetch(units: Sequence[FSDPModule], ahead: int) -> None:
    """Each unit, once gathered, has the next `ahead` ones gathered; 0 leaves it to FSDP2, which gathers one ahead when it is asked for.

    Where units stay gathered there is nothing to do: below ZeRO-3 that is so from the first forward pass of a step to its end.
    """
    for i, unit in enumerate(units if ahead else ()):
        unit.set_modules_to_forward_prefetch(list(units[i + 1 : i + 1 + ahead]))
        unit.set_modules_to_backward_prefetch(list(reversed(units[max(0, i - ahead) : i])))
