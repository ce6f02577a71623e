"""Settings of the layout: the `parallel` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.settings import AUTO, OrAuto, Settings


class ParallelConfig(Settings):
    """How the ranks divide the work. The product of the sizes, without `expert` and `expert_tensor`, is the number of
    processes. Results differ only by rounding."""

    replicate: OrAuto[Annotated[int, Field(gt=0)]] = 1
    """Data-parallel replicas of everything that `shard` and the other sizes do not divide. `auto` is the number of
    processes that they leave; `shard` must be a number then."""

    shard: OrAuto[Annotated[int, Field(gt=0)]] = AUTO
    """Data-parallel ranks that shard parameters, gradients and optimizer state among them (ZeRO, arXiv:1910.02054).
    `auto` is the number of processes that the other sizes leave."""

    tensor: int = Field(default=1, gt=0)
    """Ranks that split every matrix (arXiv:1909.08053); fastest inside one node."""

    context: int = Field(default=1, gt=0)
    """Ranks that split the tokens of every sequence."""

    pipeline: int = Field(default=1, gt=0)
    """Ranks that split the layers."""

    expert: int = Field(default=1, gt=0)
    """Ranks that the experts of a layer are divided among. They are not more processes: the `shard`, `context` and
    `tensor` ranks are grouped anew for experts (arXiv:2504.14960), and `expert` times `expert_tensor` divides them."""

    expert_tensor: int = Field(default=1, gt=0)
    """Ranks that split the hidden width of each expert, and with it its products and activations."""

    expert_dispatch: Literal["all_to_all", "deepep"] = "all_to_all"
    """How tokens travel to their experts: by uneven all-to-alls, or by the kernels of DeepEP
    (github.com/deepseek-ai/DeepEP; CUDA, bf16, and the package `deep_ep`), which send a token once to each rank."""

    zero: OrAuto[Literal[1, 2, 3]] = AUTO
    """What `shard` divides: 1 the optimizer state, 2 gradients too, 3 parameters too. `auto` is 3, and 2 with a
    pipeline, where 3 would gather the parameters again for every microbatch."""

    reshard_to: int | None = Field(default=None, gt=1)
    """`zero=3`: between forward and backward pass parameters stay sharded over only this many ranks, such as those of a
    node, so that gathering them again crosses no slow network. None is all ranks."""

    prefetch: int = Field(default=1, ge=0)
    """Blocks whose parameters are gathered ahead of their use: in every pass with `zero=3`, otherwise in the first
    forward pass of a step."""

    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory and update them there (CUDA only)."""

    sequence: OrAuto[bool] = AUTO
    """Sequence parallelism (arXiv:2205.05198): split activations along the sequence where tensor parallelism does not
    split them. `auto` is on if `tensor` is above 1."""

    replicate_kv: bool = False
    """Allow more tensor ranks than key/value heads: several ranks then hold and compute the same head."""

    async_tensor: bool = False
    """Overlap the collectives of tensor parallelism with neighbouring matrix products (CUDA with NVLink, compiled)."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv"] = "1f1b"
    """Order of forward and backward passes in a pipeline: GPipe (arXiv:1811.06965), 1F1B and interleaved 1F1B
    (arXiv:2104.04473), zero bubble (arXiv:2401.10241) interleaved or as a V."""

    stages_per_rank: OrAuto[Annotated[int, Field(gt=0)]] = AUTO
    """Pipeline stages on each rank. `auto` is 2 for the interleaved schedules and `zbv`, 1 for the others."""

    context_method: Literal["gather", "ulysses"] = "gather"
    """`gather` the keys and values of the whole sequence (arXiv:2407.21783, section 3.3.2), or exchange parts of the
    sequence for heads (`ulysses`, arXiv:2309.14509), which divides the key/value heads by `context` too."""

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences. The sizes must be resolved."""
        return self.replicate * self.shard
