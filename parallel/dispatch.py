"""Dispatchers of a mixture of experts that communicate: bring tokens to the ranks of their experts, and results back.

A layer has a dispatcher with three methods (`Dispatcher`). That of one process sorts tokens by expert. The dispatchers
here are put around it:

- `AllToAllDispatcher` (GShard, arXiv:2006.16668): each rank has some of the experts. The rows that the inner
  dispatcher has sorted go to the ranks of their experts, in uneven all-to-alls, and come back.
- `ExpertTensorDispatcher`: each rank has a part of the width of the same experts. It gathers the tokens of all ranks
  before, and adds up and scatters the results after.

`send` starts the messages and `receive` waits for them. Between the two the layer computes its shared experts. In the
backward pass the gradients travel during the shared experts' backward pass, because autograd runs operators in the
reverse of their order. All permutations are gathers, backward too: gradients do not depend on the order of additions.

The host waits for the device once per layer and pass: the split sizes of the all-to-alls are Python numbers.

Shape suffixes: T local tokens, K experts of a token, D model width, E experts, N ranks of the group, L = E/N experts of
a rank, X rows that a rank sends or has got. A row is a token on its way to one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.collectives import all_gather, reduce_scatter
from parallel.torch_compat import (
    FakeTensor,
    all_gather_tensor,
    all_to_all_tensor,
    start_all_to_all,
    wait_tensor,
)


class ExpertRows(NamedTuple):
    """The input of a rank's experts: rows grouped by expert."""

    x_XD: Tensor
    weight_X: Tensor
    """fp32, the routing weight."""
    offsets_E: Tensor
    """int32, the end of each expert's rows. Rows behind the last are never read."""
    key_X: Tensor | None
    """For what is drawn at random, if anything is."""


class Dispatcher(Protocol):
    """How a layer brings tokens to experts, here and in the model."""

    # Any: each dispatcher has a type of its own for what it has sent.
    def send(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, key_TK: Tensor | None) -> Any:
        """Start to send tokens to their experts. An assignment to expert E is dropped."""

    def receive(self, in_flight: Any) -> ExpertRows:
        """Wait for the rows of this rank's experts."""

    def combine(self, y_XD: Tensor, in_flight: Any) -> Tensor:
        """Send the results back and add up those of each token: [T, D]."""


class _Splits(NamedTuple):
    """How many rows go to and come from each rank of a group."""

    sent: list[int]
    received: list[int]
    group_name: str

    @property
    def reversed(self) -> _Splits:
        return _Splits(self.received, self.sent, self.group_name)


class _InFlight(NamedTuple):
    inner: Any  # Any: what the inner dispatcher has sent
    n_rows: int
    """That it has sorted, dropped ones included."""
    splits: _Splits
    x_XD: _Message
    weight_X: _Message
    key_X: Tensor | None
    """To be waited for."""
    offsets_E: Tensor
    order_X: Tensor | None
    """Which received row is the next of this rank's first expert, and so on; None if they come in that order."""


