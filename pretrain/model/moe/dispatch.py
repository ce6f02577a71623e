"""Bring tokens to their experts and the results back: the interface, and the way inside one process.

No index_add: the backward pass of each permutation gathers with the inverse permutation, so gradients are deterministic
and nothing waits for the device. Shape suffixes: T tokens, K experts of a token, X = T*K rows, E experts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertRows(NamedTuple):
    """Input of the experts of a rank, grouped by expert."""

    x_XD: Tensor
    weight_X: Tensor
    """fp32."""
    offsets_E: Tensor
    """Where the rows of each expert end, int32. Rows after the last end are undefined: do not read them."""
    key_X: Tensor | None


class Dispatcher(Protocol):
    """Brings tokens to the ranks of their experts. `parallel.expert` has those that communicate."""

    def send(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, key_TK: Tensor | None) -> Any:
        """Start to send each token to its experts; `n_experts` stands for none. What it returns, the others take."""

    def receive(self, in_flight: Any) -> ExpertRows:
        """Wait for the rows that this rank's experts got."""

    def combine(self, y_XD: Tensor, in_flight: Any) -> Tensor:
        """Send the results back and add up those of each token: [T, D]."""


class Permutation(NamedTuple):
    """Assignments sorted by expert."""

    order_X: Tensor
    """Index of the assignment (token * K + choice) in each row."""
    inverse_TK: Tensor
    """Row of each assignment."""
    offsets_E: Tensor
    kept_TK: Tensor | None
    """False where an assignment was dropped; None if none can be."""


def sort_by_expert(expert_TK: Tensor, n_experts: int, drops: bool) -> Permutation:
    """Sort the assignments by expert, those of one expert by token. `drops` says whether some may be dropped."""
    sorted_X, order_X = expert_TK.flatten().sort(stable=True)
    ends_E = torch.arange(1, n_experts + 1, device=sorted_X.device)
    offsets_E = torch.searchsorted(sorted_X, ends_E, out_int32=True)
    rows_X = torch.arange(len(order_X), device=order_X.device)
    inverse_TK = torch.empty_like(order_X).scatter_(0, order_X, rows_X).view_as(expert_TK)
    return Permutation(order_X, inverse_TK, offsets_E, expert_TK < n_experts if drops else None)


@dataclass
class _Sorted:
    """Tokens on their way to experts of the same rank."""

    permutation: Permutation
    rows: ExpertRows | None
    """Until they are received."""


class LocalDispatcher:
    """`Dispatcher` where one rank has all experts."""

    def __init__(self, n_experts: int, drops: bool) -> None:
        """`drops` says whether assignments may be dropped."""
        self._n_experts = n_experts
        self._drops = drops

    def for_experts(self, n_experts: int) -> LocalDispatcher:
        """Return a dispatcher for that many experts, which may drop assignments."""
        return LocalDispatcher(n_experts, drops=True)

    def send(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, key_TK: Tensor | None) -> _Sorted:
        """See `Dispatcher`."""
        permutation = sort_by_expert(expert_TK, self._n_experts, self._drops)
        key_X = None if key_TK is None else key_TK.flatten()[permutation.order_X]
        x_XD, weight_X = permute(x_TD, weight_TK, permutation)
        return _Sorted(permutation, ExpertRows(x_XD, weight_X, permutation.offsets_E, key_X))

    def receive(self, in_flight: _Sorted) -> ExpertRows:
        """See `Dispatcher`. Call it once: the rows may take gigabytes, and are not kept here any longer."""
        rows, in_flight.rows = in_flight.rows, None
        assert rows is not None
        return rows

    def combine(self, y_XD: Tensor, in_flight: _Sorted) -> Tensor:
        """See `Dispatcher`."""
        return unpermute(y_XD, in_flight.permutation)


def permute(x_TD: Tensor, weight_TK: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """Copy tokens and weights into rows: ([X, D], [X])."""
    order_X, inverse_TK, _, kept_TK = permutation
    inputs = x_TD, order_X, inverse_TK, kept_TK
    x_XD: Tensor = _Permute.apply(*inputs)  # type: ignore[no-untyped-call]  # untyped in torch
    weights: Tensor = _Permute.apply(  # type: ignore[no-untyped-call]  # as above
        weight_TK.reshape(-1, 1), order_X, inverse_TK.view(-1, 1), None if kept_TK is None else kept_TK.view(-1, 1)
    )
    return x_XD, weights.squeeze(1)


def unpermute(y_XD: Tensor, permutation: Permutation) -> Tensor:
    """Add up the rows of each token: [T, D]."""
    order_X, inverse_TK, _, kept_TK = permutation
    inputs = y_XD, order_X, inverse_TK, kept_TK
    out_TD: Tensor = _Unpermute.apply(*inputs)  # type: ignore[no-untyped-call]  # untyped in torch
    return out_TD


def _copy_rows(x_TD: Tensor, order_X: Tensor, K: int) -> Tensor:
    return x_TD.index_select(0, order_X if K == 1 else order_X // K)


def _sum_rows(y_XD: Tensor, inverse_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
    """The sum of the rows of each token. Rows of dropped assignments are garbage, even infinite."""
    if inverse_TK.shape[1] == 1 and kept_TK is None:
        return y_XD.index_select(0, inverse_TK.squeeze(1))
    if kept_TK is None and y_XD.device.type == "cpu":
        # One pass with sums in fp32. index_select and sum take three times as long, and ten times if compiled.
        return F.embedding_bag(inverse_TK, y_XD, mode="sum")
    rows_TKD = torch.unflatten(y_XD.index_select(0, inverse_TK.flatten()), 0, inverse_TK.shape)
    if kept_TK is not None:
        rows_TKD = rows_TKD.masked_fill_(~kept_TK[..., None], 0)
    return rows_TKD.sum(1)


class _Permute(torch.autograd.Function):
    """Tokens -> rows. Backward adds up the gradients of a token's rows."""

    # Any: torch's context takes any attribute.
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_X: Tensor, inverse_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse_TK, kept_TK)
        return _copy_rows(x_TD, order_X, inverse_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None, None, None]:  # Any: as above
        return _sum_rows(grad_XD, *ctx.saved_tensors), None, None, None


class _Unpermute(torch.autograd.Function):
    """Rows -> tokens: the sum of a token's rows. Backward copies its gradient to each."""

    # Any: as above.
    @staticmethod
    def forward(ctx: Any, y_XD: Tensor, order_X: Tensor, inverse_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(order_X)
        ctx.n_choices = inverse_TK.shape[1]
        return _sum_rows(y_XD, inverse_TK, kept_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:  # Any: as above
        (order_X,) = ctx.saved_tensors
        return _copy_rows(grad_TD, order_X, ctx.n_choices), None, None, None
