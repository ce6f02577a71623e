"""What all architectures share: embedding, final norm, output projection, loss. Module names are Hugging Face's.

An architecture is a subclass that builds the blocks, and a spec (`pretrain.model.spec`). `pretrain.model.architectures`
has them.

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
from pretrain.model.moe.router import Router
from pretrain.model.norm import RMSNorm
from pretrain.model.rope import rope_tables
from pretrain.model.spec import tp_plan


class Decoder(nn.Module):
    """Everything but the output projection: the module that Hugging Face calls `model`.

    A pipeline stage has some of the layers, under the names that they have in the full model.
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
    """A causal language model, or some consecutive `layers` of one.

    It can be built on any device, `meta` included; `pretrain.model.init` sets the weights. The first layers come with
    the embedding, the last ones with the final norm and the output projection. With tied embeddings there is no
    `lm_head`: the parameter has one name, as in Hugging Face's files, and the last layers come with `embed_tokens` as
    well.

    Raises:
        ValueError: `model.vocab_size` is still `auto`.
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
        self._layer_range = layers
        self.tied_parameter = "model.embed_tokens.weight" if config.tie_embeddings else None

    @classmethod
    def parameter_shapes(cls, config: ModelConfig, layers: range) -> dict[str, tuple[int, ...]]:
        """Return {canonical name: shape} of the parameters of these layers, from a model on the meta device."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in cls(config, layers=layers).named_parameters()}

    def build_block(self, layer: int) -> nn.Module:
        """Build the block of that layer, which is called as (x [B, S, D], rope, mask, cache) and returns [B, S, D]."""
        raise NotImplementedError

    @property
    def tp_plan(self) -> dict[str, str]:
        """How tensor ranks split the modules of these layers: {pattern of module names: style}."""
        return tp_plan(self.config, self._layer_range)

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks, in order: what is recomputed and compiled as one."""
        return list(self.model.layers.values())

    @property
    def fsdp_units(self) -> list[nn.Module]:
        """The modules that FSDP gathers as one: each block, and the embedding if it is not tied.

        The rest belongs to the root.
        """
        embedding = [] if self.model.embed_tokens is None or self.tied_parameter else [self.model.embed_tokens]
        return [*embedding, *self.layers]

    @property
    def output_weight(self) -> Tensor:
        """The output projection [V, D]. Only the chunk with the last layer has it."""
        projection = self.lm_head or self.model.embed_tokens
        assert self.is_last
        assert projection is not None
        return projection.weight

    def reset_buffers(self) -> None:
        """Write the initial values of the routers' buffers, which `to_empty` leaves unset."""
        for module in self.modules():
            if isinstance(module, Router):
                module.reset_buffers()

    @property
    def saved_buffers(self) -> dict[str, Tensor]:
        """{canonical name: tensor} of what a checkpoint holds beside the parameters."""
        routers = {name: module for name, module in self.named_modules() if isinstance(module, Router)}
        return {f"{name}.{key}": x for name, router in routers.items() for key, x in router.saved_buffers.items()}

    def compile_submodules(self) -> None:
        """Compile what repeats or consists of many small operations: every block, the final norm, the softmax of the
        loss.

        With `dynamic=False` each sequence length gets its own graphs. By default a second length would turn every size
        into a variable, which is slower. What differs between batches of one length is marked (`kernels.Documents`).
        """
        self.compiled = True
        for layer in self.layers:
            # Compile `forward`, not the call: FSDP's hooks must stay outside.
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
        """Run the layers.

        Args:
            x: token ids [B, S], or without the first layer the previous layer's output [B, S, D].
            mask: of the batch.
            cache: is extended by the S tokens.

        Returns:
            [B, S, D], after the final norm if the last layer is here.
        """
        x_BSD: Tensor = x if self.model.embed_tokens is None or not self.is_first else self.model.embed_tokens(x)
        rope = rope_tables(self.config.rope, self.config.head_dim, mask.positions_BS, mask.lengths_BS)
        for i, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD, rope, mask, None if cache is None else cache.layer(i))
        if cache is not None:
            cache.length += x.shape[1]
        return x_BSD if self.model.norm is None else self.model.norm(x_BSD)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Compute logits [..., V] of hidden states [..., D], in their dtype.

        For a few positions; training uses `loss`.
        """
        return F.linear(hidden_BSD, self.output_weight)

    def loss(self, x: Tensor, labels_BS: Tensor, mask: DocumentMask, z_loss: float = 0.0) -> LossSum:
        """Compute the summed loss of the batch; `x` and `mask` are those of `forward`.

        `labels_BS[b, s]` is the token that follows token s of row b, or -100 for none. Divide `total` by the number of
        labels in the global batch, so that every token of every microbatch and rank has the same weight.
        """
        return self.linear_loss(self.forward(x, mask), self.output_weight, labels_BS, z_loss)
