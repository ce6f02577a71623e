"""Measure the memory of a rank while the code that trains runs, on real tensors or in `parallel.simulate.fake_world`.

The tracker sees every operator, backward pass and optimizer included. That is slow: use it in tests and dry runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, UntypedStorage
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel.engine import InspectableEngine
from parallel.simulate.fake_world import tensors_in
from parallel.torch_compat import (
    TorchDispatchMode,
    active_fake_mode,
    is_traceable_wrapper_subclass_type,
    local_tensor,
    unsharded_gradients,
)

KINDS = ("parameters", "optimizer state", "gradients", "gathered parameters")
"""The kinds that `tensor_kinds` tells apart."""
ACTIVATIONS = "activations"
"""Everything else that is live: activations and temporary tensors."""

_PEAK_STEP = 1.01
"""Recount when the estimate exceeds the last peak by this factor. Recounting at every operator would take hours."""

_RECOUNT_EVERY = 1024
"""Operators after which all kinds are counted again, so that the peak of none is missed. A count takes milliseconds."""

TensorKinds = Callable[[], Mapping[str, Iterable[Tensor]]]
"""Returns the live tensors of each kind."""


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Counts the bytes of all live tensor storages that operators created or used while it was active.

    Views count once. A storage whose memory is freed while it stays alive gives no signal (FSDP2 frees gathered
    parameters like that), so the running count is an upper bound. The tracker recounts before it returns a number or
    accepts a new peak. `peak` is exact to 1%.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._live: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}
        self._bytes = 0
        self._kinds: TensorKinds = dict
        self.peak = 0
        """Bytes."""
        self.peak_by_kind: dict[str, int] = {}
        """Bytes. Each kind has its own peak, perhaps at another moment; see `by_kind`."""
        self._n_operators = 0

    def watch(self, kinds: TensorKinds) -> None:
        """Tell these kinds apart from now on, and start a new peak."""
        self._kinds = kinds
        self.peak, self.peak_by_kind = 0, {}

    def live(self) -> int:
        """Bytes that are live now."""
        for key, (reference, size) in list(self._live.items()):
            storage = reference()
            if storage is not None and (size_now := storage.nbytes()) != size:
                self._count(key, reference, size_now)
        return self._bytes

    def by_kind(self) -> dict[str, int]:
        """Bytes that are live now, by kind. A storage of two kinds counts for the first."""
        total, counts, counted = self.live(), dict[str, int](), set[int]()
        for kind, tensors in self._kinds().items():
            counts[kind] = 0
            for tensor in tensors:
                storage = _local(tensor).untyped_storage()
                if id(storage) not in counted:
                    counted.add(id(storage))
                    counts[kind] += storage.nbytes()
        counts[ACTIVATIONS] = total - sum(counts.values())
        self.peak_by_kind = {kind: max(count, self.peak_by_kind.get(kind, 0)) for kind, count in counts.items()}
        return counts

    # Any: operators and arguments that torch passes to a dispatch mode have no public type.
    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a DTensor: torch calls again with its local tensors
        result = operator(*args, **(kwargs or {}))
        if active_fake_mode() is not None:  # DTensor propagates shapes
            return result
        for tensor in chain(tensors_in(args), tensors_in(result), tensors_in(tuple(kwargs.values()) if kwargs else ())):
            if tensor.device.type != "meta":
                self._record(tensor.untyped_storage())
        self._n_operators += 1
        if self._bytes > self.peak * _PEAK_STEP and self.live() > self.peak:
            self.peak = self._bytes
            self.by_kind()
        elif self._n_operators % _RECOUNT_EVERY == 0:
            self.by_kind()
        return result

    def _record(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        known = self._live.get(key)
        if known is None:
            self._count(key, weakref.ref(storage, lambda _: self._forget(key)), size)
        elif known[1] != size:
            self._count(key, known[0], size)

    def _count(self, key: int, reference: weakref.ref[UntypedStorage], size: int) -> None:
        self._bytes += size - (self._live[key][1] if key in self._live else 0)
        self._live[key] = reference, size

    def _forget(self, key: int) -> None:
        self._bytes -= self._live.pop(key)[1]


def tensor_kinds(engine: InspectableEngine) -> TensorKinds:
    """The tensors of an engine by KINDS, during a step and between steps. Call it while no parameter is gathered."""
    state = engine.state()
    chunk_parameters = [parameter for part in engine.model_chunks for parameter in part.parameters()]
    # DTensors are sharded master weights. Those that the state lacks are copies of tied parameters on another stage.
    master_weights = [x for x in state["model"].values() if isinstance(x, Tensor)]
    master_weights += [parameter for parameter in chunk_parameters if isinstance(parameter, DTensor)]
    optimizer_state = [x for slots in state["optimizer"].values() if isinstance(slots, dict) for x in slots.values()]

    fsdp_modules = [
        module for part in engine.model_chunks for module in part.modules() if isinstance(module, FSDPModule)
    ]
    accumulates_unsharded = engine.layout.zero == 1 or engine.layout.pipeline > 1

    def kinds() -> dict[str, list[Tensor]]:
        sharded_gradients = [p.grad for p in engine.master_weights.values() if p.grad is not None]
        return {
            "parameters": master_weights,
            "optimizer state": optimizer_state,
            "gradients": [*sharded_gradients, *unsharded_gradients(fsdp_modules, accumulates_unsharded)],
            "gathered parameters": [parameter for part in engine.model_chunks for parameter in part.parameters()],
        }

    return kinds


def _local(tensor: Tensor) -> Tensor:
    # Not to_local(): that is an operator, which trackers would see.
    return local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
