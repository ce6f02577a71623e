"""Causal grouped-query attention over packed documents: the mask, the kernels behind one function, the layer.

A `DocumentMask` is built once per batch, outside compiled code; what it holds decides which kernel runs.
Shape suffixes: B batch, S queries, T keys, H query heads, G key/value heads, K head width, D model width, N documents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.attention_blocked import blocked_attention
from pretrain.model.kernels import VARIABLE_LENGTH
from pretrain.model.norm import RMSNorm
from pretrain.model.rope import Rope


class DocumentMask(NamedTuple):
    """Which tokens see which, and where they stand. A document is a run of equal ids within a row."""

    kernel: str
    """`sdpa`, `blocked`, or a name of `kernels.VARIABLE_LENGTH`."""

    positions_BS: Tensor
    """Position of each token, for RoPE."""

    lengths_BS: Tensor | None
    """Length of each token's document; only for `rope.kind=dynamic_ntk`."""

    window: int | None
    """Each token sees the last this many tokens of its document, itself included; none means all."""

    document_BS: Tensor | None = None
    """`blocked`: number of each token's document, never decreasing along a row; none under `model.document_mask=False`."""

    allowed_B1ST: Tensor | None = None
    """`sdpa`: True where a query sees a key; none is plain causal attention."""

    document_ends_N: Tensor | None = None
    """Variable-length kernels: 0, then the end of every document in the flattened batch, int32 [N + 1]."""

    longest: int = 0
    """Variable-length kernels: an upper bound of the documents' lengths, a power of two so that few graphs are compiled."""

    def to(self, device: torch.device | str) -> DocumentMask:
        """The same mask on another device. Built on the CPU and then moved, it costs the GPU no synchronisation."""
        device = torch.device(device)
        # Any: a type checker holds what ** may bring against every field, and some are no tensors.
        moved: dict[str, Any] = {name: _moved(x, device) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**moved)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    # From pageable memory the copy may wait for all that the GPU has queued; from pinned memory it never does.
    pinned = x.contiguous().pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return pinned.to(device, non_blocking=True)


def document_mask(document_ids_BS: Tensor, positions_BS: Tensor, kernel: str, config: ModelConfig) -> DocumentMask:
    """The mask of one batch, on the device of its inputs; reads their values, so best called before they go to the GPU.

    With `model.document_mask=False` every row is one document that starts at position 0.
    """
    B, S = document_ids_BS.shape
    if not config.document_mask:
        document_ids_BS = torch.zeros_like(document_ids_BS)
        positions_BS = torch.arange(S, device=positions_BS.device).expand(B, S)
    starts_BS = torch.ones_like(document_ids_BS, dtype=torch.bool)
    starts_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    starts_N = starts_BS.flatten().nonzero().flatten()
    ends_N = F.pad(starts_N[1:], (0, 1), value=B * S)
    document_BS = starts_BS.flatten().cumsum(0).view(B, S) - 1
    lengths_BS = (ends_N - starts_N)[document_BS] if config.rope.kind == "dynamic_ntk" else None
    mask = DocumentMask(kernel, positions_BS, lengths_BS, config.sliding_window)
    if kernel in VARIABLE_LENGTH:
        longest = 1 << (int((ends_N - starts_N).max()) - 1).bit_length()
        return mask._replace(document_ends_N=F.pad(ends_N, (1, 0)).int(), longest=longest)
    if kernel == "blocked":  # not by what this batch holds: the compiler would make a second graph for batches without packed rows
        return mask._replace(document_BS=document_BS) if config.document_mask else mask
    if len(starts_N) == B and (config.sliding_window is None or config.sliding_window >= S):
        return mask
    same_BST = document_BS[:, :, None] == document_BS[:, None, :]
    return mask._replace(allowed_B1ST=(same_BST & _causal_window(0, S, config.sliding_window, same_BST.device))[:, None])


