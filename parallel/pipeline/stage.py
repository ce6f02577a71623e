"""A pipeline stage as torch's schedules call it, and a stage's share of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from parallel.engine import ForwardStep, Microbatch, ModelChunk
from parallel.layout import Layout
from parallel.pipeline.schedule import has_split_backward
from parallel.pipeline.zero_bubble import ZeroBubbleBackward


class StageModule(nn.Module):
    """A model chunk that torch's pipelines can call: activations of the stage before -> activations, or the loss.

    Apply FSDP to this module, not to the chunk: torch delays reductions only if the module it calls is an FSDPModule.
    """

    def __init__(self, chunk: nn.Module, forward_step: ForwardStep, layout: Layout) -> None:
        """Split the backward pass of the chunk in place, if the schedule says so. Tensor parallelism comes later."""
        super().__init__()
        self.chunk = chunk
        self._forward_step = forward_step
        self.zero_bubble: ZeroBubbleBackward | None = None
        if has_split_backward(layout.pipeline, layout.schedule):
            self.zero_bubble = ZeroBubbleBackward(cast(ModelChunk, chunk).layers)
        self._microbatches: Iterator[Microbatch] = iter(())
        self._scale: Tensor | None = None
        self.loss_sums: tuple[Tensor, Tensor] | None = None

    def begin_step(self, microbatches: Sequence[Microbatch], scale: Tensor) -> None:
        """Set the microbatches of the next calls. Stages may interleave; each takes its microbatches in order."""
        self._microbatches = iter(microbatches)
        self._scale = scale
        self.loss_sums = zero_loss_sums(scale.device)
        if self.zero_bubble is not None:
            self.zero_bubble.begin_step()

    def forward(self, received: Tensor | None = None) -> Tensor:
        """[b, S, D] -> [b, S, D] for the next microbatch. The last stage returns `scale` * loss."""
        out = self._forward_step(self.chunk, received, next(self._microbatches))
        if isinstance(out, Tensor):
            return out
        assert self._scale is not None
        assert self.loss_sums is not None
        for total, term in zip(self.loss_sums, (out.cross_entropy, out.z_loss), strict=True):
            total += term.detach()
        return out.total * self._scale


def zero_loss_sums(device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros for the sums of (cross-entropy, z-loss). fp64, because a step may have thousands of microbatches."""
    return torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.float64, device=device)
