"""A world that is not there: one process takes the place of any rank of any number of them, without memory for tensors and without peers.

The code that trains runs as it is, with these differences:

- Floating-point tensors on the CPU that are made of nothing (parameters, buffers, constants) are pretended: they have shape, type and
  storage size, but no memory, and so has all that is computed with them. Integers are real: positions, document ids and ranks in a grid
  decide what is done.
- A number that is read of a pretended tensor is 1.
- Collectives return at once. What they leave in real tensors means nothing, but that integers received from a neighbour are 1: in
  answer to questions, that is yes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import active_fake_mode  # private; what is public says only whether some mode of any kind is active
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # documented, under this very name
from torch.testing._internal.distributed.fake_pg import (
    FakeStore,
)  # importing it makes the backend "fake" known; there is no public way
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from parallel.mesh import forget_meshes


@contextmanager
def pretend(rank: int, size: int) -> Iterator[None]:
    """Inside, this process is `rank` of `size`, and its numbers are not computed.

    Tensors made inside are of no use outside, and no other process group may be there.
    """
    forget_meshes()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with _Pretence(FakeTensorMode(allow_non_fake_inputs=True)):
            yield
    finally:
        dist.destroy_process_group()
        forget_meshes()


class _Pretence(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._fake = fake

    # Any: what torch dispatches to a mode, operators and their arguments, has no public type.
    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a DTensor: it asks again with its local tensors
        if active_fake_mode() is not None:  # a DTensor looks what shape a result has
            return operator(*args, **kwargs)
        if operator is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        if operator is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as it is where somebody waits; pretended it would be another tensor
        if operator is torch.ops.c10d.recv_.default:
            for received in args[0]:
                if not isinstance(received, FakeTensor):
                    received.fill_(1)
        if _makes(args, kwargs):
            with self._fake:
                pretended = operator(*args, **kwargs)
            if isinstance(pretended, Tensor) and pretended.is_floating_point():
                return pretended
        return operator(*args, **kwargs)


def _makes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:  # Any: as above
    """Whether an operator makes tensors in memory of nothing, or of tensors that have but a shape."""
    device = kwargs.get("device")
    if device is None:
        return next(tensors_in(args), None) is None
    return torch.device(device).type == "cpu" and all(map(_is_shape, tensors_in(args)))


def _is_shape(tensor: Tensor) -> bool:
    return tensor.device.type == "meta" and not isinstance(tensor, FakeTensor)


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results: themselves, or in lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
