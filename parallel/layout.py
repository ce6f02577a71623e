"""How many ranks each kind of parallelism gets, and the coordinates of each rank. Arithmetic only: imports no torch.

The ranks form a grid with these axes, outermost first:

| axis        | a rank holds                       | traffic per step                              | needs          |
|-------------|------------------------------------|-----------------------------------------------|----------------|
| `pipeline`  | some of the layers                 | activations between neighbours per microbatch | any network    |
| `replicate` | a copy                             | gradients once (all-reduce)                   | any network    |
| `shard`     | a part of the model's state (ZeRO) | parameters twice, gradients once              | a fast network |
| `context`   | a part of every sequence           | keys and values (or heads) per layer          | a fast network |
| `tensor`    | a part of every matrix             | activations four times per layer              | one node       |

Consecutive ranks are neighbours in `tensor`. Ranks that differ in `replicate` or `shard` read different sequences
("data ranks"). Ranks that differ in `shard` or `context` shard the parameters together ("fsdp" ranks).

Experts have axes of their own, folded out of `shard`, `context` and `tensor` (parallel folding, arXiv:2504.14960): the
same shard x context x tensor ranks form a second grid, outermost first:

| axis            | a rank holds                              | traffic per MoE layer            | needs          |
|-----------------|-------------------------------------------|----------------------------------|----------------|
| `expert_data`   | a part of its experts' state (ZeRO)       | parameters and gradients         | a fast network |
| `expert`        | some of the experts                       | tokens to their experts and back | a fast network |
| `expert_tensor` | a part of the width of each expert        | tokens of its neighbours         | one node       |

`expert_data` is what the other two leave. So experts can have another degree of tensor parallelism than attention, and
the expert axis takes no ranks from the other axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""Outermost first."""
EXPERT_AXES = ("expert_data", "expert", "expert_tensor")
"""The second grid of the shard x context x tensor ranks, outermost first."""


@dataclass(frozen=True)
class Layout:
    """The size of each axis, and the options of each kind of parallelism."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    expert: int = 1
    """Ranks that the experts are divided among. `expert` * `expert_tensor` must divide `shard` * `context` *
    `tensor`."""
    expert_tensor: int = 1
    """Ranks that split the hidden width of each expert."""

    zero: int = 3
    """1: optimizer state is sharded; 2: gradients too; 3: parameters too."""
    reshard_to: int | None = None
    """With `zero=3`: after the forward pass shard parameters over this many neighbours only; None is all."""
    prefetch: int = 1
    """Number of blocks whose parameters are gathered ahead."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""

    sequence: bool = False
    """Sequence parallelism: between blocks each tensor rank holds a part of the sequence."""
    replicate_kv: bool = False
    """With more tensor ranks than key/value heads, let several ranks hold the same head."""
    async_tensor: bool = False
    """Overlap the collectives of tensor parallelism with the matrix products next to them."""

    schedule: str = "1f1b"
    stages_per_rank: int = 1

    context_method: str = "gather"
    """`gather` gathers keys and values; `ulysses` exchanges sequence for heads. See `parallel.context`."""

    expert_dispatch: str = "all_to_all"
    """How tokens travel to their experts: `all_to_all` or `deepep`. See `parallel.dispatch` and `parallel.deep_ep`."""

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the axes, in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def data(self) -> int:
        """Number of ranks that read different sequences."""
        return self.replicate * self.shard

    @property
    def fsdp(self) -> int:
        """Number of ranks that shard one copy of the parameters of a pipeline stage and tensor rank."""
        return self.shard * self.context

    @property
    def expert_data(self) -> int:
        """Number of ranks of a replica that hold the same part of the same experts. They shard its state."""
        return self.fsdp * self.tensor // (self.expert * self.expert_tensor)

    @property
    def splits_experts(self) -> bool:
        """Whether experts, if there are any, have a mesh of their own. If not, they are sharded with their block."""
        return self.expert * self.expert_tensor * self.tensor > 1

    @property
    def expert_fsdp(self) -> int:
        """Number of ranks of a replica that shard the state of the same experts."""
        return self.expert_data * self.expert_tensor

    @property
    def n_stages(self) -> int:
        """Number of pipeline stages."""
        return self.pipeline * self.stages_per_rank

    def n_microbatches(self, n_rows: int, micro_batch_size: int) -> int:
        """Number of microbatches per data rank in a global batch of `n_rows` sequences. The last may need padding.

        >>> Layout(shard=2).n_microbatches(9, 2)
        3
        """
        return -(-n_rows // self.data // micro_batch_size)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The coordinate of a rank on each axis.

        >>> Layout(pipeline=2, tensor=4).coordinates(6)
        {'pipeline': 1, 'replicate': 0, 'shard': 0, 'context': 0, 'tensor': 2}
        """
        found: dict[str, int] = {}
        for axis, size in reversed(list(zip(AXES, self.sizes, strict=True))):
            rank, found[axis] = divmod(rank, size)
        return {axis: found[axis] for axis in AXES}

    def expert_coordinates(self, rank: int) -> dict[str, int]:
        """The coordinate of a rank on each expert axis.

        >>> Layout(shard=4, tensor=2, expert=2, expert_tensor=2).expert_coordinates(6)
        {'expert_data': 1, 'expert': 1, 'expert_tensor': 0}
        """
        rest, expert_tensor = divmod(rank % (self.fsdp * self.tensor), self.expert_tensor)
        expert_data, expert = divmod(rest, self.expert)
        return dict(zip(EXPERT_AXES, (expert_data, expert, expert_tensor), strict=True))

    def data_rank(self, rank: int) -> int:
        """Which part of each global batch a rank reads, in [0, data)."""
        at = self.coordinates(rank)
        return at["replicate"] * self.shard + at["shard"]

    def fsdp_rank(self, rank: int) -> int:
        """Which shard of the parameters a rank holds, in [0, fsdp)."""
        at = self.coordinates(rank)
        return at["shard"] * self.context + at["context"]

    def expert_fsdp_rank(self, rank: int) -> int:
        """Which shard of its experts a rank holds, in [0, expert_fsdp)."""
        at = self.expert_coordinates(rank)
        return at["expert_data"] * self.expert_tensor + at["expert_tensor"]

    def stride(self, axis: str) -> int:
        """The difference in rank between neighbours on an axis, one of AXES or EXPERT_AXES.

        >>> Layout(pipeline=2, tensor=4).stride("pipeline")
        4
        """
        axes = EXPERT_AXES if axis in EXPERT_AXES else AXES
        return math.prod(getattr(self, inner) for inner in axes[axes.index(axis) + 1 :])

    def peers(self, rank: int, axis: str) -> tuple[int, ...]:
        """`rank` and the ranks that differ from it on that axis only, in order of their coordinate."""
        stride = self.stride(axis)
        coordinates = self.coordinates(rank) | self.expert_coordinates(rank)
        first = rank - coordinates[axis] * stride
        return tuple(range(first, first + stride * getattr(self, axis), stride))

    def is_inside_node(self, axis: str, ranks_per_node: int) -> bool:
        """Whether ranks that differ on that axis only share a node. Nodes hold consecutive ranks."""
        span = self.stride(axis) * getattr(self, axis)
        return ranks_per_node % span == 0 or self.world_size <= ranks_per_node

    def __str__(self) -> str:
        """`shard=2 tensor=4 expert=2`, without axes of size 1."""
        axes = (*AXES, "expert", "expert_tensor")
        named = [f"{axis}={size}" for axis in axes if (size := getattr(self, axis)) > 1]
        return " ".join(named) or "one process"
