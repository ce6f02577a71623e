"""Parameter counts and FLOPs of a model, from its config alone. Imports no torch: planners read this.

Convention: a multiplication and an addition are 2 FLOPs; forward and backward together do 3 times the forward's.
Counted are matrix products only: every weight that multiplies the token stream (the output projection too, the embedding
lookup not) and the two products of attention. Causal attention counts the half of [S, S] that is needed (Megatron-LM,
MaxText); `causal=False` counts all of it (PaLM, nanoGPT). Recomputation counts for nothing: this is for MFU, not HFU.
Masks between packed documents are not subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by kind; `head` is 0 where it is the embedding."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    biases: int
    head: int
    matmul: int
    """Those that multiply the token stream: attention, mlp and the output projection, tied or not."""

    @property
    def total(self) -> int:
        """All of them, each counted once."""
        return self.embedding + self.attention + self.mlp + self.norms + self.biases + self.head


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Exact parameter counts of `Transformer(config)`; `vocab_size` must be resolved."""
    q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = config.n_layers * config.d_model * (2 * q_width + 2 * kv_width)
    mlp = config.n_layers * 3 * config.d_model * config.d_ff
    norms = config.n_layers * (2 * config.d_model + 2 * config.head_dim * config.qk_norm) + config.d_model
    biases = config.n_layers * (q_width + 2 * kv_width) * config.qkv_bias
    projection = config.vocab_size * config.d_model
    return ParameterCounts(
        embedding=projection,
        attention=attention,
        mlp=mlp,
        norms=norms,
        biases=biases,
        head=0 if config.tie_embeddings else projection,
        matmul=attention + mlp + projection,
    )


def parameter_count(config: ModelConfig) -> int:
    """All parameters, each counted once."""
    return count_parameters(config).total


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Model FLOPs of one token, forward and backward, in sequences of `seq_len` tokens.

    6 * N_matmul + 6 * n_layers * (n_heads * head_dim) * seq_len; the second term is smaller under a sliding window, and
    12 * ... without `causal`, the convention of PaLM (arXiv:2204.02311, appendix B).
    """
    window = min(config.sliding_window or seq_len, seq_len)
    seen = window - window * window / (2 * seq_len)  # keys, on average over a sequence; seq_len / 2 without a window
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * (seen if causal else seq_len)
    return 6.0 * count_parameters(config).matmul + attention
