"""The Llama block with a mixture of experts in place of the MLP (arXiv:2101.03961, arXiv:2401.04088).

Mixtral, Qwen3-MoE, OLMoE and dots.llm1 are such models. Layers without experts (`model.moe.n_dense_layers`,
`every_n_layers`) are Llama's. Shape suffixes: B batch, S sequence, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.activation_terms import (
    ActivationSizes,
    BlockActivations,
    attention_kept,
    attention_product_inputs,
    attention_product_outputs,
    norm_kept,
)
from pretrain.model.architectures import llama
from pretrain.model.attention import Attention, DocumentMask
from pretrain.model.kv_cache import LayerCache
from pretrain.model.moe.activation_terms import (
    dispatch_kept,
    experts_hidden,
    experts_kept,
    experts_messages,
    experts_outputs,
    experts_peak,
    router_kept,
    shared_kept,
)
from pretrain.model.moe.layer import MoE
from pretrain.model.norm import RMSNorm
from pretrain.model.rope import Rope
from pretrain.model.spec import (
    EXPERT_DOWN,
    EXPERT_GATE_UP,
    NORMAL,
    RESIDUAL,
    ArchitectureSpec,
    ModuleSpec,
    OptimizerGroup,
    ParameterSpec,
    linear,
)
from pretrain.model.transformer import Transformer


class MoEBlock(nn.Module):
    """One layer: attention, then the experts. Each reads the norm of the residual stream and is added to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MoE(config, layer)
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x_BSD: Tensor, rope: Rope, mask: DocumentMask, cache: LayerCache | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, mask, cache)
        out_BSD: Tensor = x_BSD + self.mlp(self.post_attention_layernorm(x_BSD), mask)
        return out_BSD


class MoETransformer(Transformer):
    """A causal language model of such blocks, and of Llama's where layers have no experts."""

    def build_block(self, layer: int) -> nn.Module:
        """Build the block of that layer."""
        return MoEBlock(self.config, layer) if self.config.moe.has_experts(layer) else llama.Block(self.config)


ROUTER = OptimizerGroup("router", decays=True)
"""Not for Muon: a router's rows are the directions of its experts, and orthogonal ones would be a constraint."""


def active_fraction(config: ModelConfig) -> float:
    """Fraction of the tokens that an expert multiplies, on average."""
    return config.moe.top_k / config.moe.n_experts


MODULES = llama.MODULES | {
    # Tensor ranks divide the tokens of a layer with experts, so each has all of what is not an expert.
    "model.layers.*.mlp.gate": ModuleSpec(
        "replicated_with_grad_allreduce", {"weight": ParameterSpec("router", NORMAL, ROUTER, products=1)}
    ),
    "model.layers.*.mlp.experts": ModuleSpec(
        "experts",
        {
            "gate_up_proj": ParameterSpec("experts", NORMAL, EXPERT_GATE_UP, active_fraction),
            "down_proj": ParameterSpec("experts", RESIDUAL, EXPERT_DOWN, active_fraction),
        },
    ),
    "model.layers.*.mlp.shared_experts.gate_proj": linear("replicated_with_grad_allreduce", "shared experts"),
    "model.layers.*.mlp.shared_experts.up_proj": linear("replicated_with_grad_allreduce", "shared experts"),
    "model.layers.*.mlp.shared_experts.down_proj": linear("replicated_with_grad_allreduce", "shared experts", RESIDUAL),
    "model.layers.*.mlp.shared_expert_gate": linear("replicated_with_grad_allreduce", "shared experts", group=ROUTER),
}
"""As in `llama`; a layer has either the rows of the dense MLP or those of the experts."""


def layer_styles(config: ModelConfig, layer: int) -> dict[str, str]:
    """A layer with experts divides its tokens among the tensor ranks; a dense MLP gathers them."""
    return {"mlp": "split_tokens"} if config.moe.has_experts(layer) else {}


def block_activations(config: ModelConfig, x: ActivationSizes, layer: int) -> BlockActivations:
    """Those of the dense block, or of attention and the experts."""
    if not config.moe.has_experts(layer):
        return llama.block_activations(config, x, layer)
    terms = router_kept, dispatch_kept, experts_kept, shared_kept
    return BlockActivations(
        kept=2 * norm_kept(x) + x.whole + attention_kept(x) + sum(term(config, x) for term in terms) / x.tensor,
        product_inputs=attention_product_inputs(x),
        product_outputs=attention_product_outputs(x),
        backward_peak=x.stream + experts_peak(config, x) / x.tensor,
        expert_inputs=experts_kept(config, x) / x.tensor,
        expert_hidden=experts_hidden(config, x) / x.tensor,
        expert_outputs=experts_outputs(config, x) / x.tensor,
        expert_messages=experts_messages(config, x) / x.tensor,
    )


SPEC = ArchitectureSpec(MoETransformer, MODULES, block_activations, layer_styles=layer_styles)
