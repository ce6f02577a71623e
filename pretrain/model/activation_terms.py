"""Terms of what a block keeps for its backward pass. Architectures add them up. Imports no torch.

They are counted tensor by tensor, from the modules of this package as `parallel` runs them, in bytes of one token on
one rank. The dry run measures the same. Letters: D model width, F hidden width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4
INT32 = 4
INT64 = 8

NORM_BACKWARD = 5
"""fp32 copies of its input that an uncompiled norm has at one time in its backward pass: two products of the gradient;
the mean's gradient expanded, the power, and their product. A compiled norm is one kernel without copies."""


@dataclass(frozen=True)
class ActivationSizes:
    """Bytes of one token, on one rank, of the tensors that a block computes."""

    stream: float
    """The residual stream between blocks: D numbers, which tensor ranks divide under `sequence`."""
    stream_fp32: float
    """The same in fp32."""
    whole: float
    """Input or output of matrix products: D numbers, never divided."""
    query: float
    """All query heads; attention's output has the same size."""
    key: float
    """All key heads; the values have the same size."""
    hidden: float
    """F numbers."""
    logarithms: float
    """Logarithms of the softmax's sums, fp32."""
    mask: float
    """`sdpa` under `context` converts the mask to numbers in every block, and keeps them."""
    normed_heads: float
    """Queries and keys, if they have norms."""
    normed_heads_fp32: float
    """The same in fp32."""
    rows: float
    """Keys that attention keeps, divided by those of this rank's tokens: above 1 if other ranks' keys are gathered."""
    outputs: int
    """How often attention's output is kept: as computed, and under `context` also put together from chunks or from
    other ranks' heads."""
    mlp_gradient: float
    """The gradient of one [F, D] matrix, which waits for the end of the block's backward pass. 0 where it is
    accumulated at once."""
    number: int
    """Bytes of a number in the passes."""
    tokens: int
    """Tokens of a microbatch on one context rank."""
    tensor: int
    """Number of tensor ranks."""
    expert: int
    """Number of ranks that share out the experts."""
    expert_tensor: int
    """Number of ranks that divide the hidden width of each expert."""
    splits_context: bool
    """There are several context ranks."""
    sequence: bool
    """Sequence parallelism: inputs of products, and gradients of summed outputs, are gathered beside the rank's own
    part."""
    compiled: bool
    """Blocks are compiled."""


@dataclass(frozen=True)
class BlockActivations:
    """Bytes of one token in one block, on one rank."""

    kept: float
    """Kept from the forward to the backward pass, without recomputation."""
    product_inputs: float
    """Inputs of its matrix products. An input that several products share counts once."""
    product_outputs: float
    """Outputs of its matrix products. Their gradients have the same size."""
    backward_peak: float
    """The most that exists during its backward pass beside `kept`."""
    expert_inputs: float = 0.0
    """Of `kept`, what experts keep. It is freed before FSDP reduces their gradients, if they are a unit of their own.
    """
    expert_hidden: float = 0.0
    """Outputs of the experts' first products. No schedule delays the gradients of experts."""
    expert_outputs: float = 0.0
    """Outputs of their last product, which no backward pass reads."""
    expert_messages: float = 0.0
    """Results of messages between the ranks of experts in the forward pass."""


def norm_kept(x: ActivationSizes) -> float:
    """A norm over the residual stream keeps its input.

    Uncompiled, it keeps it in fp32, and the normalised input as well.
    """
    return x.stream if x.compiled else x.stream_fp32 + x.stream


def attention_kept(x: ActivationSizes) -> float:
    """Attention without its input: queries, keys, values, the kernel's results, and what norms of the heads keep."""
    normed_heads = x.normed_heads if x.compiled else x.normed_heads + x.normed_heads_fp32
    return (1 + x.outputs) * x.query + 2 * x.rows * x.key + x.logarithms + x.mask + normed_heads


def swiglu_kept(x: ActivationSizes) -> float:
    """A SwiGLU MLP without its input: gate, up and their product. Uncompiled, silu(gate) as well."""
    return 3 * x.hidden if x.compiled else 4 * x.hidden


def attention_product_inputs(x: ActivationSizes) -> float:
    """Inputs of q_proj, k_proj and v_proj (one), and of o_proj."""
    return x.whole + x.query


def attention_product_outputs(x: ActivationSizes) -> float:
    """Outputs of q_proj, k_proj, v_proj and o_proj."""
    return x.whole + x.query + 2 * x.key


def swiglu_product_inputs(x: ActivationSizes) -> float:
    """Inputs of gate_proj and up_proj (one), and of down_proj."""
    return x.whole + x.hidden


def swiglu_product_outputs(x: ActivationSizes) -> float:
    """Outputs of gate_proj, up_proj and down_proj."""
    return x.whole + 2 * x.hidden


def swiglu_backward(x: ActivationSizes) -> float:
    """The most that exists during the backward pass of a SwiGLU MLP, while most of what the block has kept still
    exists."""
    down = x.hidden + x.sequence * x.whole  # the gradient of the product, and the gathered gradient of the output
    product = 2 * x.hidden + x.mlp_gradient  # gradients of the product, silu(gate) and up; the product itself is freed
    return max(down, product)


def norm_before_swiglu_backward(x: ActivationSizes) -> float:
    """The most that exists in the backward pass of the norm before the MLP. The gradients of the MLP's three matrices
    exist then, and what the MLP kept is freed."""
    own = 0 if x.compiled else NORM_BACKWARD * x.stream_fp32 - x.stream
    return 3 * x.mlp_gradient + own - 4 * x.hidden - x.whole
