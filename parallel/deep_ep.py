"""Dispatch of tokens by DeepEP (github.com/deepseek-ai/DeepEP): kernels over NVLink and RDMA for expert parallelism.

It sends a token once to each rank that has experts for it, where an all-to-all of rows sends it once per expert. The
receiving rank sorts the tokens by its own experts, and returns the sum over them. Needs the package `deep_ep` with its
interface `Buffer`, CUDA, and bf16. Checked against the sources of version 1.2 by reading; it has not been run here.

Shape suffixes: T local tokens, R received tokens, K experts of a token, D model width, X rows of this rank's experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.dispatch import Dispatcher, ExpertRows


class _InFlight(NamedTuple):
    x_RD: Tensor
    expert_RK: Tensor
    weight_RK: Tensor
    # Any: deep_ep has no types. The handle says where tokens came from; the event is that of their arrival.
    handle: Any
    event: Any
    inner: list[Any]
    """What the dispatcher of this rank's experts has sent; empty until `receive`."""


def make_buffer(group: ProcessGroup, width: int) -> Any:  # Any: deep_ep has no types
    """Memory for tokens of that width on their way between the ranks of a group, which must call this together."""
    from deep_ep import Buffer  # type: ignore[import-not-found]  # optional, CUDA only

    bytes_of_token, size = width * torch.bfloat16.itemsize, group.size()
    configs = Buffer.get_dispatch_config(size), Buffer.get_combine_config(size)
    return Buffer(
        group,
        max(config.get_nvl_buffer_size_hint(bytes_of_token, size) for config in configs),
        max(config.get_rdma_buffer_size_hint(bytes_of_token, size) for config in configs),
    )


class DeepEPDispatcher:
    """`parallel.dispatch.Dispatcher` by DeepEP."""

    # Any: deep_ep has no types.
    def __init__(self, local: Dispatcher, buffer: Any, n_experts: int, n_local: int) -> None:
        """Put it around a dispatcher of one process.

        Args:
            local: sorts tokens by the `n_local` experts of this rank; an assignment to `n_local` is dropped.
            buffer: of the ranks that share out the experts. All layers may share it.
            n_experts: of all ranks.
            n_local: of this rank.
        """
        self._local = local
        self._buffer = buffer
        self._n_experts, self._n_local = n_experts, n_local

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def send(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, key_TK: Tensor | None) -> _InFlight:
        """See `Dispatcher`."""
        assert key_TK is None, "DeepEP sends no keys: the layout's checks refuse expert dropout"
        expert_TK = expert_TK.masked_fill(expert_TK == self._n_experts, -1)  # its word for no expert
        arrived: list[Any] = []  # Any: as above
        x_RD, expert_RK, weight_RK = _Dispatch.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            x_TD, expert_TK, weight_TK, self._buffer, self._n_experts, arrived.append
        )
        ((handle, event),) = arrived
        return _InFlight(x_RD, expert_RK, weight_RK, handle, event, [])

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as above
    def receive(self, in_flight: _InFlight) -> ExpertRows:
        """See `Dispatcher`."""
        in_flight.event.current_stream_wait()
        expert_RK = in_flight.expert_RK.masked_fill(in_flight.expert_RK < 0, self._n_local)
        in_flight.inner.append(self._local.send(in_flight.x_RD, expert_RK, in_flight.weight_RK, None))
        return self._local.receive(in_flight.inner[0])

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as above
    def combine(self, y_XD: Tensor, in_flight: _InFlight) -> Tensor:
        """See `Dispatcher`."""
        y_RD = self._local.combine(y_XD, in_flight.inner[0])
        inputs = y_RD, self._buffer, in_flight.handle
        out_TD: Tensor = _Combine.apply(*inputs)  # type: ignore[no-untyped-call]  # as above
        return out_TD


class _Dispatch(torch.autograd.Function):
    """Tokens to the ranks of their experts. The backward pass adds up the gradients of the ranks."""

    # Any: torch's context takes any attribute, and deep_ep has no types.
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        expert_TK: Tensor,
        weight_TK: Tensor,
        buffer: Any,
        n_experts: int,
        arrived: Callable[[Any], None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        per_rank, per_node, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(expert_TK, n_experts)
        x_RD, expert_RK, weight_RK, _, handle, event = buffer.dispatch(
            x_TD.contiguous(),
            topk_idx=expert_TK,
            topk_weights=weight_TK.float(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=buffer.capture(),
            async_finish=True,
        )
        arrived((handle, event))
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(expert_RK)
        return x_RD, expert_RK, weight_RK

    @staticmethod
    def backward(
        ctx: Any, grad_RD: Tensor, _: None, grad_weight_RK: Tensor
    ) -> tuple[Tensor | None, ...]:  # Any: as above
        grad_TD, grad_weight_TK, _ = ctx.buffer.combine(
            grad_RD.contiguous(), ctx.handle, topk_weights=grad_weight_RK.float().contiguous()
        )
        return grad_TD, None, grad_weight_TK, None, None, None


class _Combine(torch.autograd.Function):
    """The sum of the results of all ranks. The backward pass sends the gradient to these ranks."""

    # Any: as above.
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, buffer: Any, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        out_TD: Tensor = buffer.combine(y_RD.contiguous(), handle)[0]
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:  # Any: as above
        grad_RD: Tensor = ctx.buffer.dispatch(grad_TD.contiguous(), handle=ctx.handle)[0]
        return grad_RD, None, None
