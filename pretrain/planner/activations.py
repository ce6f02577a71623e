"""What a rank keeps for its backward passes: an estimate, by the formula below, of the tensors that autograd saves. No torch.

Bytes a token and block in bf16, with RMSNorm, SwiGLU, grouped-query flash attention, no dropout (the accounting of arXiv:2205.05198,
section 4, done for this block): the block's two inputs 4 D, the two normed ones 4 D, q and attention's output 4 h_q, k and v 4 h_kv, the
MLP's gate, up and product 6 F (8 F uncompiled, where silu(gate) is kept too), the softmax's logarithms 4 a head. Tensor ranks divide all
but the normed inputs, which they gather, and the inputs, which only `sequence` divides. `context` divides the tokens; its `gather` keeps
whole rows of k and v. Letters: D model width, F hidden width, h_q and h_kv widths of all query and key/value heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from parallel.layout import Layout
from pretrain.config import RunConfig

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
"""Per number that is computed with."""

LOSS_CHUNKS = 16
"""The loss has the logits of a sixteenth of a microbatch at a time (`pretrain.model.loss`)."""


def activation_bytes(config: RunConfig, layout: Layout, pipeline_rank: int, held: Sequence[range], n_microbatches: int) -> int:
    """The most that a rank keeps at one time.

    Args:
        config: resolved.
        layout: of the run.
        pipeline_rank: place on the pipeline.
        held: the layers of each stage that it holds.
        n_microbatches: of a step.
    """
    model, number = config.model, COMPUTE_BYTES[config.train.precision]
    tokens = _tokens(config, layout)
    between = tokens * model.d_model * number / (layout.tensor if layout.sequence else 1)  # what one block hands to the next
    blocks = sum(_block_bytes(config, layout, recomputed) for layers in held for recomputed in recomputing(config, layers))
    pairs = in_flight(layout, pipeline_rank, n_microbatches) / len(held)
    kept = tokens * blocks * pairs
    if config.train.recompute != "none":  # the block whose backward pass runs has all of its own
        kept += tokens * (_block_bytes(config, layout, recomputed=False) - _block_bytes(config, layout, recomputed=True))
    for layers in held:
        if layout.pipeline > 1:  # memory for what comes from both sides, for all microbatches
            kept += between * n_microbatches * ((layers.start > 0) + (layers.stop < model.n_layers))
        if layers.stop == model.n_layers:
            logits = tokens * model.vocab_size / layout.tensor / LOSS_CHUNKS
            losses = n_microbatches if layout.pipeline > 1 and layout.schedule == "gpipe" else 1  # each holds the projection's gradient
            kept += number * (2 * tokens * model.d_model + logits + losses * model.vocab_size * model.d_model / layout.tensor)
    return math.ceil(kept)


def in_flight(layout: Layout, pipeline_rank: int, n_microbatches: int) -> int:
    """Most pairs of stage and microbatch that have begun their forward pass and not ended their backward pass, on a rank of the pipeline.

    Those of the orders that PyTorch's schedules give.
    """
    p, v, m = layout.pipeline, layout.stages_per_rank, n_microbatches
    if p == 1:
        return 1
    later = p - 1 - pipeline_rank
    in_round = m // max(1, m // p)
    most = {
        "gpipe": m,
        "1f1b": later + 1,
        "interleaved": (v - 1) * in_round + 2 * later + 1,
        "interleaved_zero_bubble": v * in_round,
        "zbv": min(2 * p, m + 1 + pipeline_rank),
    }[layout.schedule]
    return min(most, m * v)


def _tokens(config: RunConfig, layout: Layout) -> int:
    """Of a microbatch, on one context rank."""
    return config.train.micro_batch_size * config.data.seq_len // layout.context


def recomputing(config: RunConfig, layers: range) -> list[bool]:
    """Of each layer, whether it recomputes: every k-th of the model."""
    return [config.train.recompute != "none" and (layer + 1) % config.train.recompute_every == 0 for layer in layers]


def _block_bytes(config: RunConfig, layout: Layout, recomputed: bool) -> float:
    """A token, of one block."""
    model, train, t = config.model, config.train, layout.tensor
    number = COMPUTE_BYTES[train.precision]
    D, q, F = model.d_model, model.n_heads * model.head_dim / t, model.d_ff / t
    kv = max(1.0, model.n_kv_heads / t) * model.head_dim
    rows = layout.context if layout.context_method == "gather" else 1
    between = D / (t if layout.sequence else 1)
    logarithms = 4 * model.n_heads / t
    if not recomputed:
        hidden = 3 if train.compile else 4
        return number * (2 * between + 2 * D + 2 * q + 2 * kv * rows + hidden * F) + logarithms
    kept, extra = between, 0.0
    if train.recompute == "selective":
        if "matmul" in train.recompute_keep:
            kept += q + 2 * kv + 2 * F + 2 * D
        if "attention" in train.recompute_keep:
            kept, extra = kept + q, logarithms
        if "collective" in train.recompute_keep:
            kept += (2 * D + 2 * between) * (t > 1) + 2 * kv * rows * (layout.context > 1)
    return number * kept + extra
