"""Where this process stands among those of the run: which rows it reads, whom it agrees with, what it is called."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel.layout import AXES, Layout
from parallel.world import World
from pretrain.train.batching import DataShard


@dataclass(frozen=True)
class RankInfo:
    """One process of the run."""

    world: World
    layout: Layout

    @property
    def group(self) -> ProcessGroup | None:
        """All processes, once they have met; None where there is one."""
        return dist.group.WORLD if self.world.size > 1 else None

    @property
    def data_shard(self) -> DataShard:
        """Its part of every batch. Ranks that differ in pipeline, context or tensor alone read the same rows."""
        return DataShard(self.layout.data_rank(self.world.rank), self.layout.data)

    @property
    def coordinates(self) -> str:
        """Its name in a checkpoint: `pipeline=0 replicate=0 shard=1 context=0 tensor=0`."""
        return " ".join(f"{axis}={at}" for axis, at in self.layout.coordinates(self.world.rank).items())

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Ranks of each axis."""
        return dict(zip(AXES, self.layout.sizes, strict=True))
