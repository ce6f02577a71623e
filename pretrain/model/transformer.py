"""The decoder: embedding, pre-norm blocks, final norm, output projection. Modules and parameters carry Hugging Face names.

Shape suffixes: B batch, S sequence, D model width, V vocabulary, T tokens (B*S).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import AUTO, ModelConfig
from pretrain.model.attention import Attention, DocumentMask, LayerCache, document_mask
from pretrain.model.generate import KVCache
from pretrain.model.loss import LossSum, linear_cross_entropy, softmax_gradient_
from pretrain.model.mlp import MLP
from pretrain.model.norm import RMSNorm
from pretrain.model.rope import Rope, rope_tables


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

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


class Decoder(nn.Module):
    """Everything but the output projection; the level of the tree that Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class Transformer(nn.Module):
    """A causal language model. Builds on any device, `meta` included; `init.initialise` gives it weights.

    With tied embeddings there is no `lm_head`: one parameter has one name, as in Hugging Face's saved files.
    Raises ValueError for a config that still says `auto`.
    """

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        if config.vocab_size == AUTO:
            raise ValueError("model.vocab_size=auto has to be resolved to the tokenizer's size before a model is built")
        self.config = config
        self.attention = attention
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.softmax_gradient_ = softmax_gradient_

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, in order."""
        return self.model.layers

    @property
    def output_weight(self) -> Tensor:
        """The output projection [V, D]."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def compile_parts(self) -> None:
        """torch.compile what repeats or is made of many small operations: every block, the final norm, the softmax of the loss."""
        for layer in self.layers:
            layer.compile()
        self.model.norm.compile()
        self.softmax_gradient_ = torch.compile(softmax_gradient_)

    def document_mask(self, document_ids_BS: Tensor, positions_BS: Tensor) -> DocumentMask:
        """The mask of one batch for this model's attention kernel; see `attention.document_mask`."""
        return document_mask(document_ids_BS, positions_BS, self.attention, self.config)

    def forward(self, input_ids_BS: Tensor, mask: DocumentMask, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm, [B, S, D]. A cache is extended by the S tokens."""
        x_BSD: Tensor = self.model.embed_tokens(input_ids_BS)
        rope = rope_tables(self.config.rope, self.config.head_dim, mask.positions_BS, mask.lengths_BS)
        for i, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD, rope, mask, None if cache is None else cache.layer(i))
        if cache is not None:
            cache.length += input_ids_BS.shape[1]
        hidden_BSD: Tensor = self.model.norm(x_BSD)
        return hidden_BSD

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """[..., D] -> [..., V], in the type of the hidden states. For a few positions: training uses `loss`."""
        return F.linear(hidden_BSD, self.output_weight)

    def loss(self, input_ids_BS: Tensor, labels_BS: Tensor, mask: DocumentMask, z_loss: float = 0.0) -> LossSum:
        """Summed loss of the batch. `labels_BS[b, s]` is the token that follows `input_ids_BS[b, s]`, or -100 for none.

        Divide `total` by the number of labels of the whole global batch, so that micro-batches and ranks weigh by tokens.
        """
        hidden_TD = self(input_ids_BS, mask).flatten(0, 1)
        return linear_cross_entropy(hidden_TD, self.output_weight, labels_BS.flatten(), z_loss, self.softmax_gradient_)
