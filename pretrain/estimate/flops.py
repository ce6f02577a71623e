"""Parameter counts and FLOPs of a model, from its config and its architecture's spec. Imports no torch.

Conventions: a multiplication and an addition are 2 FLOPs. Forward and backward pass together take 3 times the FLOPs of
the forward pass. Only matrix products count: every weight that multiplies a token (the output projection too, the
embedding lookup not), and the two products of attention. A token multiplies the weights of its `top_k` experts, of the
shared ones and of the router. Causal attention counts the half of [S, S] that is needed
(Megatron-LM, MaxText); `causal=False` counts all of it (PaLM, nanoGPT). Recomputation does not count: this is for MFU,
not HFU. Masks between packed documents are not subtracted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from parallel.pipeline.schedule import LayerCosts
from pretrain.config import ModelConfig
from pretrain.console import format_count
from pretrain.estimate.parameters import model_parameters
from pretrain.model.spec import architecture_of


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has."""

    by_kind: dict[str, int]
    """{kind: count}, with the kinds of the architecture's table. A tied output projection counts as `embedding`."""
    active: int
    """Those that a token uses: all but the experts that it is not sent to."""
    layer_matmul: tuple[float, ...]
    """Parameters of each layer that multiply a token."""
    output_matmul: int
    """Parameters of the output projection, tied or not."""

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return sum(self.by_kind.values())

    @property
    def block_matmul(self) -> float:
        """Parameters of all layers that multiply a token."""
        return sum(self.layer_matmul)

    @property
    def matmul(self) -> float:
        """Parameters that multiply a token."""
        return self.block_matmul + self.output_matmul


@lru_cache(maxsize=256)
def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of the model that the architecture builds. `vocab_size` must be resolved."""
    by_kind: dict[str, int] = {}
    layer_matmul, active = [0.0] * config.n_layers, 0
    for parameter in model_parameters(config, range(config.n_layers)):
        count = math.prod(parameter.shape)
        by_kind[parameter.spec.kind] = by_kind.get(parameter.spec.kind, 0) + count
        products = parameter.spec.products_of(config)
        active += round(count * min(1.0, products)) if products else count
        if parameter.layer is not None:
            layer_matmul[parameter.layer] += count * products
    return ParameterCounts(by_kind, active, tuple(layer_matmul), config.vocab_size * config.d_model)


def parameter_count(config: ModelConfig) -> int:
    """Count all parameters, each once."""
    return count_parameters(config).total


def describe_parameters(config: ModelConfig) -> str:
    """`8.03B parameters`, or with experts `46.7B parameters, 12.9B active`."""
    counts = count_parameters(config)
    active = f", {format_count(counts.active)} active" if counts.active < counts.total else ""
    return f"{format_count(counts.total)} parameters{active}"


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Model FLOPs of one token, forward and backward, in sequences of `seq_len` tokens.

    6 * N_matmul, plus attention: 6 * n_layers * (n_heads * head_dim) * seq_len. A sliding window lowers the second
    term; without `causal` it is 12 * ..., the convention of PaLM (arXiv:2204.02311, appendix B).
    """
    return 6.0 * count_parameters(config).matmul + architecture_of(config).attention_flops(config, seq_len, causal)


def pipeline_costs(config: ModelConfig) -> LayerCosts:
    """Costs of the parts of the model that pipeline stages share out, in average layers.

    Costs are FLOPs of matrix products with weights. The embedding is a lookup: 0.
    """
    counts = count_parameters(config)
    unit = config.n_layers / counts.block_matmul
    return LayerCosts(tuple(unit * n for n in counts.layer_matmul), first=0.0, last=unit * counts.output_matmul)
