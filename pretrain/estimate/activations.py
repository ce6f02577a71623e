"""Estimate of a rank's activations at their peak in a step: all memory that is not counted in parameters. No torch.

Kept for the backward passes, in bytes of one token (the accounting of arXiv:2205.05198, section 4, for this program):

- A block keeps what its architecture says (`block_activations` of the spec; for Llama, compiled in bf16: the inputs of
  both norms 4 D, their results 4 D, q and attention's output 4 h_q, k and v 4 h_kv, the MLP's gate, up and product 6 F,
  the softmax's logarithms 4 a head).
- Tensor ranks divide all of it but the results of norms, which they gather, and what norms keep, which only `sequence`
  divides. Context ranks divide the tokens. They keep attention's output twice: as computed, and put together. `gather`
  keeps k and v of whole rows.
- A recomputing block keeps its input 2 D, and the results that `recompute_keep` names.
- Under zero bubble, a block keeps the inputs of its matrix products and the gradients of their outputs until the
  gradients of its weights are computed, recomputing or not.
- Each stage and microbatch keeps RoPE's tables 4 K, and in a pipeline the output 2 D, which waits for its gradient.
  Torch allocates receive buffers from both neighbours for all microbatches of a step, and one gradient is being sent.
- The end of the model keeps the final norm's input, and the gradients that the loss computes in its forward pass: 2 D,
  and that of the projection.

More exists for a moment only (`bytes_at_moments`):

- in the loss: a chunk's logits with their softmax in fp32, and the gathered hidden states;
- in the backward pass: the temporaries of the block (`backward_peak` of the spec), all that a recomputing block
  computes again, and gradients of weights;
- in FSDP2: the input of the last reduction, and under `zero=3` a gathered block that is not used yet (`fsdp_units`).

Each row is assumed to be one document. With several, `attention=sdpa` has masks of [S, S], which depend on the data.
Letters: D model width, F hidden width, K head width, h_q and h_kv widths of all query and key/value heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from parallel.layout import Layout
from pretrain.config import RunConfig
from pretrain.estimate.block_activations import (
    BlockCollectives,
    activation_sizes,
    kept_by_recomputing_block,
    kept_for_weights,
    kept_when_recomputed,
    microbatch_tokens,
)
from pretrain.estimate.fsdp_units import FsdpUnits
from pretrain.model.activation_terms import FP32, NORM_BACKWARD, ActivationSizes, BlockActivations
from pretrain.model.spec import architecture_of

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of a number in the forward and backward pass, by `train.precision`."""

LOSS_CHUNKS = 16
"""Most chunks that the loss cuts a microbatch into (`pretrain.model.loss`)."""

MIN_CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**25}
"""A chunk with fewer logits is not cut further."""

SOFTMAX_BLOCK = 2**20
"""fp32 numbers that the uncompiled softmax works on at a time, where the vocabulary is not sharded."""


class InFlight(NamedTuple):
    """Microbatches in flight on a pipeline rank at one time, counted once for each of its stages."""

    begun: int
    """Their forward pass has begun, and the backward pass to their input has not ended."""
    waiting: int = 0
    """Only the gradients of their weights are missing (`parallel.pipeline.zero_bubble`)."""


def activation_bytes(
    config: RunConfig, layout: Layout, pipeline_rank: int, stage_layers: Sequence[range], n_microbatches: int
) -> int:
    """Bytes of activations of a rank at its peak: the largest of `bytes_at_moments`."""
    peaks = peak_in_flight(layout, pipeline_rank, n_microbatches)
    return math.ceil(
        max(max(bytes_at_moments(config, layout, peak, stage_layers, n_microbatches).values()) for peak in peaks)
    )


def bytes_at_moments(
    config: RunConfig, layout: Layout, in_flight: InFlight, stage_layers: Sequence[range], n_microbatches: int
) -> dict[str, float]:
    """Return {moment of a step: bytes}, for the moments that may be the peak.

    Args:
        config: resolved.
        layout: of the run.
        in_flight: microbatches at the rank's peak.
        stage_layers: the layers of each of the rank's stages.
        n_microbatches: of a step.
    """
    model, tokens, number = config.model, microbatch_tokens(config, layout), COMPUTE_BYTES[config.train.precision]
    x, keep = activation_sizes(config, layout, number), _keep(config)
    blocks = _blocks(config, stage_layers, x)
    units = FsdpUnits.of(config, layout, stage_layers, n_microbatches, number)
    # An average over the rank's stages, which have about equally many layers.
    waiting = tokens * sum(kept_for_weights(block) for block in blocks.values()) * in_flight.waiting / len(stage_layers)
    buffers = _pipeline_buffers(layout, stage_layers, model.n_layers, n_microbatches) * tokens * x.stream
    kept = tokens * _kept(config, stage_layers, x, blocks) * in_flight.begun / len(stage_layers) + waiting

    found = {"microbatch begins": units.at_microbatch_start, "step ends": buffers + units.at_step_end}
    if layout.pipeline > 1:
        others = (kept - waiting) * (in_flight.begun - 1) / max(1, in_flight.begun)  # one has finished
        found["embedding"] = waiting + others + buffers + number * units.embedding
    kept += buffers + units.previous_reduction

    if units.head:
        input_of_norm = x.stream if x.compiled else x.stream_fp32
        normed = x.stream * (1 if x.compiled else 2)  # uncompiled, also before the weight is applied
        # Other microbatches that have finished their forward pass and wait for their backward pass.
        others = n_microbatches - 1 if layout.pipeline > 1 and layout.schedule == "gpipe" else 0
        kept += others * (tokens * (input_of_norm + normed - x.stream + x.whole) + number * units.head)
        loss = input_of_norm + normed + x.sequence * x.whole + x.whole  # gathered hidden states, and their gradients
        found["loss"] = kept + tokens * loss + number * units.head + _logit_bytes(config, layout, number)
        beside = 2 * x.stream if x.compiled else NORM_BACKWARD * x.stream_fp32
        found["final norm"] = kept + units.head_gradient + units.prefetched_block + tokens * (input_of_norm + beside)

    kept += units.head_gradient
    recomputes = any(any(recompute_flags(config, layers)) for layers in stage_layers)
    layer, block = max(blocks.items(), key=lambda item: item[1].kept)
    of_block = tokens * (_kept_recomputing(config, x, layer, block) if recomputes else block.kept)
    # Recomputed, all of it exists again, including what waits for the gradients of the weights.
    again = kept_when_recomputed(block, x, keep) - kept_for_weights(block) * (in_flight.waiting > 0)
    resident = tokens * again if recomputes else of_block
    beside = tokens * block.backward_peak + resident - of_block
    found["last block"] = kept + units.prefetched_block + beside
    if units.gathers_blocks:
        found["last block arrives"] = kept + 2 * units.prefetched_block + tokens * x.stream
    if layout.pipeline == 1 and layout.world_size > 1:
        # The previous reduction is over.
        kept += units.prefetched_block - of_block - units.previous_reduction
        found["last block's reduction"] = kept + tokens * x.stream + units.block_reduction
        if units.experts:  # they are reduced before attention's backward pass
            of_attention = resident + tokens * (x.stream - block.expert_inputs)
            found["last experts' reduction"] = kept + of_attention + units.expert_reduction
        if layout.zero > 1:
            found["block before it"] = kept + FP32 * units.block + beside
    return found


