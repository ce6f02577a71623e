"""What FSDP2 gathers and reduces as one: blocks, the output projection, the embedding; and the memory that takes. No torch."""

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
class Units:
    """Numbers on a tensor rank, before fsdp ranks share them out; of the ends of the model 0 where they are on another rank."""

    block: float
    """The matrices of its largest block."""
    head: float
    embedding: float
    """0 where it is the projection too."""
    tied: bool
    """The projection is the embedding, and gets a gradient as each."""
    number: int
    """Bytes of a number to compute with."""
    fsdp: int
    """Ranks; 0 if there is but one process, which adds each gradient to its master's at once."""
    divides: bool
    """One rank with replicas: FSDP2 then divides what goes into a reduction by 1, in a copy."""
    sums_whole: bool
    """Gradients are added up whole, in fp32, and reduced once a step."""
    gathers: bool
    """Parameters come and go."""
    reduces_each: bool
    """Another microbatch's gradients have been reduced in the same step."""

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, held: Sequence[range], n_microbatches: int, number: int) -> Units:
        """Of a rank that holds these layers."""
        model, one_stage = config.model, layout.pipeline == 1
        first, last = any(layers.start == 0 for layers in held), any(layers.stop == model.n_layers for layers in held)
        rows = model.vocab_size * model.d_model / layout.tensor
        tied = first and last and model.tie_embeddings
        return cls(
            block=max(_matrices(config, layer, layout) for layers in held for layer in layers),
            head=rows * last,
            embedding=rows * (first and not tied),
            tied=tied,
            number=number,
            fsdp=0 if layout.world_size == 1 else layout.fsdp,
            divides=layout.fsdp == 1 and layout.replicate > 1,
            sums_whole=n_microbatches > 1 and (layout.zero == 1 or not one_stage),
            gathers=layout.fsdp > 1 and one_stage and layout.zero == 3,
            reduces_each=n_microbatches > 1 and one_stage and layout.zero > 1,
        )

    @property
    def head_gradient(self) -> float:
        """Bytes of the projection's gradient, which the loss makes and which waits for the end of the whole backward pass."""
        return self.number * self.head * (self.fsdp > 0 or self.tied)

    @property
    def ahead(self) -> float:
        """Bytes of a gathered block that is not in use yet."""
        return self.number * self.block * self.gathers

    @property
    def reduced_before(self) -> float:
        """Bytes of the last reduction of the microbatch before, the projection's: FSDP2 has what went in until the next one."""
        return FP32 * self.head * (self.fsdp > 0 and self.reduces_each)

    @property
    def block_reduction(self) -> float:
        """Bytes to reduce a block: fp32 goes in, and is made of its gradients, which are gone when fp32 comes out."""
        return self.block * (FP32 + max(self.number, self._out)) if self.fsdp else 0.0

    @property
    def _out(self) -> float:
        """Bytes a number that comes out of a reduction; one rank with replicas copies what goes in once more."""
        return FP32 / self.fsdp + FP32 * self.divides

    @property
    def begin(self) -> float:
        """Bytes when the second microbatch begins: projection and embedding arrive, and the embedding is copied to its place."""
        return self.reduced_before + self.gathers * self.number * (self.head + 2 * self.embedding)

    @property
    def end(self) -> float:
        """Bytes when the last microbatch ends: projection and embedding are reduced, one after the other, or are one."""
        if self.fsdp == 0:
            return 3 * self.number * self.head * self.tied
        largest = max(self.head, self.embedding)
        if self.tied:
            return max(3 * self.number * self.head, largest * (FP32 + self._out))  # two gradients and their sum
        own = (
            0 if self.sums_whole or self.fsdp == 1 else self.number
        )  # FSDP2 lets go of the last gradient late; added up it is a gradient
        return self.number * min(self.head, self.embedding) + largest * (FP32 + own + self._out)


def _matrices(config: RunConfig, layer: int, layout: Layout) -> float:
    """Numbers of a layer's matrices that a tensor rank computes with."""
    found, heads = 0, config.model.n_kv_heads
    for parameter in model_parameters(config.model, range(layer, layer + 1), layout.tensor):
        if parameter.layer is not None and len(parameter.shape) > 1:
            count = math.prod(parameter.shape)
            if shares_heads(parameter.style, tensor=layout.tensor, kv_heads=heads):
                count = count * layout.tensor // heads  # one head of them a rank
            elif parameter.tensor_dim is None:
                count *= layout.tensor
            found += count
    return found / layout.tensor
