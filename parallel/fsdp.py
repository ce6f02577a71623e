"""Data parallelism: replicated, ZeRO-1, 2 and 3 (arXiv:1910.02054), and hybrids of them, by FSDP2.

Each rank keeps its shard of the fp32 master weights and of the optimizer state at every ZeRO stage. The stages differ
in what lives between the first forward pass and the last backward pass of a step. In bytes per parameter, in bf16
with AdamW on N "fsdp" ranks:

| `zero` | compute weights   | gradients, fp32 | master weights, moments | all-gathers a step | reduce-scatters a step |
|--------|-------------------|-----------------|-------------------------|--------------------|------------------------|
| 1      | 2, all            | 4, all          | (4 + 8) / N             | 1                  | 1                      |
| 2      | 2, all            | 4 / N           | (4 + 8) / N             | 1                  | 1 a microbatch         |
| 3      | 2, few blocks     | 4 / N           | (4 + 8) / N             | 2 a microbatch     | 1 a microbatch         |

In fp32 compute weights take 4 bytes. `replicate` adds one all-reduce of the sharded gradients per step; with
`shard=1` it is plain data parallelism.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

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

from parallel.layout import Layout
from parallel.mesh import data_mesh, reshard_mesh
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
    root: nn.Module, units: Sequence[nn.Module], mesh: DeviceMesh, layout: Layout, dtype: torch.dtype
) -> FSDPRoot:
    """Shard the parameters of `root` in place. They become DTensors that hold this rank's fp32 master weights.

    Args:
        root: on the meta device or with values. If it has a method `loss`, that may be called like its forward.
        units: modules inside it. The parameters of a unit are gathered and freed together. In the order of their use.
            Parameters outside of the units stay gathered from the forward to the backward pass of the root.
        mesh: of `parallel.mesh.build_mesh`.
        layout: its `zero`, `reshard_to`, `prefetch` and `offload` are used here.
        dtype: of the forward and backward pass. Gradients are summed, not averaged, over the ranks in fp32.
    """
    data = data_mesh(mesh, layout)
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # RoPE's tables stay fp32
    )
    offload = CPUOffloadPolicy() if layout.offload else OffloadPolicy()
    reshard_to = layout.reshard_to if layout.zero == 3 and layout.reshard_to != layout.fsdp else None
    with nullcontext() if reshard_to is None else fsdp_resharding_over(reshard_mesh(mesh, layout)):
        for unit in units:
            fully_shard(
                unit,
                mesh=data,
                reshard_after_forward=reshard_to or layout.zero == 3,
                mp_policy=precision,
                offload_policy=offload,
            )
    fully_shard(root, mesh=data, reshard_after_forward=False, mp_policy=precision, offload_policy=offload)
    # Modules under tensor parallelism return views. Nothing writes into what a unit returned.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    if hasattr(root, "loss"):
        register_fsdp_forward_method(root, "loss")
    for module in (root, *units):
        sharded = cast(FSDPModule, module)
        if data.size() > 1:  # with one rank FSDP2 would copy the gradients to divide them by 1
            sharded.set_gradient_divide_factor(1.0)
        # Otherwise a factor of 1 makes FSDP2 ask for NCCL's premultiplied sum.
        sharded.set_force_sum_reduction_for_comms(True)
    _set_prefetch([cast(FSDPModule, unit) for unit in units], layout.prefetch)
    return FSDPRoot(root, layout)


def _set_prefetch(units: Sequence[FSDPModule], n_ahead: int) -> None:
    """Make each gathered unit start the gathers of the next `n_ahead` units. With 0, FSDP2 decides: it prefetches one.

    Below ZeRO-3 this changes nothing after the first forward pass of a step, because units stay gathered.
    """
    for i, unit in enumerate(units if n_ahead else ()):
        unit.set_modules_to_forward_prefetch(list(units[i + 1 : i + 1 + n_ahead]))
        unit.set_modules_to_backward_prefetch(list(reversed(units[max(0, i - n_ahead) : i])))