def peak_in_flight(layout: Layout, pipeline_rank: int, n_microbatches: int) -> tuple[InFlight, ...]:
    """The counts of microbatches in flight that a pipeline rank may peak at. Which one is the peak depends on the bytes
    of each kind.

    They follow from the order of PyTorch's schedules. If the microbatches do not fill rounds, zero bubble has fewer.
    """
    p, v, m, rank = layout.pipeline, layout.stages_per_rank, n_microbatches, pipeline_rank
    if p == 1:
        return (InFlight(1),)
    later = p - 1 - rank
    in_round = m // max(1, m // p)
    most = {
        "gpipe": m,
        "1f1b": later + 1,
        "interleaved": (v - 1) * in_round + 2 * later + 1,
        "interleaved_zero_bubble": v * in_round,
        "zbv": min(2 * p, m + 1 + rank),
    }[layout.schedule]
    most = min(most, m * v)
    if layout.schedule == "zbv":
        at_the_end = (InFlight(later, 2 * rank + 1),) if m > p else ()
        return (InFlight(most), InFlight(most - 1, 1), *at_the_end)
    if layout.schedule == "interleaved_zero_bubble":
        return InFlight(most - rank, rank), InFlight(most - rank - 1, rank + 1)
    return (InFlight(most),)


def recompute_flags(config: RunConfig, layers: range) -> list[bool]:
    """For each layer, whether it recomputes: every `recompute_every`-th layer of the model does."""
    return [config.train.recompute != "none" and (layer + 1) % config.train.recompute_every == 0 for layer in layers]


def _keep(config: RunConfig) -> tuple[str, ...]:
    """`recompute_keep`, where it has an effect."""
    return config.train.recompute_keep if config.train.recompute == "selective" else ()


def _blocks(config: RunConfig, stage_layers: Sequence[range], x: ActivationSizes) -> dict[int, BlockActivations]:
    """{layer: activations of its block} of a rank, as its architecture declares them."""
    terms = architecture_of(config.model).block_activations
    return {layer: terms(config.model, x, layer) for layers in stage_layers for layer in layers}


def _kept_recomputing(config: RunConfig, x: ActivationSizes, layer: int, block: BlockActivations) -> float:
    collectives = BlockCollectives.of(config.model, layer)
    return kept_by_recomputing_block(block, x, collectives, _keep(config))


def _kept(
    config: RunConfig, stage_layers: Sequence[range], x: ActivationSizes, blocks: Mapping[int, BlockActivations]
) -> float:
    """Bytes kept of one token, by all stages of a rank."""
    again = [recomputes for layers in stage_layers for recomputes in recompute_flags(config, layers)]
    of_blocks = sum(
        _kept_recomputing(config, x, layer, block) if recomputes else block.kept
        for (layer, block), recomputes in zip(blocks.items(), again, strict=True)
    )
    outputs = sum(layers.stop < config.model.n_layers for layers in stage_layers)
    return of_blocks + len(stage_layers) * FP32 * config.model.head_dim + outputs * x.stream


def _pipeline_buffers(layout: Layout, stage_layers: Sequence[range], n_layers: int, n_microbatches: int) -> int:
    """Activations and gradients in buffers: received from both neighbours for all microbatches, and one being sent."""
    before, after = (
        sum(layers.start > 0 for layers in stage_layers),
        sum(layers.stop < n_layers for layers in stage_layers),
    )
    return n_microbatches * (before + after) + (before > 0)


def _logit_bytes(config: RunConfig, layout: Layout, number: int) -> float:
    """Bytes of one chunk's logits, and of the fp32 numbers in which its softmax is computed."""
    logits, chunks = microbatch_tokens(config, layout) * config.model.vocab_size / layout.tensor, 1
    while chunks < LOSS_CHUNKS and logits / chunks > MIN_CHUNK_LOGITS.get(
        config.train.device, MIN_CHUNK_LOGITS["cuda"]
    ):
        chunks *= 2
    fp32 = (
        0.0 if config.train.compile else logits / chunks if layout.tensor > 1 else min(SOFTMAX_BLOCK, logits / chunks)
    )
    return number * logits / chunks + FP32 * fp32
