"""Parameter counts and FLOPs of a model, from its config and its architecture's spec. Imports no torch: planners read this.

Convention: a multiplication and an addition are 2 FLOPs; forward and backward together do 3 times the forward's.
Counted are matrix products only: every weight that multiplies the token stream (the output projection too, the embedding
lookup not) and the two products of attention. Causal attention counts the half of [S, S] that is needed (Megatron-LM,
MaxText); `causal=False` counts all of it (PaLM, nanoGPT). Recomputation counts for nothing: this is for MFU, not HFU.
Masks between packed documents are not subtracted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from pretrain.config import ModelConfig
from pretrain.estimate.parameters import model_parameters
from pretrain.model.spec import architecture_of


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model."""

    by_kind: dict[str, int]
    """Kind (`embedding`, `attention`, `mlp`, `norms`, `biases`, `head`, ...) -> how many; a tied `head` is the embedding, and counted once."""
    block_matmul: float
    """Those of the blocks that multiply a token."""
    output_matmul: int
    """Those of the output projection, tied or not."""

    @property
    def total(self) -> int:
        """All of them, each counted once."""
        return sum(self.by_kind.values())

    @property
    def matmul(self) -> float:
        """Those that multiply a token: of the blocks, and of the output projection."""
        return self.block_matmul + self.output_matmul


@lru_cache(maxsize=256)
def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Exact parameter counts of the model that is built; `vocab_size` must be resolved."""
    by_kind: dict[str, int] = {}
    block_matmul = 0.0
    for parameter in model_parameters(config, range(config.n_layers)):
        count = math.prod(parameter.shape)
        by_kind[parameter.spec.kind] = by_kind.get(parameter.spec.kind, 0) + count
        if parameter.layer is not None:
            block_matmul += count * parameter.spec.products
    return ParameterCounts(by_kind, block_matmul, config.vocab_size * config.d_model)


def parameter_count(config: ModelConfig) -> int:
    """All parameters, each counted once."""
    return count_parameters(config).total


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Model FLOPs of one token, forward and backward, in sequences of `seq_len` tokens.

    6 * N_matmul, and those of attention: 6 * n_layers * (n_heads * head_dim) * seq_len, fewer under a sliding window, and 12 * ...
    without `causal`, the convention of PaLM (arXiv:2204.02311, appendix B).
    """
    return 6.0 * count_parameters(config).matmul + architecture_of(config).attention_flops(config, seq_len, causal)


def pipeline_end_costs(config: ModelConfig) -> tuple[float, float]:
    """What the embedding adds to the first stage of a pipeline and the output projection to the last, in matrix products of one layer.

    The embedding is looked up and multiplies nothing: 0.
    """
    counts = count_parameters(config)
    return 0.0, config.n_layers * counts.output_matmul / counts.block_matmul
