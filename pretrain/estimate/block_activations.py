"""What a block keeps under a layout, with recomputation and a split backward pass, for any architecture. No torch.

The terms of one block are the architecture's (`pretrain.model.activation_terms`). All sizes are bytes of one token on
one rank.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from parallel.layout import Layout
from pretrain.config import ModelConfig, RunConfig
from pretrain.model.activation_terms import FP32, ActivationSizes, BlockActivations
from pretrain.model.spec import layer_plan


def microbatch_tokens(config: RunConfig, layout: Layout) -> int:
    """Tokens of a microbatch on one context rank."""
    return config.train.micro_batch_size * config.data.seq_len // layout.context


def activation_sizes(config: RunConfig, layout: Layout, number: int) -> ActivationSizes:
    """Sizes under a resolved config, whose computations take `number` bytes a number."""
    model, t, c = config.model, layout.tensor, layout.context
    sequence = t > 1 and layout.sequence is True
    query, key = model.n_heads / t * model.head_dim, max(1.0, model.n_kv_heads / t) * model.head_dim
    gather = c > 1 and layout.context_method == "gather"
    # Of 2c chunks, a rank's i-th sees the keys of i + 1 chunks, and its mirrored one those of 2c - i.
    seen = config.data.seq_len * (2 * c + 1) / (4 * c)
    # The keys that a chunk sees are a view in one row, but a copy in several rows.
    cut = gather and config.train.micro_batch_size > 1
    normed = query + key if model.qk_norm else 0.0
    return ActivationSizes(
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
        mlp_gradient=number
        * (model.d_model * model.d_ff / t)
        * (layout.world_size > 1)
        / microbatch_tokens(config, layout),
        number=number,
        tokens=microbatch_tokens(config, layout),
        tensor=t,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        splits_context=c > 1,
        sequence=sequence,
        compiled=config.train.compile is True,
    )


@dataclass(frozen=True)
class BlockCollectives:
    """Collectives of tensor parallelism in the forward pass of a block, counted in its layer's plan."""

    gathers: int
    """Inputs gathered along the sequence. Without `sequence` nothing is sent in the forward pass."""
    reductions: int
    """Outputs summed over the ranks."""

    @classmethod
    def of(cls, config: ModelConfig, layer: int) -> BlockCollectives:
        """Count those of a layer."""
        styles = list(layer_plan(config, layer).values())
        return cls(styles.count("gather_sequence"), styles.count("rowwise"))


def kept_by_recomputing_block(
    block: BlockActivations, x: ActivationSizes, collectives: BlockCollectives, keep: Collection[str]
) -> float:
    """Its input, and the results of the operators that `train.recompute_keep` names."""
    kept = x.stream
    if "matmul" in keep:
        kept += block.product_outputs + block.expert_hidden + block.expert_outputs
    if "attention" in keep:
        kept += x.query + x.logarithms
    if "collective" in keep:
        kept += (x.tensor > 1) * (collectives.gathers * x.whole + collectives.reductions * x.stream)
        kept += x.splits_context * 2 * x.rows * x.key + block.expert_messages
    return kept


def kept_for_weights(block: BlockActivations) -> float:
    """Kept between the halves of a split backward pass (`parallel.pipeline.zero_bubble`): the inputs of matrix
    products, and the gradients of their outputs."""
    return block.product_inputs + block.product_outputs


def kept_when_recomputed(block: BlockActivations, x: ActivationSizes, keep: Collection[str]) -> float:
    """Bytes a token of a recomputed block at the start of its backward pass: what it would have kept without
    recomputation, its input, and of what `keep` names the output of its last product and the messages of experts, which
    nobody reads."""
    own_input = 0.0 if x.compiled or x.stream == x.stream_fp32 else x.stream  # otherwise the first norm keeps it
    unread = ("matmul" in keep) * (block.expert_outputs or x.whole) + ("collective" in keep) * block.expert_messages
    return block.kept + own_input + unread
