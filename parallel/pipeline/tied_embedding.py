"""Tied embeddings in a pipeline: the first and the last stage hold copies of one parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.engine import ModelChunk
from parallel.layout import Layout
from parallel.local import to_local
from parallel.pipeline.schedule import rank_of_stage


@dataclass(frozen=True)
class TiedEmbedding:
    """The embedding and the output projection as one parameter. The first and the last stage hold a copy each."""

    name: str
    holders: Sequence[nn.Module]
    """The chunks on this rank that hold it: none, one, or both."""
    group: dist.ProcessGroup
    is_first: bool
    peer: int | None
    """Rank in `group` that holds the other copy; None if this rank holds both."""

    @classmethod
    def of(cls, chunks: Mapping[int, nn.Module], layout: Layout, mesh: DeviceMesh) -> TiedEmbedding | None:
        """This rank's view of the tied parameter of `chunks`, which are given by stage. None if nothing is tied."""
        name = cast(ModelChunk, next(iter(chunks.values()))).tied_parameter
        if name is None:
            return None
        first, last = 0, layout.n_stages - 1
        holders = [chunks[stage] for stage in (first, last) if stage in chunks]
        group = mesh["pipeline"].get_group()
        peers = {rank_of_stage(first, layout), rank_of_stage(last, layout)} - {dist.get_rank(group)}
        return cls(name, holders, group, first in chunks, peers.pop() if peers else None)

    def n_stages_with(self, name: str) -> int:
        """Number of pipeline ranks that update the parameter of that name."""
        return 1 if name != self.name or self.peer is None else 2

    def sum_gradients(self) -> None:
        """After the backward passes, give both copies the gradient of the one parameter.

        If one rank holds both, only the first gets it: the engine copies the updated first to the second.
        """
        match [chunk.get_parameter(self.name) for chunk in self.holders]:
            case [parameter]:
                self._sum_with_peer(_local_gradient(parameter))
            case [first, last]:
                _local_gradient(first).add_(_local_gradient(last))
                last.grad = None

    def _sum_with_peer(self, gradient: Tensor) -> None:
        """Sum it with the peer's gradient, in place.

        The first stage sends, the last adds and sends back: this needs only the pipeline's group, and both get equal
        bits.
        """
        assert self.peer is not None
        if self.is_first:
            dist.send(gradient, group=self.group, group_dst=self.peer)
            dist.recv(gradient, group=self.group, group_src=self.peer)
        else:
            received = torch.empty_like(gradient)
            dist.recv(received, group=self.group, group_src=self.peer)
            dist.send(gradient.add_(received), group=self.group, group_dst=self.peer)


@torch.no_grad()
def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's shard of the gradient, to be changed in place."""
    assert parameter.grad is not None, "every step trains the embedding"
    return to_local(parameter.grad)
