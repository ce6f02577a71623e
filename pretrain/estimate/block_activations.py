"""What a block keeps of a token for its backward pass, and what it has beside that while the pass runs. No torch.

Counted from `pretrain.model` and `parallel` by hand, tensor by tensor, in bytes a token on one rank. Letters: D model, F hidden width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from parallel.layout import Layout
from pretrain.config import RunConfig

FP32 = 4

NORM_BACKWARD = 5
"""Copies in fp32 of its input that an uncompiled norm has at once in its backward pass: two products of the gradient; the mean's gradient
spread out, the power, and their product. Compiled it is one kernel without copies."""


@dataclass(frozen=True)
class Tensors:
    """Bytes a token of what a block computes."""

    stream: float
    """What lies between blocks: D numbers, divided under `sequence`."""
    stream_fp32: float
    whole: float
    """What matrix products read and give: D numbers, never divided."""
    query: float
    """So is attention's output."""
    key: float
    """So are the values."""
    hidden: float
    """F numbers."""
    logarithms: float
    """Of the softmax's sums, fp32."""
    mask: float
    """`sdpa` makes numbers of a mask, in every block anew, and keeps them."""
    normed_heads: float
    """Queries and keys, where they have norms."""
    normed_heads_fp32: float
    rows: float
    """Keys that attention keeps are so many times those of the rank's tokens."""
    outputs: int
    """Times that attention's output is kept: as computed, and under `context` as put together of chunks or of other ranks' heads."""
    splits_tensor: bool
    splits_context: bool
    sequence: bool
    """The input of products and the gradient of sums are gathered, beside the rank's part of them."""
    compiled: bool


def tensors_of(config: RunConfig, layout: Layout, number: int) -> Tensors:
    """Of a resolved config that computes with numbers of so many bytes."""
    model, t, c = config.model, layout.tensor, layout.context
    sequence = t > 1 and layout.sequence is True
    query, key = model.n_heads / t * model.head_dim, max(1.0, model.n_kv_heads / t) * model.head_dim
    gather = c > 1 and layout.context_method == "gather"
    seen = (
        config.data.seq_len * (2 * c + 1) / (4 * c)
    )  # a rank's i-th chunk of 2c sees the keys of i + 1, the mirrored one those of 2c - i
    cut = (
        gather and config.train.micro_batch_size > 1
    )  # the keys that a chunk sees are views of one row, and copies of several
    normed = query + key if model.qk_norm else 0.0
    return Tensors(
        stream=number * model.d_model / (t if sequence else 1),
        stream_fp32=FP32 * model.d_model / (t if sequence else 1),
        whole=number * model.d_model,
        query=number * query,
        key=number * key,
        hidden=number * model.d_ff / t,
        logarithms=FP32 * model.n_heads / t,
        mask=number * seen if gather and config.train.attention == "sdpa" else 0.0,
        normed_heads=number * normed,
        normed_heads_fp32=FP32 * normed,
        rows=(c if gather else 1) + 0.5 * cut,
        outputs=1 + (c > 1),
        splits_tensor=t > 1,
        splits_context=c > 1,
        sequence=sequence,
        compiled=config.train.compile is True,
    )


def kept_by_block(x: Tensors) -> float:
    """From its forward to its backward pass, where nothing is recomputed."""
    attention = (1 + x.outputs) * x.query + 2 * x.rows * x.key + x.logarithms + x.mask + x.normed_heads
    if x.compiled:
        return 2 * (x.stream + x.whole) + attention + 3 * x.hidden
    return 2 * (x.stream_fp32 + x.stream + x.whole) + x.normed_heads_fp32 + attention + 4 * x.hidden


def kept_by_recomputing_block(x: Tensors, keep: Collection[str]) -> float:
    """Its input, and the results of the operators that words of `train.recompute_keep` name."""
    kept = x.stream
    if "matmul" in keep:
        kept += x.query + 2 * x.key + 2 * x.whole + 2 * x.hidden
    if "attention" in keep:
        kept += x.query + x.logarithms
    if "collective" in keep:
        kept += x.splits_tensor * 2 * (x.whole + x.stream) + x.splits_context * 2 * x.rows * x.key
    return kept


def kept_for_weights(x: Tensors) -> float:
    """Between the halves of a backward pass that is split (`parallel.pipeline.zero_bubble`): what goes into the block's seven matrix products, of
    which some share it, and the gradients of what comes out."""
    return (2 * x.whole + x.query + x.hidden) + (2 * x.whole + x.query + 2 * x.key + 2 * x.hidden)


def kept_when_recomputed(x: Tensors, keep: Collection[str]) -> float:
    """At the beginning of its backward pass: all that it would have kept, its input, and its last product, which is not used again."""
    own_input = 0.0 if x.compiled or x.stream == x.stream_fp32 else x.stream  # else the first norm keeps it
    return kept_by_block(x) + own_input + ("matmul" in keep) * x.whole


def beside_block(x: Tensors, weight_gradient: float) -> float:
    """The most that its backward pass has beside what the block has kept, as long as most of that is there: in the MLP and its norm.

    `weight_gradient` is that of one of the MLP's three matrices, in bytes a token; 0 where it is added to another at once.
    """
    down = x.hidden + x.sequence * x.whole  # the gradient of the product, and the gathered one of the sum
    product = 2 * x.hidden + weight_gradient  # the gradients of the product, silu(gate) and up, less the product itself
    norm = (
        3 * weight_gradient + (0 if x.compiled else NORM_BACKWARD * x.stream_fp32 - x.stream) - 4 * x.hidden - x.whole
    )
    return x.stream + max(down, product, norm)
