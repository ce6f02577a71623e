"""How many ranks each kind of parallelism gets, and which rank stands where. Pure arithmetic: imports no torch, starts nothing.

The ranks form a grid with these axes, outermost first:

| axis        | a rank holds                        | traffic a step                                  | wants            |
|-------------|-------------------------------------|-------------------------------------------------|------------------|
| `pipeline`  | some of the layers                  | activations between neighbours, a microbatch    | any network      |
| `replicate` | a copy                              | its gradients, once (all-reduce)                | any network      |
| `shard`     | a part of parameters, gradients and optimizer state (ZeRO) | parameters twice, gradients once | a fast network |
| `context`   | a part of every sequence            | keys and values (or heads), a layer             | a fast network   |
| `tensor`    | a part of every matrix              | activations four times, a layer                 | inside a node    |

Neighbours in rank are neighbours in `tensor`. Ranks that differ in `replicate` or `shard` read different sequences ("data ranks");
those that differ in `shard` or `context` together shard the parameters ("fsdp" ranks). An expert axis folds out of `shard`, `context`
and `tensor` without changing any of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""Outermost first."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, and how each kind of parallelism works."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    zero: int = 3
    """1: optimizer state is sharded; 2: gradients too; 3: parameters too."""
    reshard_to: int | None = None
    """With `zero=3`: after the forward pass parameters are sharded over this many neighbours only; None is all."""
    prefetch: int = 1
    """Blocks whose parameters are gathered ahead."""
    offload: bool = False
    """Parameters, gradients and optimizer state live in host memory."""

    sequence: bool = False
    """Between the tensor-parallel regions each tensor rank holds a part of the sequence."""
    replicate_kv: bool = False
    """With more tensor ranks than key/value heads, several ranks hold the same head."""
    async_tensor: bool = False
    """Overlap the collectives of tensor parallelism with the products beside them."""

    schedule: str = "1f1b"
    stages_per_rank: int = 1

    context_method: str = "gather"
    """`gather`: keys and values are gathered; `ulysses`: heads and sequence change places."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.replicate * self.shard

    @property
    def fsdp(self) -> int:
        """Ranks that share out one copy of the parameters (of a stage, of a tensor part)."""
        return self.shard * self.context

    @property
    def n_stages(self) -> int:
        """Stages of the pipeline."""
        return self.pipeline * self.stages_per_rank

    def n_microbatches(self, n_rows: int, micro_batch_size: int) -> int:
        """Microbatches that each data rank makes of a global batch of `n_rows` sequences; the last one may need padding.

        >>> Layout(shard=2).n_microbatches(9, 2)
        3
        """
        return -(-n_rows // self.data // micro_batch_size)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis.

        >>> Layout(pipeline=2, tensor=4).coordinates(6)
        {'pipeline': 1, 'replicate': 0, 'shard': 0, 'context': 0, 'tensor': 2}
        """
        found: dict[str, int] = {}
        for axis, size in reversed(list(zip(AXES, self.sizes, strict=True))):
            rank, found[axis] = divmod(rank, size)
        return {axis: found[axis] for axis in AXES}

    def data_rank(self, rank: int) -> int:
        """Which part of each global batch a rank reads, in [0, data)."""
        at = self.coordinates(rank)
        return at["replicate"] * self.shard + at["shard"]

    def fsdp_rank(self, rank: int) -> int:
        """Which part of the sharded parameters a rank holds, in [0, fsdp)."""
        at = self.coordinates(rank)
        return at["shard"] * self.context + at["context"]

    def stride(self, axis: str) -> int:
        """How far apart in rank neighbours on an axis are.

        >>> Layout(pipeline=2, tensor=4).stride("pipeline")
        4
        """
        return math.prod(self.sizes[AXES.index(axis) + 1 :])

    def peers(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from this one on that axis alone, itself among them, in order of their place on it."""
        stride = self.stride(axis)
        first = rank - self.coordinates(rank)[axis] * stride
        return tuple(range(first, first + stride * getattr(self, axis), stride))

    def is_inside_node(self, axis: str, ranks_per_node: int) -> bool:
        """Whether ranks that differ on that axis alone are always of one node, where nodes are filled with consecutive ranks."""
        span = self.stride(axis) * getattr(self, axis)
        return ranks_per_node % span == 0 or self.world_size <= ranks_per_node

    def __str__(self) -> str:
        """`shard=2 tensor=4`; axes of one rank are left out."""
        named = [f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " ".join(named) or "one process"
