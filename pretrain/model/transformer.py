"""What all architectures share: embedding, blocks, final norm, output projection, loss. Names are Hugging Face's.

An architecture is a subclass that builds its blocks, and a spec (`pretrain.model.spec`); see `pretrain.model.architectures.llama`.

Shape suffixes: B batch, S sequence, D model width, V vocabulary, T tokens (B*S).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import AUTO, ModelConfig
from pretrain.model.attention import DocumentMask, context_parallel_mask, document_mask
from pretrain.model.kv_cache import KVCache
from pretrain.model.loss import LinearLoss, LossSum, linear_cross_entropy, softmax_gradient_
from pretrain.model.norm import RMSNorm
from pretrain.model.rope import rope_tables
from pretrain.model.spec import architecture_of


class Decoder(nn.Module):
    """Everything but the output projection; the level of the tree that Hugging Face calls `model`.

    A stage of a pipeline holds some of the layers, under the names that they have in the whole model.
    """

    def __init__(self, config: ModelConfig, layers: range, build_block: Callable[[int], nn.Module]):
        super().__init__()
        first, last = layers.start == 0, layers.stop == config.n_layers
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, config.d_model) if first or (last and config.tie_embeddings) else None
        )
        self.layers = nn.ModuleDict({str(i): build_block(i) for i in layers})
        self.norm = RMSNorm(config.d_model, config.norm_eps) if last else None


class Transformer(nn.Module):
    """A causal language model, or the consecutive `layers` of one. Builds on any device, `meta` included; `init` gives it weights.

    The first layers come with the embedding, the last ones with the final norm and the output projection. With tied embeddings there is
    no `lm_head`: one parameter has one name, as in Hugging Face's saved files, and the last part of a model holds `embed_tokens` too.
    Raises ValueError for a config that still says `auto`.
    """

    def __init__(self, config: ModelConfig, attention: str = "sdpa", layers: range | None = None):
        super().__init__()
        if config.vocab_size == AUTO:
            raise ValueError("model.vocab_size=auto has to be resolved to the tokenizer's size before a model is built")
        layers = range(config.n_layers) if layers is None else layers
        self.config = config
        self.attention = attention
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.n_layers
        self.model = Decoder(config, layers, self.build_block)
        untied = self.is_last and not config.tie_embeddings
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False) if untied else None
        self.linear_loss: LinearLoss = linear_cross_entropy
        self.compiled = False
        self.tp_plan = architecture_of(config).tp_plan
        self.tied_parameter = "model.embed_tokens.weight" if config.tie_embeddings else None

    @classmethod
    def parameter_shapes(cls, config: ModelConfig, layers: range) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of each parameter of these layers, from a model without memory."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in cls(config, layers=layers).named_parameters()}

    def build_block(self, layer: int) -> nn.Module:
        """The block of that layer, called as (x [B, S, D], rope, mask, cache) -> [B, S, D]. Each architecture defines it."""
        raise NotImplementedError

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks that are here, in order."""
        return list(self.model.layers.values())

    @property
    def fsdp_units(self) -> list[nn.Module]:
        """What is used at one time: the embedding, unless it is the output projection too, and each block. The rest is used at the end."""
        embedding = [] if self.model.embed_tokens is None or self.tied_parameter else [self.model.embed_tokens]
        return [*embedding, *self.layers]

    @property
    def output_weight(self) -> Tensor:
        """The output projection [V, D]; only the last part of a model has it."""
        projection = self.lm_head or self.model.embed_tokens
        assert self.is_last
        assert projection is not None
        return projection.weight

    def compile_submodules(self) -> None:
        """torch.compile what repeats or is made of many small operations: every block, the final norm, the softmax of the loss.

        `dynamic=False`: a length of sequences has graphs of its own. By default the second length would make graphs whose every size is a
        variable, which are slower. What differs between batches of one length is marked (`kernels.Documents`).
        """
        self.compiled = True
        for layer in self.layers:
            # Not the call, whose hooks are not of this part.
            layer.forward = torch.compile(layer.forward, dynamic=False)
        if self.model.norm is not None:
            self.model.norm.compile(dynamic=False)
        self.linear_loss = partial(self.linear_loss, softmax=torch.compile(softmax_gradient_, dynamic=False))

    def document_mask(self, document_ids_BS: Tensor, positions_BS: Tensor) -> DocumentMask:
        """Build the mask of a batch for this model's attention kernel; see `attention.document_mask`."""
        return document_mask(document_ids_BS, positions_BS, self.attention, self.config, self.compiled)

    def context_parallel_mask(
        self, document_ids_BT: Tensor, positions_BT: Tensor, ranges: Sequence[tuple[int, int]], full_rows: bool
    ) -> DocumentMask:
        """Build the mask of the tokens of one context-parallel rank; see `attention.context_parallel_mask`."""
        return context_parallel_mask(
            document_ids_BT, positions_BT, self.attention, self.config, ranges, full_rows, self.compiled
        )

    def forward(self, x: Tensor, mask: DocumentMask, cache: KVCache | None = None) -> Tensor:
        """Token ids [B, S], or what the layers before give [B, S, D] -> [B, S, D], after the final norm where this part has it.

        A cache is extended by the S tokens.
        """
        x_BSD: Tensor = x if self.model.embed_tokens is None or not self.is_first else self.model.embed_tokens(x)
        rope = rope_tables(self.config.rope, self.config.head_dim, mask.positions_BS, mask.lengths_BS)
        for i, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD, rope, mask, None if cache is None else cache.layer(i))
        if cache is not None:
            cache.length += x.shape[1]
        return x_BSD if self.model.norm is None else self.model.norm(x_BSD)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """[..., D] -> [..., V], in the type of the hidden states. For a few positions: training uses `loss`."""
        return F.linear(hidden_BSD, self.output_weight)

    def loss(self, x: Tensor, labels_BS: Tensor, mask: DocumentMask, z_loss: float = 0.0) -> LossSum:
        """Summed loss of the batch, of token ids [B, S] or what the layers before give [B, S, D].

        `labels_BS[b, s]` is the token that follows token s of row b, or -100 for none. Divide `total` by the number of labels of the whole
        global batch, so that micro-batches and ranks weigh by tokens.
        """
        return self.linear_loss(self.forward(x, mask), self.output_weight, labels_BS, z_loss)