def continuation_mask(start: int, count: int, capacity: int, config: ModelConfig, device: torch.device | str) -> DocumentMask:
    """The mask of `count` tokens that follow `start` cached ones (batch of one document each, broadcast as B = 1).

    `dynamic_ntk` scales once, for the `capacity` of the cache: keys rotated by different bases do not belong together.
    """
    positions_1S = torch.arange(start, start + count, device=device)[None]
    lengths_1S = torch.full_like(positions_1S, capacity) if config.rope.kind == "dynamic_ntk" else None
    mask = DocumentMask("sdpa", positions_1S, lengths_1S, config.sliding_window)
    if start == 0 and (config.sliding_window is None or config.sliding_window >= count):
        return mask
    return mask._replace(allowed_B1ST=_causal_window(start, count, config.sliding_window, device)[None, None])


def _causal_window(start: int, count: int, window: int | None, device: torch.device | str) -> Tensor:
    """True [count, start + count] where query start + i sees key j: not after it, and less than `window` before it."""
    query_S1 = torch.arange(start, start + count, device=device)[:, None]
    key_T = torch.arange(start + count, device=device)
    allowed_ST = key_T <= query_S1
    return allowed_ST if window is None else allowed_ST & (key_T > query_S1 - window)


def attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: DocumentMask) -> Tensor:
    """softmax(q k' / sqrt(K)) v over the keys the mask allows, [B, S, H, K]; query head h reads key/value head h // (H/G)."""
    if mask.document_ends_N is not None:
        kernel = VARIABLE_LENGTH[mask.kernel]
        q_XHK, k_XGK, v_XGK = (x.flatten(0, 1) for x in (q_BSHK, k_BTGK, v_BTGK))
        return kernel(q_XHK, k_XGK, v_XGK, mask.document_ends_N, mask.longest, mask.window).view_as(q_BSHK)
    if mask.kernel == "blocked":
        return blocked_attention(q_BSHK, k_BTGK, v_BTGK, mask.document_BS, mask.window)
    return _sdpa(q_BSHK, k_BTGK, v_BTGK, mask.allowed_B1ST)


def _sdpa(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, allowed_B1ST: Tensor | None) -> Tensor:
    grouped = q_BSHK.shape[2] != k_BTGK.shape[2]
    if grouped and q_BSHK.is_cuda and (allowed_B1ST is not None or q_BSHK.dtype == torch.float32):
        # Of the CUDA kernels, those that take a mask or fp32 take no groups: without this SDPA would fall back to a full [S, T] softmax.
        k_BTGK, v_BTGK = (x.repeat_interleave(q_BSHK.shape[2] // x.shape[2], dim=2) for x in (k_BTGK, v_BTGK))
        grouped = False
    out_BHSK = F.scaled_dot_product_attention(
        q_BSHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        attn_mask=allowed_B1ST,
        is_causal=allowed_B1ST is None,
        enable_gqa=grouped,
    )
    return out_BHSK.transpose(1, 2)


class LayerCache(NamedTuple):
    """The keys and values of one layer, with room for T tokens, of which the first `length` are written."""

    k_BTGK: Tensor
    v_BTGK: Tensor
    length: int

    def append(self, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write S more tokens in place; all keys and values so far."""
        end = self.length + k_BSGK.shape[1]
        self.k_BTGK[:, self.length : end] = k_BSGK
        self.v_BTGK[:, self.length : end] = v_BSGK
        return self.k_BTGK[:, :end], self.v_BTGK[:, :end]


class Attention(nn.Module):
    """Grouped-query self-attention (arXiv:2305.13245) with RoPE; optional QK-norm and biases on q, k and v."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, rope: Rope, mask: DocumentMask, cache: LayerCache | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]; with a cache, the S tokens also attend to the cached ones and are appended to it."""
        q_BSHK = self.q_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSGK = self.k_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSGK = self.v_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHK, k_BSGK = self.q_norm(q_BSHK), self.k_norm(k_BSGK)
        q_BSHK, k_BSGK = rope.rotate(q_BSHK), rope.rotate(k_BSGK)
        if cache is not None:
            k_BSGK, v_BSGK = cache.append(k_BSGK, v_BSGK)
        out_BSD: Tensor = self.o_proj(attention(q_BSHK, k_BSGK, v_BSGK, mask).flatten(2))
        return out_BSD
