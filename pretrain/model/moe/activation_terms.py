"""What a mixture of experts keeps for its backward pass, in bytes of one token on one rank. Imports no torch.

Counted tensor by tensor, as in `pretrain.model.activation_terms`, from the modules of this package. The load is assumed
to be even: each rank gets as many rows as it sends. Tensor ranks divide the tokens, so all terms are divided by their
number. Letters: D model width, F hidden width of an expert, K experts of a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import ModelConfig
from pretrain.model.activation_terms import FP32, INT64, ActivationSizes


@dataclass(frozen=True)
class ExpertSizes:
    """Bytes of one token of a rank, before tensor ranks divide the tokens."""

    number: int
    """Bytes of a number in the passes."""
    token: float
    """D numbers."""
    token_fp32: float
    scores: float
    """E numbers, fp32."""
    choice: float
    """K indices, int64."""
    row_inputs: float
    """Rows [D] that the experts of a rank get of a token. With `expert_tensor` ranks they get those of all of them."""
    row_hidden: float
    """Of these rows, the part of F that a rank computes."""
    row_weights: float
    """Routing weights of these rows, fp32."""
    row_indices: float
    """An index for each of these rows, int64."""
    shared_hidden: float
    """Hidden numbers of the shared experts."""
    expert_matrix: float
    """One [D, F] of each of the rank's experts, divided by the tokens of a microbatch."""

    @classmethod
    def of(cls, config: ModelConfig, x: ActivationSizes) -> ExpertSizes:
        """Of a model."""
        moe, D, number = config.moe, config.d_model, x.number
        rows = moe.top_k * x.expert_tensor
        local_experts = moe.n_experts / x.expert
        return cls(
            number=number,
            token=number * D,
            token_fp32=FP32 * D,
            scores=FP32 * moe.n_experts,
            choice=INT64 * moe.top_k,
            row_inputs=number * D * rows,
            row_hidden=number * moe.d_ff / x.expert_tensor * rows,
            row_weights=FP32 * rows,
            row_indices=INT64 * rows,
            shared_hidden=number * moe.shared_d_ff,
            expert_matrix=number * D * moe.d_ff * local_experts * x.tensor / x.tokens,
        )


def router_kept(config: ModelConfig, x: ActivationSizes) -> float:
    """The router: its input in fp32, logits and scores, the chosen experts and their weights.

    Compiled, it keeps its input as it came, and computes the scores again.
    """
    e, moe = ExpertSizes.of(config, x), config.moe
    chosen = e.choice + (2 if moe.normalize_top_k or moe.softmax_after_top_k else 1) * FP32 * moe.top_k
    if x.compiled:
        return e.token + e.scores + chosen
    copied = 0.0 if e.number == FP32 else e.token_fp32
    jitter = (e.number != FP32) * e.token_fp32 if moe.input_jitter else 0.0
    return copied + jitter + 2 * e.scores + chosen + 2 * FP32


def dispatch_kept(config: ModelConfig, x: ActivationSizes) -> float:
    """The permutation and its inverse; with ranks that share out the experts, the order of the received rows."""
    e = ExpertSizes.of(config, x)
    local = 2 * e.row_indices
    received = 2 * e.row_indices if x.expert > 1 and config.moe.n_experts > x.expert else 0.0
    return local + received


def experts_kept(config: ModelConfig, x: ActivationSizes) -> float:
    """The input rows, the outputs of gate and up, and the weights of the rows."""
    e = ExpertSizes.of(config, x)
    parts = 3 * e.expert_matrix / x.expert_tensor if x.expert_tensor > 1 else 0.0  # copies of the rank's part of F
    return e.row_inputs + 2 * e.row_hidden + e.row_weights + parts


def experts_hidden(config: ModelConfig, x: ActivationSizes) -> float:
    """Outputs of gate and up."""
    return 2 * ExpertSizes.of(config, x).row_hidden


def experts_outputs(config: ModelConfig, x: ActivationSizes) -> float:
    """Outputs of down."""
    return ExpertSizes.of(config, x).row_inputs


def shared_kept(config: ModelConfig, x: ActivationSizes) -> float:
    """The shared experts with their input, and their output if a gate scales it."""
    e, moe = ExpertSizes.of(config, x), config.moe
    if not moe.n_shared_experts:
        return 0.0
    return e.token + (3 if x.compiled else 4) * e.shared_hidden + moe.shared_expert_gate * e.token


def experts_messages(config: ModelConfig, x: ActivationSizes) -> float:
    """Results of messages between expert ranks in the forward pass: rows, their weights, and what experts made of them.

    Ranks that divide the width of experts gather tokens, choices and weights, and add up results.
    """
    e = ExpertSizes.of(config, x)
    exchanged = 2 * e.row_inputs + e.row_weights if x.expert > 1 else 0.0
    gathered = x.expert_tensor * e.token + e.row_indices + e.row_weights + e.token if x.expert_tensor > 1 else 0.0
    return exchanged + gathered


def experts_peak(config: ModelConfig, x: ActivationSizes) -> float:
    """The most that exists during the passes of the experts, beside what is kept.

    In the forward pass, these are their output and its copy by token; with expert ranks also the rows that were sent,
    and the output sorted by rank and sent back. In the backward pass, uncompiled, they are silu(gate), its product with
    up, the hidden activations, the gradients of the last two, those of gate and up, and these two put together; and
    then the gradients of the input and of the matrices.
    """
    e = ExpertSizes.of(config, x)
    sorted_again = x.expert > 1 and config.moe.n_experts > x.expert
    forward = (2 + 2 * (x.expert > 1) + sorted_again) * e.row_inputs
    if x.compiled:
        return max(forward, 2 * e.row_inputs + 3 * e.row_hidden + 3 * e.expert_matrix)
    activation = e.row_inputs + 9 * e.row_hidden + e.expert_matrix
    weights = 2 * e.row_inputs + 8 * e.row_hidden + 3 * e.expert_matrix
    return max(forward, activation, weights)
