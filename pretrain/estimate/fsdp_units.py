"""The memory of FSDP2's units: each block, the embedding, and the root with the output projection. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.layout import Layout
from parallel.tensor_styles import shares_heads
from pretrain.config import RunConfig
from pretrain.estimate.parameters import model_parameters
from pretrain.model.activation_terms import FP32


@dataclass(frozen=True)
class FsdpUnits:
    """Sizes of the units of a rank, in numbers of its tensor shard before FSDP divides them.

    The sizes of the ends of the model are 0 where another pipeline rank has them.
    """

    block: float
    """Matrices of the largest block, without experts that are a unit of their own."""
    experts: float
    """Matrices of the experts of a block, if they are a unit of their own; otherwise 0."""
    head: float
    embedding: float
    """0 where it is the output projection too."""
    tied: bool
    """The output projection is the embedding, and gets a gradient from both uses."""
    bytes_per_number: int
    """Bytes of a number in the forward and backward pass."""
    expert_ranks: int
    """Ranks that share the parameters of such experts."""
    fsdp_ranks: int
    """Ranks that share the parameters. 0 on one process, which adds each gradient to the master weight's at once."""
    copies_input: bool
    """One FSDP rank with replicas: FSDP2 then divides the input of a reduction by 1, in a copy."""
    accumulates_unsharded: bool
    """Unsharded gradients are added up in fp32, and reduced once a step."""
    gathers_blocks: bool
    """Parameters are gathered for each use and freed after it."""
    reduces_every_microbatch: bool
    """Gradients are reduced after every microbatch, and there are several in a step."""

    @classmethod
    def of(
        cls, config: RunConfig, layout: Layout, stage_layers: Sequence[range], n_microbatches: int, number: int
    ) -> FsdpUnits:
        """The units of a rank with these layers in each of its stages."""
        model, one_stage = config.model, layout.pipeline == 1
        first, last = (
            any(layers.start == 0 for layers in stage_layers),
            any(layers.stop == model.n_layers for layers in stage_layers),
        )
        rows = model.vocab_size * model.d_model / layout.tensor
        tied = first and last and model.tie_embeddings
        matrices = [_matrices(config, layer, layout) for layers in stage_layers for layer in layers]
        return cls(
            block=max(block for block, _ in matrices),
            experts=max(experts for _, experts in matrices),
            expert_ranks=layout.expert_fsdp,
            head=rows * last,
            embedding=rows * (first and not tied),
            tied=tied,
            bytes_per_number=number,
            fsdp_ranks=0 if layout.world_size == 1 else layout.fsdp,
            copies_input=layout.fsdp == 1 and layout.replicate > 1,
            accumulates_unsharded=n_microbatches > 1 and (layout.zero == 1 or not one_stage),
            gathers_blocks=layout.fsdp > 1 and one_stage and layout.zero == 3,
            reduces_every_microbatch=n_microbatches > 1 and one_stage and layout.zero > 1,
        )

    @property
    def head_gradient(self) -> float:
        """Bytes of the projection's gradient: the loss computes it, and it waits for the end of the backward pass."""
        return self.bytes_per_number * self.head * (self.fsdp_ranks > 0 or self.tied)

    @property
    def prefetched_block(self) -> float:
        """Bytes of a gathered block that is not used yet."""
        return self.bytes_per_number * self.block * self.gathers_blocks

    @property
    def previous_reduction(self) -> float:
        """Bytes of the previous microbatch's last reduction, that of the projection: FSDP2 keeps its input until the
        next one."""
        return FP32 * self.head * (self.fsdp_ranks > 0 and self.reduces_every_microbatch)

    @property
    def block_reduction(self) -> float:
        """Bytes to reduce a block: the fp32 input, and then its gradients or the fp32 output."""
        return self.block * (FP32 + max(self.bytes_per_number, self._output_bytes)) if self.fsdp_ranks else 0.0

    @property
    def expert_reduction(self) -> float:
        """Bytes to reduce the experts of a block, in the middle of its backward pass."""
        output = FP32 / self.expert_ranks + FP32 * (self.copies_input and self.expert_ranks == 1)
        return self.experts * (FP32 + max(self.bytes_per_number, output))

    @property
    def _output_bytes(self) -> float:
        """Bytes of a number in the output of a reduction. One rank with replicas copies the input once more."""
        return FP32 / self.fsdp_ranks + FP32 * self.copies_input

    @property
    def at_microbatch_start(self) -> float:
        """Bytes when the second microbatch begins: projection and embedding are gathered, and the embedding is
        copied into place."""
        return self.previous_reduction + self.gathers_blocks * self.bytes_per_number * (self.head + 2 * self.embedding)

    @property
    def at_step_end(self) -> float:
        """Bytes when the last microbatch ends: projection and embedding are reduced one after the other, or as one
        if tied."""
        if self.fsdp_ranks == 0:
            return 3 * self.bytes_per_number * self.head * self.tied
        largest = max(self.head, self.embedding)
        if self.tied:
            return max(
                3 * self.bytes_per_number * self.head, largest * (FP32 + self._output_bytes)
            )  # two gradients and their sum
        # FSDP2 still holds the last unsharded gradient. With accumulation it is counted among the gradients instead.
        own = 0 if self.accumulates_unsharded or self.fsdp_ranks == 1 else self.bytes_per_number
        return self.bytes_per_number * min(self.head, self.embedding) + largest * (FP32 + own + self._output_bytes)


def _matrices(config: RunConfig, layer: int, layout: Layout) -> tuple[float, float]:
    """Numbers in a layer's matrices that one tensor rank computes with, and in those of experts with a unit of their
    own."""
    found, experts, heads = 0, 0, config.model.n_kv_heads
    for parameter in model_parameters(config.model, range(layer, layer + 1), layout.tensor):
        if parameter.layer is not None and len(parameter.shape) > 1:
            count = math.prod(parameter.shape)
            if parameter.is_expert and layout.splits_experts:
                experts += parameter.elements(layout)
                continue
            if shares_heads(parameter.style, tensor=layout.tensor, kv_heads=heads):
                count = count * layout.tensor // heads  # each rank uses one head
            elif parameter.tensor_dim is None:
                count *= layout.tensor
            found += count
    return found / layout.tensor, experts
