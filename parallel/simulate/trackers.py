"""What a rank holds and what it sends, measured while the code that trains runs: real tensors, or those of `parallel.simulate.fake_world`.

Both meters see every operator that PyTorch runs, backward pass and optimizer included; they slow it down, and are for tests and dry runs.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage
from torch._C._distributed_c10d import _resolve_process_group  # nothing public finds a group by its name
from torch._guards import active_fake_mode  # private: tells what DTensor makes to try from what a rank holds
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from parallel.engines.torch.engine import TorchEngine
from parallel.fsdp import groups_of
from parallel.layout import Layout
from parallel.simulate.fake_world import tensors_in

KINDS = ("parameters", "optimizer state", "gradients", "gathered parameters")
"""What `kinds_of` tells apart; all else that lives are activations and temporary tensors."""
REST = "activations"

_GROWTH = 1.01
"""A new peak is looked at when it is that much higher than the last: counting everything anew at every operator would take hours."""

_LOOK_EVERY = 1024
"""Operators after which kinds are told apart again, so that none has its most unseen; it takes milliseconds."""

Kinds = Callable[[], Mapping[str, Iterable[Tensor]]]


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """The bytes of all tensor storages that were made, or used, while it was active and still live; views count once.

    A storage that loses its memory but lives on (FSDP2 frees gathered parameters so) does not tell: what is counted is too high until
    somebody looks, never too low. So everything is counted anew before a number is given, or a new peak believed; `peak` is right to 1%.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._live: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}
        self._bytes = 0
        self._kinds: Kinds = dict
        self.peak = 0
        """Bytes."""
        self.most: dict[str, int] = {}
        """Of each kind by itself, at its most; see `by_kind`."""
        self._seen = 0

    def watch(self, kinds: Kinds) -> None:
        """From here on tell apart what lives by these kinds, and begin a new peak."""
        self._kinds = kinds
        self.peak, self.most = 0, {}

    def live(self) -> int:
        """Bytes that live now."""
        for key, (storage, size) in list(self._live.items()):
            alive = storage()
            if alive is not None and (now := alive.nbytes()) != size:
                self._count(key, storage, now)
        return self._bytes

    def by_kind(self) -> dict[str, int]:
        """Bytes that live now, by kind; what is of no kind is `activations`. A storage of two kinds is of the first."""
        total, found, seen = self.live(), dict[str, int](), set[int]()
        for kind, tensors in self._kinds().items():
            found[kind] = 0
            for tensor in tensors:
                storage = _local(tensor).untyped_storage()
                if id(storage) not in seen:
                    seen.add(id(storage))
                    found[kind] += storage.nbytes()
        found[REST] = total - sum(found.values())
        self.most = {kind: max(count, self.most.get(kind, 0)) for kind, count in found.items()}
        return found

    # Any: what torch dispatches to a mode, operators and their arguments, has no public type.
    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a DTensor: it asks again with its local tensors
        result = operator(*args, **(kwargs or {}))
        if active_fake_mode() is not None:  # a DTensor looks what shape a result has
            return result
        for x in chain(tensors_in(args), tensors_in(result), tensors_in(tuple(kwargs.values()) if kwargs else ())):
            if x.device.type != "meta":
                self._see(x.untyped_storage())
        self._seen += 1
        if self._bytes > self.peak * _GROWTH and self.live() > self.peak:
            self.peak = self._bytes
            self.by_kind()
        elif self._seen % _LOOK_EVERY == 0:
            self.by_kind()
        return result

    def _see(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        known = self._live.get(key)
        if known is None:
            self._count(key, weakref.ref(storage, lambda _: self._forget(key)), size)
        elif known[1] != size:
            self._count(key, known[0], size)

    def _count(self, key: int, storage: weakref.ref[UntypedStorage], size: int) -> None:
        self._bytes += size - (self._live[key][1] if key in self._live else 0)
        self._live[key] = storage, size

    def _forget(self, key: int) -> None:
        self._bytes -= self._live.pop(key)[1]


def kinds_of(engine: TorchEngine) -> Kinds:
    """What an engine holds between two steps, and what it makes in one, by KINDS. Call it while nothing is gathered."""
    state = engine.state()
    masters = [x for x in state["model"].values() if isinstance(x, Tensor)]
    parts = [parameter for part in engine.parts for parameter in part.parameters()]
    masters += [parameter for parameter in parts if isinstance(parameter, DTensor)]  # twins of tied parameters
    slots = [x for slots in state["optimizer"].values() if isinstance(slots, dict) for x in slots.values()]

    sharded = [module for part in engine.parts for module in part.modules() if isinstance(module, FSDPModule)]
    adds_up = engine.layout.zero == 1 or engine.layout.pipeline > 1

    def kinds() -> dict[str, list[Tensor]]:
        owned = engine.masters.values()
        return {
            "parameters": masters,
            "optimizer state": slots,
            "gradients": [*(p.grad for p in owned if p.grad is not None), *_whole_gradients(sharded, adds_up)],
            "gathered parameters": [parameter for part in engine.parts for parameter in part.parameters()],
        }

    return kinds


def _whole_gradients(modules: Iterable[FSDPModule], adds_up: bool) -> Iterator[Tensor]:
    """What FSDP2 has added up and not yet reduced.

    adds_up: over the microbatches of a step. It then does so where autograd leaves gradients, if they are of the type that it adds up in.
    """
    groups = {id(group): group for module in modules for group in groups_of(module)}
    for group in groups.values():
        for parameter in group.fsdp_params:
            if parameter.unsharded_accumulated_grad is not None:
                yield parameter.unsharded_accumulated_grad
            elif adds_up and hasattr(parameter, "_unsharded_param"):  # gathered once at least
                gradient = parameter.unsharded_param.grad
                if gradient is not None and gradient.dtype == torch.float32:
                    yield gradient


def _local(tensor: Tensor) -> Tensor:
    return (
        tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    )  # to_local() would be an operator of its own, seen by meters


ALL = "all ranks"
"""The axis of what every rank tells every other."""

_SENT: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1.0,  # of the rank's own part, which is an n-th of the whole
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "send": lambda n: 1.0,
}
"""Bytes a rank sends by a ring of n, a byte that it puts in."""

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
"""Operators that move something, by their names in PyTorch's dispatcher: (operation, which argument holds what this rank puts in)."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """The bytes that this rank sent while it was active, as ring algorithms send them, by axis of the layout and operation.

    With n ranks in the group: all-gather and reduce-scatter (n - 1) / n of the whole tensor, all-reduce twice that, all-to-all (n - 1) / n
    of what the rank has, send all of it.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._layout = layout
        self._axes: dict[str, str] = {}
        self.sent: dict[str, Counter[str]] = {}
        """{axis: {operation: bytes}}; the axis "fsdp" is `shard` and `context` together."""
        self.calls: dict[str, Counter[str]] = {}
        """{axis: {operation: how often}}."""

    # Any: as in Meter.
    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented
        if operator.namespace in ("c10d", "_c10d_functional"):
            operation, place = _COLLECTIVES.get(operator.name().split(".")[0], ("", 0))
            group = _group(operator.namespace, place, args) if operation else None
            if group is not None and group.size() > 1:
                put_in = sum(x.numel() * x.element_size() for x in tensors_in(args[place]))
                axis = self._axes.setdefault(group.group_name, _axis(group, self._layout))
                self.sent.setdefault(axis, Counter())[operation] += round(put_in * _SENT[operation](group.size()))
                self.calls.setdefault(axis, Counter())[operation] += 1
        return operator(*args, **(kwargs or {}))


def _group(namespace: str, place: int, args: tuple[Any, ...]) -> ProcessGroup:  # Any: operators' arguments
    """The group of a collective: an argument behind the tensors, or one by name, the last string."""
    if namespace == "c10d":
        return ProcessGroup.unbox(args[place + 1])
    return _resolve_process_group([x for x in args if isinstance(x, str)][-1])  # type: ignore[arg-type]  # a str by another name


def _axis(group: ProcessGroup, layout: Layout) -> str:
    """What a group is for: groups of a mesh say it themselves, but an axis of all ranks shares the group of all ranks."""
    if group.group_desc.startswith("mesh_"):
        axis = group.group_desc.removeprefix("mesh_")
        return "fsdp" if axis in ("shard", "near") else axis  # without `context`; neighbours under `reshard_to`
    places = [layout.coordinates(rank) for rank in dist.get_process_group_ranks(group)]
    axes = [axis for axis in places[0] if len({place[axis] for place in places}) > 1]
    named = {("shard",): "fsdp", ("context",): "fsdp, context", ("shard", "context"): "fsdp"}
    return named.get(tuple(axes), axes[0] if len(axes) == 1 else ALL)
