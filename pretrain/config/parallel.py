"""Settings of the layout: the `parallel` section of `pretrain.config`, which says how settings are written. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.settings import AUTO, OrAuto, Settings


class ParallelConfig(Settings):
    """How the ranks divide the work: the product of the sizes is the number of processes. Changes no number of the run but by rounding."""

    replicate: OrAuto[Annotated[int, Field(gt=0)]] = 1
    """Data-parallel copies, each of which holds everything that `shard` and the others do not divide. `auto` is what is left of the
    processes, where `shard` is a number."""

    shard: OrAuto[Annotated[int, Field(gt=0)]] = AUTO
    """Data-parallel ranks that share parameters, gradients and optimizer state out among them (ZeRO, arXiv:1910.02054). `auto` is what
    the other sizes leave of the processes."""

    tensor: int = Field(default=1, gt=0)
    """Ranks that share out every matrix (arXiv:1909.08053); best inside one node."""

    context: int = Field(default=1, gt=0)
    """Ranks that share out the tokens of every sequence."""

    pipeline: int = Field(default=1, gt=0)
    """Ranks that share out the layers."""

    expert: int = Field(default=1, gt=0)
    """Ranks that share out the experts of a mixture of experts; a dense model has none."""

    zero: OrAuto[Literal[1, 2, 3]] = AUTO
    """What `shard` divides: 1 the optimizer state, 2 gradients too, 3 parameters too. `auto` is 3, and 2 with a pipeline, which would
    gather the parameters again for every microbatch."""

    reshard_to: int | None = Field(default=None, gt=1)
    """`zero=3`: between forward and backward pass parameters stay sharded over only this many ranks (those of a node), so that gathering
    them again crosses no slow network. None is all ranks."""

    prefetch: int = Field(default=1, ge=0)
    """Blocks whose parameters are gathered ahead of their use: in every pass under `zero=3`, else in the first forward pass of a step."""

    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory and update them there (CUDA only)."""

    sequence: OrAuto[bool] = AUTO
    """Sequence parallelism (arXiv:2205.05198): what tensor parallelism leaves whole is divided along the sequence. `auto` is on where
    `tensor` is above 1."""

    replicate_kv: bool = False
    """Allow more tensor ranks than key/value heads: several ranks then hold, and compute, the same head."""

    async_tensor: bool = False
    """Overlap the collectives of tensor parallelism with the matrix products beside them (CUDA with NVLink, compiled)."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv"] = "1f1b"
    """Order of forward and backward passes in a pipeline: GPipe (arXiv:1811.06965), 1F1B and interleaved 1F1B (arXiv:2104.04473), zero
    bubble (arXiv:2401.10241) interleaved or as a V."""

    stages_per_rank: OrAuto[Annotated[int, Field(gt=0)]] = AUTO
    """Pipeline stages on each rank. `auto` is 2 for the interleaved schedules and `zbv`, 1 for the others."""

    context_method: Literal["gather", "ulysses"] = "gather"
    """`gather` keys and values of the whole sequence (arXiv:2407.21783, section 3.3.2), or exchange sequence parts for heads
    (`ulysses`, arXiv:2309.14509), which divides the key/value heads by `context` too."""
