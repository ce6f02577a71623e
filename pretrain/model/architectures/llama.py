"""The Llama block (arXiv:2302.13971): attention, then a SwiGLU MLP, each behind a norm. Also that of Mistral and Qwen3.

Shape suffixes: B batch, S sequence, D model width.
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
    norm_before_swiglu_backward,
    norm_kept,
    swiglu_backward,
    swiglu_kept,
    swiglu_product_inputs,
    swiglu_product_outputs,
)
from pretrain.model.attention import Attention, DocumentMask
from pretrain.model.kv_cache import LayerCache
from pretrain.model.mlp import MLP
from pretrain.model.norm import RMSNorm
from pretrain.model.rope import Rope
from pretrain.model.spec import HEAD, RESIDUAL, ArchitectureSpec, ModuleSpec, embedding, linear, norm
from pretrain.model.transformer import Transformer


class Block(nn.Module):
    """One layer: attention, then the MLP. Each reads the norm of the residual stream and is added to it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config.d_model, config.d_ff)
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x_BSD: Tensor, rope: Rope, mask: DocumentMask, cache: LayerCache | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, mask, cache)
        out_BSD: Tensor = x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))
        return out_BSD


class Llama(Transformer):
    """A causal language model of such blocks."""

    def build_block(self, layer: int) -> nn.Module:
        """All layers are alike."""
        return Block(self.config)


MODULES = {
    "model.embed_tokens": embedding("vocab_parallel_embedding"),
    "model.layers.*.input_layernorm": norm("sequence_parallel"),
    "model.layers.*.self_attn": ModuleSpec("gather_sequence"),
    "model.layers.*.self_attn.q_proj": linear("colwise", "attention"),
    "model.layers.*.self_attn.k_proj": linear("kv_colwise", "attention"),
    "model.layers.*.self_attn.v_proj": linear("kv_colwise", "attention"),
    "model.layers.*.self_attn.q_norm": norm("qk_norm"),
    "model.layers.*.self_attn.k_norm": norm("qk_norm"),
    "model.layers.*.self_attn.o_proj": linear("rowwise", "attention", RESIDUAL),
    "model.layers.*.post_attention_layernorm": norm("sequence_parallel"),
    "model.layers.*.mlp": ModuleSpec("gather_sequence"),
    "model.layers.*.mlp.gate_proj": linear("colwise", "mlp"),
    "model.layers.*.mlp.up_proj": linear("colwise", "mlp"),
    "model.layers.*.mlp.down_proj": linear("rowwise", "mlp", RESIDUAL),
    "model.norm": norm("sequence_parallel"),
    "lm_head": linear("vocab_parallel_head", "head", group=HEAD),
}
"""Each module's tensor-parallel style, and the kind, initial values and optimizer group of its parameters."""


def block_activations(config: ModelConfig, x: ActivationSizes, layer: int) -> BlockActivations:
    """Two norms, with attention and the MLP, which keep a norm's result as their input."""
    return BlockActivations(
        kept=2 * (norm_kept(x) + x.whole) + attention_kept(x) + swiglu_kept(x),
        product_inputs=attention_product_inputs(x) + swiglu_product_inputs(x),
        product_outputs=attention_product_outputs(x) + swiglu_product_outputs(x),
        backward_peak=x.stream + max(swiglu_backward(x), norm_before_swiglu_backward(x)),
    )


SPEC = ArchitectureSpec(Llama, MODULES, block_activations)
