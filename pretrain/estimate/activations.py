"""What a rank has beside parameters, gradients and optimizer state, at the moment that has most of it: an estimate by formula. No torch.

Kept for the backward passes, in bytes a token (the accounting of arXiv:2205.05198, section 4, for the operators of this program):

- Of a block in bf16, compiled: the inputs of both norms 4 D, their results 4 D, q and attention's output 4 h_q, k and v 4 h_kv, the MLP's
  gate, up and product 6 F, the softmax's logarithms 4 a head. Uncompiled, a norm keeps its input in fp32, and what it multiplies by its
  weight: 8 D more for both; and silu(gate) is 2 F more. Norms of q and k (`qk_norm`) keep 6 of a number in the same way, compiled 2.
- Tensor ranks divide all but the results of norms, which they gather, and what norms keep, which only `sequence` divides. `context`
  divides the tokens; attention's output is there as computed and as put together, and `gather` keeps whole rows of k and v.
- A block that recomputes keeps its input 2 D, and the results that `recompute_keep` names.
- Under zero bubble, until the gradients of its weights are made, a block keeps 8 D + 4 h_q + 4 h_kv + 6 F, recomputing or not.
- Of each stage and microbatch: RoPE's tables 4 K, and in a pipeline the output 2 D, which waits for its gradient. Torch has memory for what
  comes from both sides for all microbatches of a step, and a gradient is on its way to the stage before.
- Of the end of the model: the final norm's input, and the gradients that the loss makes in its forward pass, 2 D and the projection's.

Beside that there is, at one moment or another (`moments`): in the loss, a chunk's logits with their softmax in fp32, and the hidden states,
gathered; in the backward pass, five fp32 copies in an uncompiled norm, three gradients of F numbers in an MLP, the gathered gradient of
its sum, all that a recomputing block makes again, and gradients of weights; of FSDP2, what went into the last reduction, and under
`zero=3` a gathered block that is not in use yet (`units`).

Rows are one document here: of packed ones `attention=sdpa` has masks of [S, S], which the data decide. Letters: D model width, F hidden
width, K head width, h_q and h_kv widths of all query and key/value heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from pretrain.estimate.fsdp_units import Units
from pretrain.model.activation_terms import FP32, NORM_BACKWARD, ActivationSizes, BlockActivations
from pretrain.model.spec import architecture_of

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
"""Per number that is computed with."""

LOSS_CHUNKS = 16
"""The loss has the logits of a sixteenth of a microbatch at a time, or of more while those are few (`pretrain.model.loss`)."""

FEW_LOGITS = {"cpu": 2**22, "cuda": 2**25}

SOFTMAX_BLOCK = 2**20
"""fp32 numbers that the uncompiled softmax works on at a time, where the vocabulary is whole."""


class Pairs(NamedTuple):
    """Pairs of stage and microbatch on a rank of a pipeline, at one time."""

    begun: int
    """Their forward pass has begun, and the backward pass to their input has not ended."""
    waiting: int = 0
    """They wait for the gradients of their weights, under zero bubble (`parallel.pipeline.zero_bubble`)."""


def activation_bytes(
    config: RunConfig, layout: Layout, pipeline_rank: int, held: Sequence[range], n_microbatches: int
) -> int:
    """The most that a rank has at one time; see `moments`."""
    times = most_pairs(layout, pipeline_rank, n_microbatches)
    return math.ceil(max(max(moments(config, layout, pairs, held, n_microbatches).values()) for pairs in times))


def moments(
    config: RunConfig, layout: Layout, pairs: Pairs, held: Sequence[range], n_microbatches: int
) -> dict[str, float]:
    """Bytes at the moments of a step that may have most.

    Args:
        config: resolved.
        layout: of the run.
        pairs: that a rank of the pipeline has, at their most.
        held: the layers of each stage that it holds.
        n_microbatches: of a step.
    """
    model, tokens, number = config.model, microbatch_tokens(config, layout), COMPUTE_BYTES[config.train.precision]
    x, keep = activation_sizes(config, layout, number), _keep(config)
    blocks = _blocks(config, held, x)
    units = Units.of(config, layout, held, n_microbatches, number)
    # Stages have about as many layers each.
    waiting = tokens * sum(kept_for_weights(block) for block in blocks) * pairs.waiting / len(held)
    buffers = _pipeline_buffers(layout, held, model.n_layers, n_microbatches) * tokens * x.stream
    kept = tokens * _kept(config, held, x, blocks) * pairs.begun / len(held) + waiting

    found = {"microbatch begins": units.begin, "step ends": buffers + units.end}
    if layout.pipeline > 1:
        found["embedding"] = (
            waiting + (kept - waiting) * (pairs.begun - 1) / max(1, pairs.begun) + buffers + number * units.embedding
        )  # one microbatch is through
    kept += buffers + units.reduced_before

    if units.head:
        input_of_norm = x.stream if x.compiled else x.stream_fp32
        normed = x.stream * (1 if x.compiled else 2)  # once more before the weight, uncompiled
        others = (
            n_microbatches if layout.pipeline > 1 and layout.schedule == "gpipe" else 1
        ) - 1  # between loss and backward pass
        kept += others * (tokens * (input_of_norm + normed - x.stream + x.whole) + number * units.head)
        loss = input_of_norm + normed + x.sequence * x.whole + x.whole  # hidden states gathered, and their gradients
        found["loss"] = kept + tokens * loss + number * units.head + _logit_bytes(config, layout, number)
        beside = 2 * x.stream if x.compiled else NORM_BACKWARD * x.stream_fp32
        found["final norm"] = kept + units.head_gradient + units.ahead + tokens * (input_of_norm + beside)

    kept += units.head_gradient
    recomputes = any(any(recomputing(config, layers)) for layers in held)
    block = max(blocks, key=lambda block: block.kept)
    of_block = tokens * (_kept_recomputing(config, x, block) if recomputes else block.kept)
    beside = tokens * block.backward_peak
    if recomputes:  # all of it is there again, also what is to wait
        again = kept_when_recomputed(block, x, keep) - kept_for_weights(block) * (pairs.waiting > 0)
        beside += tokens * again - of_block
    found["last block"] = kept + units.ahead + beside
    if units.gathers:
        found["last block arrives"] = kept + 2 * units.ahead + tokens * x.stream
    if layout.pipeline == 1 and layout.world_size > 1:
        kept += (
            units.ahead - of_block - units.reduced_before
        )  # the last block is through, and its reduction the last one
        found["last block's reduction"] = kept + tokens * x.stream + units.block_reduction
        if layout.zero > 1:
            found["block before it"] = kept + FP32 * units.block + beside
    return found


def most_pairs(layout: Layout, pipeline_rank: int, n_microbatches: int) -> tuple[Pairs, ...]:
    """The times at which a rank of the pipeline may have most, whatever each kind of pair costs.

    Those of the orders that PyTorch's schedules give; where microbatches fill no whole rounds, zero bubble has somewhat fewer.
    """
    p, v, m, rank = layout.pipeline, layout.stages_per_rank, n_microbatches, pipeline_rank
    if p == 1:
        return (Pairs(1),)
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
        at_the_end = (Pairs(later, 2 * rank + 1),) if m > p else ()
        return (Pairs(most), Pairs(most - 1, 1), *at_the_end)
    if layout.schedule == "interleaved_zero_bubble":
        return Pairs(most - rank, rank), Pairs(most - rank - 1, rank + 1)
    return (Pairs(most),)


def recomputing(config: RunConfig, layers: range) -> list[bool]:
    """Of each layer, whether it recomputes: every k-th of the model."""
    return [config.train.recompute != "none" and (layer + 1) % config.train.recompute_every == 0 for layer in layers]


def _keep(config: RunConfig) -> tuple[str, ...]:
    """Words of `recompute_keep`, where they count."""
    return config.train.recompute_keep if config.train.recompute == "selective" else ()


def _blocks(config: RunConfig, held: Sequence[range], x: ActivationSizes) -> list[BlockActivations]:
    """What each block of a rank keeps and has, by its architecture."""
    terms = architecture_of(config.model).block_activations
    return [terms(config.model, x, layer) for layers in held for layer in layers]


def _kept_recomputing(config: RunConfig, x: ActivationSizes, block: BlockActivations) -> float:
    collectives = BlockCollectives.of(architecture_of(config.model))
    return kept_by_recomputing_block(block, x, collectives, _keep(config))


def _kept(config: RunConfig, held: Sequence[range], x: ActivationSizes, blocks: Sequence[BlockActivations]) -> float:
    """A token of one microbatch, by all stages of a rank."""
    again = [recomputes for layers in held for recomputes in recomputing(config, layers)]
    of_blocks = sum(
        _kept_recomputing(config, x, block) if recomputes else block.kept
        for block, recomputes in zip(blocks, again, strict=True)
    )
    outputs = sum(layers.stop < config.model.n_layers for layers in held)
    return of_blocks + len(held) * FP32 * config.model.head_dim + outputs * x.stream


def _pipeline_buffers(layout: Layout, held: Sequence[range], n_layers: int, n_microbatches: int) -> int:
    """Activations and gradients that there is memory for: of both sides, for all microbatches, and one on its way to the stage before."""
    before, behind = sum(layers.start > 0 for layers in held), sum(layers.stop < n_layers for layers in held)
    return n_microbatches * (before + behind) + (before > 0)


def _logit_bytes(config: RunConfig, layout: Layout, number: int) -> float:
    """Of a chunk, with the fp32 numbers that its softmax is computed in."""
    logits, chunks = microbatch_tokens(config, layout) * config.model.vocab_size / layout.tensor, 1
    while chunks < LOSS_CHUNKS and logits / chunks > FEW_LOGITS.get(config.train.device, FEW_LOGITS["cuda"]):
        chunks *= 2
    fp32 = (
        0.0 if config.train.compile else logits / chunks if layout.tensor > 1 else min(SOFTMAX_BLOCK, logits / chunks)
    )
    return number * logits / chunks + FP32 * fp32
