"""This process within the run: its process group, its rows of a batch, its coordinates in the layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel.layout import AXES, Layout
from parallel.world import World
from pretrain.train.batching import DataShard


@dataclass(frozen=True)
class RankInfo:
    """One process of the run, and the layout of all of them."""

    world: World
    layout: Layout

    @property
    def group(self) -> ProcessGroup | None:
        """The group of all ranks, after its initialization; None for a single process."""
        return dist.group.WORLD if self.world.size > 1 else None

    @property
    def data_shard(self) -> DataShard:
        """This rank's rows of every batch. Ranks that differ only in pipeline, context or tensor read the same rows."""
        return DataShard(self.layout.data_rank(self.world.rank), self.layout.data)

    @property
    def coordinates(self) -> str:
        """The key of this rank in a checkpoint: `pipeline=0 replicate=0 shard=1 context=0 tensor=0`."""
        return " ".join(f"{axis}={at}" for axis, at in self.layout.coordinates(self.world.rank).items())

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Ranks along each axis."""
        return dict(zip(AXES, self.layout.sizes, strict=True))
