"""Run the code that trains as any rank of any layout, in one process, without memory for tensors and without peers.

Inside `fake_world`:

- Floating-point CPU tensors that are created from nothing (parameters, buffers, constants) are fake: they have shape,
  dtype and storage size but no memory, and so has everything computed from them. Integers are real: positions, document
  ids and ranks of a mesh decide what the code does.
- Reading a number from a fake tensor gives 1.
- Collectives return at once. Their results mean nothing, except that integers received from a neighbour are 1, which
  answers a yes/no question with yes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.torch_compat import (
    READ_SCALAR,
    WAIT_TENSOR,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    active_fake_mode,
    clear_mesh_caches,
    fake_store,
    is_traceable_wrapper_subclass_type,
)


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """Be `rank` of `size` inside the block, and compute no numbers.

    Tensors created inside are useless outside. No other process group may exist.
    """
    clear_mesh_caches()
    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=size)
    try:
        with _FakeFloats(FakeTensorMode(allow_non_fake_inputs=True)):
            yield
    finally:
        dist.destroy_process_group()
        clear_mesh_caches()


class _FakeFloats(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Makes floating-point tensors fake when they are created."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._fake_mode = fake_mode

    # Any: operators and arguments that torch passes to a dispatch mode have no public type.
    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a DTensor: torch calls again with its local tensors
        if active_fake_mode() is not None:  # DTensor propagates shapes
            return operator(*args, **kwargs)
        if operator is READ_SCALAR and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        if operator is WAIT_TENSOR:
            return args[0]  # waiting returns its argument; the fake mode would return another tensor
        if operator is torch.ops.c10d.recv_.default:
            for received in args[0]:
                if not isinstance(received, FakeTensor):
                    received.fill_(1)
        if _creates(args, kwargs):
            with self._fake_mode:
                created = operator(*args, **kwargs)
            if isinstance(created, Tensor) and created.is_floating_point():
                return created
        return operator(*args, **kwargs)


def _creates(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:  # Any: as above
    """Whether an operator creates CPU tensors: from no tensor, or from tensors on the meta device."""
    device = kwargs.get("device")
    if device is None:
        return next(tensors_in(args), None) is None
    return torch.device(device).type == "cpu" and all(map(_is_meta, tensors_in(args)))


def _is_meta(tensor: Tensor) -> bool:
    return tensor.device.type == "meta" and not isinstance(tensor, FakeTensor)


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in an operator's arguments or results, also inside lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from tensors_in(element)
