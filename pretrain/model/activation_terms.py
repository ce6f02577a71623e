"""What a block keeps of a token for its backward pass: the terms that architectures add up. Imports no torch.

Counted tensor by tensor from the modules of this package as `parallel` runs them, in bytes a token on one rank; the dry run measures
the same. Letters: D model width, F hidden width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4

NORM_BACKWARD = 5
"""fp32 copies of its input that an uncompiled norm has at once in its backward pass: two products of the gradient; the mean's gradient
expanded, the power, and their product. Compiled it is one kernel without copies."""


@dataclass(frozen=True)
class ActivationSizes:
    """Bytes a token, on one rank, of the tensors that a block computes."""

    stream: float
    """The residual stream between blocks: D numbers, divided among tensor ranks under `sequence`."""
    stream_fp32: float
    whole: float
    """What matrix products read and return: D numbers, never divided."""
    query: float
    """All query heads; attention's output has the same size."""
    key: float
    """All key heads; the values have the same size."""
    hidden: float
    """F numbers."""
    logarithms: float
    """The logarithms of the softmax's sums, fp32."""
    mask: float
    """`sdpa` under `context` converts the mask to numbers in every block, and keeps them."""
    normed_heads: float
    """Queries and keys, where they have norms."""
    normed_heads_fp32: float
    rows: float
    """Keys that attention keeps, as a multiple of those of the rank's tokens."""
    outputs: int
    """Times that attention's output is kept: as computed, and under `context` once more, put together from chunks or other ranks' heads."""
    mlp_gradient: float
    """The gradient of one [F, D] matrix, which waits for the end of its block's backward pass; 0 where it is added to another at once."""
    splits_tensor: bool
    splits_context: bool
    sequence: bool
    """The input of products and the gradient of sums are gathered, beside the rank's part of them."""
    compiled: bool


@dataclass(frozen=True)
class BlockActivations:
    """Bytes a token of one block, on one rank."""

    kept: float
    """From its forward to its backward pass, where nothing recomputes."""
    product_inputs: float
    """What goes into its matrix products; products that share an input count it once."""
    product_outputs: float
    """What comes out of its matrix products; their gradients have the same size."""
    backward_peak: float
    """The most that its backward pass has beside what the block has kept."""


def norm_kept(x: ActivationSizes) -> float:
    """A norm over the residual stream keeps its input; uncompiled in fp32, and what it multiplies by its weight."""
    return x.stream if x.compiled else x.stream_fp32 + x.stream


def attention_kept(x: ActivationSizes) -> float:
    """Attention without its input: queries, keys, values, what the kernel returns, and what norms of the heads keep."""
    normed_heads = x.normed_heads if x.compiled else x.normed_heads + x.normed_heads_fp32
    return (1 + x.outputs) * x.query + 2 * x.rows * x.key + x.logarithms + x.mask + normed_heads


def swiglu_kept(x: ActivationSizes) -> float:
    """A SwiGLU MLP without its input: gate, up and their product; uncompiled also silu(gate)."""
    return 3 * x.hidden if x.compiled else 4 * x.hidden


def attention_product_inputs(x: ActivationSizes) -> float:
    """What goes into q_proj, k_proj and v_proj, and into o_proj."""
    return x.whole + x.query


def attention_product_outputs(x: ActivationSizes) -> float:
    """What comes out of q_proj, k_proj, v_proj and o_proj."""
    return x.whole + x.query + 2 * x.key


def swiglu_product_inputs(x: ActivationSizes) -> float:
    """What goes into gate_proj and up_proj, and into down_proj."""
    return x.whole + x.hidden


def swiglu_product_outputs(x: ActivationSizes) -> float:
    """What comes out of gate_proj, up_proj and down_proj."""
    return x.whole + 2 * x.hidden


def swiglu_backward(x: ActivationSizes) -> float:
    """The most in an MLP's backward pass, most of what the block has kept being there still."""
    down = x.hidden + x.sequence * x.whole  # the gradient of the product, and the gathered one of the sum
    product = 2 * x.hidden + x.mlp_gradient  # the gradients of the product, silu(gate) and up, less the product itself
    return max(down, product)


def norm_before_swiglu_backward(x: ActivationSizes) -> float:
    """The most in the backward pass of an MLP's own norm: the MLP's gradients wait, what it kept is free."""
    own = 0 if x.compiled else NORM_BACKWARD * x.stream_fp32 - x.stream
    return 3 * x.mlp_gradient + own - 4 * x.hidden - x.whole