class AllToAllDispatcher:
    """`Dispatcher` over ranks that the experts are divided among: rank i has experts i*L to (i+1)*L - 1."""

    def __init__(self, inner: Dispatcher, group: ProcessGroup) -> None:
        """Put it around the dispatcher of one process, which sorts by all E experts."""
        self._inner = inner
        self._size, self._name = group.size(), group.group_name

    # Not compiled: the numbers of rows differ from step to step, and they are read on the host.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def send(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, key_TK: Tensor | None) -> _InFlight:
        """See `Dispatcher`."""
        inner = self._inner.send(x_TD, expert_TK, weight_TK, key_TK)
        x_XD, weight_X, offsets_E, key_X = self._inner.receive(inner)
        sent_NL = offsets_E.diff(prepend=offsets_E.new_zeros(1)).view(self._size, -1)
        received_NL = all_to_all_tensor(sent_NL.flatten(), self._size, self._name).view(self._size, -1)
        splits = self._read_splits(sent_NL, received_NL, expert_TK.numel())
        n_sent = sum(splits.sent)  # dropped rows stay behind
        return _InFlight(
            inner,
            len(x_XD),
            splits,
            _Message.start(x_XD[:n_sent], splits),
            _Message.start(weight_X[:n_sent], splits),
            None if key_X is None else start_all_to_all(key_X[:n_sent], splits.received, splits.sent, self._name),
            received_NL.sum(0).cumsum(0, dtype=torch.int32),
            _order_by_expert(received_NL, sum(splits.received)),
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def receive(self, in_flight: _InFlight) -> ExpertRows:
        """See `Dispatcher`."""
        x_XD, weight_X, order_X = in_flight.x_XD.wait(), in_flight.weight_X.wait(), in_flight.order_X
        key_X = None if in_flight.key_X is None else wait_tensor(in_flight.key_X)
        if order_X is not None:
            inverse_X = _inverse(order_X)
            x_XD, weight_X = _reorder(x_XD, order_X, inverse_X), _reorder(weight_X, order_X, inverse_X)
            key_X = None if key_X is None else key_X[order_X]
        return ExpertRows(x_XD, weight_X, in_flight.offsets_E, key_X)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def combine(self, y_XD: Tensor, in_flight: _InFlight) -> Tensor:
        """See `Dispatcher`."""
        if in_flight.order_X is not None:
            y_XD = _reorder(y_XD, _inverse(in_flight.order_X), in_flight.order_X)
        back_XD = _Message.start(y_XD, in_flight.splits.reversed).wait()
        if len(back_XD) < in_flight.n_rows:  # the inner dispatcher has places for dropped rows, which it does not read
            back_XD = F.pad(back_XD, (0, 0, 0, in_flight.n_rows - len(back_XD)))
        return self._inner.combine(back_XD, in_flight.inner)

    def _read_splits(self, sent_NL: Tensor, received_NL: Tensor, n_assignments: int) -> _Splits:
        """The one wait of the host for the device."""
        if isinstance(sent_NL, FakeTensor):  # has no numbers (`parallel.simulate.fake_world`): as if balanced
            even = [n_assignments // self._size] * self._size
            return _Splits(even, even, self._name)
        sent, received = torch.stack((sent_NL.sum(1), received_NL.sum(1))).tolist()
        return _Splits(sent, received, self._name)


class ExpertTensorDispatcher:
    """`Dispatcher` over ranks that split the width of the same experts: each computes addends for all their tokens."""

    def __init__(self, inner: Dispatcher, group: ProcessGroup) -> None:
        """Put it around the dispatcher that brings the tokens of all these ranks to their experts."""
        self._inner = inner
        self._group = group

    # Any: what the inner dispatcher has sent.
    def send(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, key_TK: Tensor | None) -> Any:
        """See `Dispatcher`. All ranks have equally many tokens."""
        size, name = self._group.size(), self._group.group_name
        key_TK = None if key_TK is None else all_gather_tensor(key_TK.contiguous(), size, name)
        expert_TK = all_gather_tensor(expert_TK.contiguous(), size, name)
        return self._inner.send(
            all_gather(x_TD, self._group, 0), expert_TK, all_gather(weight_TK, self._group, 0), key_TK
        )

    def receive(self, in_flight: Any) -> ExpertRows:  # Any: as above
        """See `Dispatcher`."""
        return self._inner.receive(in_flight)

    def combine(self, y_XD: Tensor, in_flight: Any) -> Tensor:  # Any: as above
        """See `Dispatcher`."""
        return reduce_scatter(self._inner.combine(y_XD, in_flight), self._group, 0)


def _order_by_expert(received_NL: Tensor, n_rows: int) -> Tensor | None:
    """The received rows are sorted by rank, then by expert. Returns the order by expert, then by rank."""
    N, L = received_NL.shape
    if L == 1:
        return None
    expert_NL = torch.arange(L, device=received_NL.device).repeat(N)
    expert_X = expert_NL.repeat_interleave(received_NL.flatten(), output_size=n_rows)
    return expert_X.sort(stable=True).indices


def _inverse(order_X: Tensor) -> Tensor:
    rows_X = torch.arange(len(order_X), device=order_X.device)
    return torch.empty_like(order_X).scatter_(0, order_X, rows_X)


@dataclass
class _Message:
    """Rows on their way, and in the backward pass their gradients on the way back."""

    splits: _Splits
    x_X: Tensor | None = None
    """Until `wait`. Then its graph holds this message, and the two must not hold each other."""
    grad_X: Tensor | None = None
    """On its way: autograd cannot pass it on, because it has the shape of what was sent, not of what was received."""

    @classmethod
    def start(cls, x_X: Tensor, splits: _Splits) -> _Message:
        """Start to exchange rows."""
        message = cls(splits)
        message.x_X = _Start.apply(x_X, message)  # type: ignore[no-untyped-call]  # untyped in torch
        return message

    def wait(self) -> Tensor:
        """Wait for the rows. Call it once."""
        x_X, self.x_X = self.x_X, None
        out: Tensor = _Wait.apply(x_X, self)  # type: ignore[no-untyped-call]  # untyped in torch
        return out


def _reorder(x_X: Tensor, order_X: Tensor, inverse_X: Tensor) -> Tensor:
    """Permute rows; the backward pass permutes them back."""
    out: Tensor = _Reorder.apply(x_X, order_X, inverse_X)  # type: ignore[no-untyped-call]  # untyped in torch
    return out


class _Start(torch.autograd.Function):
    """Starts a message. Its backward pass waits for the gradient, which that of `_Wait` has started."""

    # Any: torch's context takes any attribute.
    @staticmethod
    def forward(ctx: Any, x_X: Tensor, message: _Message) -> Tensor:
        ctx.message = message
        sent, received, group_name = message.splits
        return start_all_to_all(x_X, received, sent, group_name)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # Any: as above
        message: _Message = ctx.message
        assert message.grad_X is not None
        grad_X, message.grad_X = message.grad_X, None
        return wait_tensor(grad_X), None


class _Wait(torch.autograd.Function):
    """Waits for a message. Its backward pass starts that of the gradient."""

    # Any: as above.
    @staticmethod
    def forward(ctx: Any, x_X: Tensor, message: _Message) -> Tensor:
        ctx.message = message
        return wait_tensor(x_X)

    @staticmethod
    def backward(ctx: Any, grad_X: Tensor) -> tuple[Tensor, None]:  # Any: as above
        message: _Message = ctx.message
        sent, received, group_name = message.splits
        message.grad_X = start_all_to_all(grad_X, sent, received, group_name)
        return grad_X, None  # of the right shape; `_Start` does not read it


class _Reorder(torch.autograd.Function):
    """A permutation of rows."""

    # Any: as above.
    @staticmethod
    def forward(ctx: Any, x_X: Tensor, order_X: Tensor, inverse_X: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_X)
        return x_X.index_select(0, order_X)

    @staticmethod
    def backward(ctx: Any, grad_X: Tensor) -> tuple[Tensor, None, None]:  # Any: as above
        (inverse_X,) = ctx.saved_tensors
        return grad_X.index_select(0, inverse_X), None, None
