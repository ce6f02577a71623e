"""The loss over a vocabulary that is split over ranks: logits are never gathered. Knows a loss that takes such a part, and process groups.

Each rank computes the logits of its rows of the output weight. What the ranks exchange is, per token, the largest logit, the sum of the
exponentials and the label's logit. Shape suffixes: C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from parallel.engine import MicrobatchLoss


class ShardableLoss(Protocol):
    """A model's loss: hidden states [..., D], output weight [V, D], labels [...], weight of the z-loss -> sums over the labels."""

    def __call__(
        self, hidden: Tensor, weight_VD: Tensor, labels: Tensor, z_loss: float, /, **options: object
    ) -> MicrobatchLoss:
        """The option `vocabulary` is a `VocabShard`: the weight then has its rows alone."""


class HasLinearLoss(Protocol):
    """A module that calls its `linear_loss`."""

    linear_loss: ShardableLoss


@dataclass(frozen=True)
class VocabShard:
    """The rows of the output weight that this rank has, and how its numbers meet those of the others."""

    first: int
    """Token id of the first row."""

    group: dist.ProcessGroup

    def all_max(self, x_C: Tensor) -> Tensor:
        """The largest of all ranks, element by element."""
        return self._reduce(x_C, dist.ReduceOp.MAX)

    def all_sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, element by element."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def _reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, operation, group=self.group)
        return x


def vocab_parallel_loss(
    loss: ShardableLoss, group: dist.ProcessGroup, gather: Callable[[Tensor], Tensor]
) -> ShardableLoss:
    """`loss` with the rows of the weight split over the group; every rank gets the whole sums.

    Args:
        loss: what is called with the option `vocabulary`, and with all options that the result is called with.
        group: rank r has the r-th of equal parts of the vocabulary.
        gather: what a rank holds of the hidden states -> those of all labels, whose gradients it sums over the group.
    """

    def split(hidden: Tensor, weight_VD: Tensor, labels: Tensor, z_loss: float, /, **options: object) -> MicrobatchLoss:
        part = VocabShard(dist.get_rank(group) * len(weight_VD), group)
        return loss(gather(hidden), weight_VD, labels, z_loss, vocabulary=part, **options)

    return split
