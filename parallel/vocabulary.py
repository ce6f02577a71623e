"""Vocab-parallel loss: the vocabulary is split over ranks, and logits are never gathered.

Each rank computes the logits of its rows of the output weight. Per token, the ranks exchange the largest logit, the
sum of the exponentials and the label's logit. Shape suffixes: C tokens of a chunk, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from parallel.engine import MicrobatchLoss


class ShardableLoss(Protocol):
    """A model's loss: hidden states [..., D], output weight [V, D], labels [...], z-loss weight -> loss sums."""

    def __call__(
        self, hidden: Tensor, weight_VD: Tensor, labels: Tensor, z_loss: float, /, **options: object
    ) -> MicrobatchLoss:
        """With the option `vocabulary`, a `VocabShard`, the weight has the rows of that shard only."""


class HasLinearLoss(Protocol):
    """A module that computes its loss with `linear_loss`."""

    linear_loss: ShardableLoss


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of the output weight, and the reductions over the ranks that have the others."""

    first: int
    """Token id of the first row."""

    group: dist.ProcessGroup

    def all_max(self, x_C: Tensor) -> Tensor:
        """The elementwise maximum over all ranks."""
        return self._all_reduce(x_C, dist.ReduceOp.MAX)

    def all_sum(self, x: Tensor) -> Tensor:
        """The elementwise sum over all ranks."""
        return self._all_reduce(x, dist.ReduceOp.SUM)

    def _all_reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, operation, group=self.group)
        return x


def vocab_parallel_loss(
    loss: ShardableLoss, group: dist.ProcessGroup, gather: Callable[[Tensor], Tensor]
) -> ShardableLoss:
    """`loss` with the rows of the weight split over the group. Every rank returns the sums over the full vocabulary.

    Args:
        loss: called with the option `vocabulary` and the options that the result is called with.
        group: rank r has the r-th of equal shards of the vocabulary.
        gather: this rank's hidden states -> the hidden states of all labels. Its backward sums gradients over the
            group.
    """

    def sharded_loss(
        hidden: Tensor, weight_VD: Tensor, labels: Tensor, z_loss: float, /, **options: object
    ) -> MicrobatchLoss:
        shard = VocabShard(dist.get_rank(group) * len(weight_VD), group)
        return loss(gather(hidden), weight_VD, labels, z_loss, vocabulary=shard, **options)

    return sharded_loss
