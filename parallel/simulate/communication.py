"""Measure what a rank sends while the code that trains runs, on real tensors or in `parallel.simulate.fake_world`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel.layout import Layout
from parallel.simulate.fake_world import tensors_in
from parallel.torch_compat import TorchDispatchMode, find_process_group, is_traceable_wrapper_subclass_type

WORLD = "all ranks"
"""The axis of collectives over all ranks."""

_BYTES_SENT_PER_INPUT_BYTE: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1.0,  # the input is the rank's own part, 1/n of the whole
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "send": lambda n: 1.0,
}
"""By a ring algorithm over n ranks."""

_COLLECTIVES = {
    "c10d::allgather_": ("all-gather", 1),
    "c10d::_allgather_base_": ("all-gather", 1),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::alltoall_": ("all-to-all", 1),
    "c10d::alltoall_base_": ("all-to-all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", 0),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all-gather", 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce-scatter", 0),
    "_c10d_functional::all_reduce": ("all-reduce", 0),
    "_c10d_functional::all_reduce_": ("all-reduce", 0),
    "_c10d_functional::all_reduce_coalesced": ("all-reduce", 0),
    "_c10d_functional::all_to_all_single": ("all-to-all", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
}
"""Operators that communicate, by name in PyTorch's dispatcher: (operation, index of the input argument)."""


class CommTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Counts the bytes that this rank sends while it is active, as ring algorithms send them, by axis and operation.

    Over n ranks: all-gather and reduce-scatter send (n - 1) / n of the whole tensor, all-reduce twice that, all-to-all
    (n - 1) / n of the rank's input, send all of it.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._layout = layout
        self._axes: dict[str, str] = {}
        self.sent: dict[str, Counter[str]] = {}
        """{axis: {operation: bytes}}; the axis "fsdp" is `shard` and `context` together, and "expert_fsdp" is
        `expert_data` and `expert_tensor`."""
        self.calls: dict[str, Counter[str]] = {}
        """{axis: {operation: number of calls}}."""

    # Any: operators and arguments that torch passes to a dispatch mode have no public type.
    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented
        if operator.namespace in ("c10d", "_c10d_functional"):
            operation, index = _COLLECTIVES.get(operator.name().split(".")[0], ("", 0))
            group = _group(operator.namespace, index, args) if operation else None
            if group is not None and group.size() > 1:
                n_bytes = sum(x.numel() * x.element_size() for x in tensors_in(args[index]))
                factor = _BYTES_SENT_PER_INPUT_BYTE[operation](group.size())
                axis = _expert_axis(group, operator.namespace, operation, self._layout)
                axis = axis or self._axes.setdefault(group.group_name, _axis(group, self._layout))
                self.sent.setdefault(axis, Counter())[operation] += round(n_bytes * factor)
                self.calls.setdefault(axis, Counter())[operation] += 1
        return operator(*args, **(kwargs or {}))


def _group(namespace: str, input_index: int, args: tuple[Any, ...]) -> ProcessGroup:  # Any: operators' arguments
    """The group of a collective: for c10d the argument after the input, else the last string, which is its name."""
    if namespace == "c10d":
        return ProcessGroup.unbox(args[input_index + 1])
    name = [x for x in args if isinstance(x, str)][-1]
    return find_process_group(name)


def _expert_axis(group: ProcessGroup, namespace: str, operation: str, layout: Layout) -> str | None:
    """The expert axis of all ranks that a message must belong to, as it would be strange on another axis."""
    if group.group_desc.startswith("mesh_") or not layout.splits_experts:
        return None
    if operation == "all-to-all" and group.size() == layout.expert:
        return "expert"
    is_fsdp = namespace == "c10d" and operation in ("all-gather", "reduce-scatter")
    if is_fsdp and group.size() == layout.expert_fsdp != layout.fsdp:
        return "expert_data" if layout.expert_tensor == 1 else "expert_fsdp"
    return None


def _axis(group: ProcessGroup, layout: Layout) -> str:
    """The axis of a group. Mesh groups carry its name, except that an axis of all ranks reuses the world group."""
    if group.group_desc.startswith("mesh_"):
        axis = group.group_desc.removeprefix("mesh_")
        return "fsdp" if axis in ("shard", "reshard_shard") else axis  # the latter under `reshard_to`
    coordinates = [layout.coordinates(rank) for rank in dist.get_process_group_ranks(group)]
    axes = [axis for axis in coordinates[0] if len({at[axis] for at in coordinates}) > 1]
    names = {("shard",): "fsdp", ("context",): "fsdp, context", ("shard", "context"): "fsdp"}
    return names.get(tuple(axes), axes[0] if len(axes) == 1 else WORLD)
