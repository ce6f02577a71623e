"""Causal grouped-query attention over packed documents: the mask, the kernels behind one function, the layer.

A `DocumentMask` is built once per batch, outside of compiled code. What it holds decides which kernel runs.
Shape suffixes: B batch, S queries, T keys, X = B*S, Y = B*T, H query heads, G key/value heads, K head width, D model
width, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only  # has no public name

from pretrain.config import ModelConfig
from pretrain.model.attention_blocked import blocked_attention
from pretrain.model.kernels import VARIABLE_LENGTH, Documents
from pretrain.model.kv_cache import LayerCache
from pretrain.model.norm import RMSNorm
from pretrain.model.rope import Rope


class QuerySpan(NamedTuple):
    """The queries of the tokens [first, end) of each row. They see keys of the tokens [first_key, end)."""

    first_key: int
    first: int
    end: int

    document_BT: Tensor | None = None
    """For `blocked`: number of each key's document, never decreasing along a row. None with
    `model.document_mask=False`."""

    allowed_B1ST: Tensor | None = None
    """For `sdpa`: True where a query sees a key. None is plain causal attention."""

    documents: Documents | None = None
    """For variable-length kernels: where documents end in the flattened batch."""


class DocumentMask(NamedTuple):
    """Which tokens see which, and their positions. A document is a run of equal ids within a row."""

    kernel: str
    """`sdpa`, `blocked`, or a name of `kernels.VARIABLE_LENGTH`."""

    window: int | None
    """Each token sees the last this many tokens of its document, itself included. None means all."""

    positions_BS: Tensor
    """Position of each token, for RoPE."""

    lengths_BS: Tensor | None
    """Length of each token's document. Only for `rope.kind=dynamic_ntk`."""

    spans: tuple[QuerySpan, ...]
    """The queries, span after span. A whole row is one span; the tokens of a context-parallel rank may be several."""

    row_keys_B: Tensor | None = None
    """For routers: a random key of each row, negative for padding (`moe.rows.row_keys`)."""

    def to(self, device: torch.device | str) -> DocumentMask:
        """Return the same mask on another device.

        Built on the CPU and then moved, it makes the GPU wait for nothing.
        """
        moved: DocumentMask = tree_map_only(Tensor, partial(_move, device=torch.device(device)), self)
        for span in moved.spans:
            if span.documents is not None:
                span.documents.mark_dynamic()
        return moved


def _move(x: Tensor, device: torch.device) -> Tensor:
    # A copy from pageable memory may wait for all work that the GPU has queued. A copy from pinned memory never does.
    pinned = x.contiguous().pin_memory() if device.type == "cuda" and x.device.type == "cpu" and x.numel() else x
    return pinned.to(device, non_blocking=True)


def document_mask(
    document_ids_BT: Tensor, positions_BT: Tensor, kernel: str, config: ModelConfig, compiled: bool = False
) -> DocumentMask:
    """Build the mask of a batch of whole rows, on the device of its inputs.

    It reads their values, so build it before they go to the GPU. With `model.document_mask=False` every row is one
    document that starts at position 0. With `compiled` the form of the mask depends on the settings only, not on the
    values in the batch, because torch.compile makes a graph for each form.
    """
    rows = _Rows.read(document_ids_BT, positions_BT, config)
    return DocumentMask(
        kernel, config.sliding_window, rows.positions_BT, rows.lengths_BT, (_row_span(rows, kernel, config, compiled),)
    )


def context_parallel_mask(
    document_ids_BT: Tensor,
    positions_BT: Tensor,
    kernel: str,
    config: ModelConfig,
    ranges: Sequence[tuple[int, int]],
    full_rows: bool,
    compiled: bool = False,
) -> DocumentMask:
    """Build the mask of the tokens that one context-parallel rank has of each row; see also `document_mask`.

    Args:
        document_ids_BT: of whole rows, as `positions_BT`.
        positions_BT: of whole rows.
        kernel: the attention kernel.
        config: of the model.
        ranges: tokens (first, end) of each row that this rank has. Positions and lengths are those of these tokens.
        full_rows: True if attention runs over whole rows, for some of the heads (Ulysses). Otherwise the queries are
            the rank's own tokens, which attend to the keys of whole rows.
        compiled: as in `document_mask`.
    """
    rows = _Rows.read(document_ids_BT, positions_BT, config)
    if full_rows:
        spans = [_row_span(rows, kernel, config, compiled)]
    else:
        spans = [_query_span(rows.document_BT, first, end, kernel, config) for first, end in ranges]
    lengths_BS = None if rows.lengths_BT is None else _select(rows.lengths_BT, ranges)
    return DocumentMask(kernel, config.sliding_window, _select(rows.positions_BT, ranges), lengths_BS, tuple(spans))


class _Rows(NamedTuple):
    """What the masks read off whole rows."""

    document_BT: Tensor
    """Number of each token's document in the batch, counted row after row."""
    positions_BT: Tensor
    lengths_BT: Tensor | None

    @classmethod
    def read(cls, document_ids_BT: Tensor, positions_BT: Tensor, config: ModelConfig) -> _Rows:
        B, T = document_ids_BT.shape
        if not config.document_mask:
            document_ids_BT = torch.zeros_like(document_ids_BT)
            positions_BT = torch.arange(T, device=positions_BT.device).expand(B, T)
        starts_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
        starts_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
        document_BT = starts_BT.flatten().cumsum(0).view(B, T) - 1
        lengths_BT = document_BT.flatten().bincount()[document_BT] if config.rope.kind == "dynamic_ntk" else None
        return cls(document_BT, positions_BT, lengths_BT)


def _select(x_BT: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([x_BT[:, first:end] for first, end in ranges], dim=1)


def _row_span(rows: _Rows, kernel: str, config: ModelConfig, compiled: bool) -> QuerySpan:
    """All queries of each row. SDPA needs no mask where every row is one document and no window cuts it."""
    B, T = rows.document_BT.shape
    window = config.sliding_window
    one_document_a_row = not config.document_mask if compiled else int(rows.document_BT[-1, -1]) == B - 1
    if kernel == "sdpa" and one_document_a_row and (window is None or window >= T):
        return QuerySpan(0, 0, T)
    return _query_span(rows.document_BT, 0, T, kernel, config)


def _query_span(document_BT: Tensor, first: int, end: int, kernel: str, config: ModelConfig) -> QuerySpan:
    """What the kernel needs for the queries [first, end) of each row. Keys before all their windows are left out."""
    first_key = 0 if config.sliding_window is None else max(0, first - config.sliding_window + 1)
    span, document_BT, n_before = QuerySpan(first_key, first, end), document_BT[:, first_key:end], first - first_key
    if kernel in VARIABLE_LENGTH:
        return span._replace(documents=_documents(document_BT, n_before))
    if kernel == "blocked":  # always compiled
        return span._replace(document_BT=document_BT) if config.document_mask else span
    same_BST = document_BT[:, n_before:, None] == document_BT[:, None, :]
    causal_ST = _causal_window(n_before, end - first, config.sliding_window, same_BST.device)
    return span._replace(allowed_B1ST=(same_BST & causal_ST)[:, None])


def _documents(document_BT: Tensor, n_before: int) -> Documents:
    """Where documents end among the keys (all given tokens) and among the queries (all but the first `n_before` a row).

    The tokens of a row before the first query's document count as one document, which has no queries.
    """
    number_BT = torch.maximum(document_BT, document_BT[:, n_before : n_before + 1] - 1)
    _, number_BT = torch.unique_consecutive(number_BT, return_inverse=True)
    keys_N = number_BT.flatten().bincount()
    queries_N = number_BT[:, n_before:].flatten().bincount(minlength=len(keys_N))
    query_ends_N, key_ends_N = (F.pad(counts_N.cumsum(0), (1, 0)).int() for counts_N in (queries_N, keys_N))
    # At least 2: where no document has more than one query, flash-attn 2 assumes that each has exactly one.
    most_queries, most_keys = (1 << max(1, (int(counts_N.max()) - 1).bit_length()) for counts_N in (queries_N, keys_N))
    return Documents.of(query_ends_N, key_ends_N, most_queries, most_keys)


def continuation_mask(
    start: int, count: int, capacity: int, config: ModelConfig, device: torch.device | str
) -> DocumentMask:
    """Build the mask of `count` tokens that follow `start` cached ones, one document a row, broadcast as B = 1.

    `dynamic_ntk` scales for the `capacity` of the cache from the start: all cached keys must have the same base.
    """
    window, span = config.sliding_window, QuerySpan(0, start, start + count)
    positions_1S = torch.arange(start, start + count, device=device)[None]
    lengths_1S = torch.full_like(positions_1S, capacity) if config.rope.kind == "dynamic_ntk" else None
    if start > 0 or (window is not None and window < count):
        span = span._replace(allowed_B1ST=_causal_window(start, count, window, device)[None, None])
    return DocumentMask("sdpa", window, positions_1S, lengths_1S, (span,))


def _causal_window(start: int, count: int, window: int | None, device: torch.device | str) -> Tensor:
    """True [count, start + count] where query start + i sees key j: not after it, and less than `window` before it."""
    query_S1 = torch.arange(start, start + count, device=device)[:, None]
    key_T = torch.arange(start + count, device=device)
    allowed_ST = key_T <= query_S1
    return allowed_ST if window is None else allowed_ST & (key_T > query_S1 - window)


def attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: DocumentMask) -> Tensor:
    """softmax(q k' / sqrt(K)) v over the keys that the mask allows: [B, S, H, K].

    Query head h reads key/value head h // (H/G). The queries are those of the mask's spans, keys and values are those
    of whole rows.
    """
    if len(mask.spans) == 1 and mask.spans[0].first_key == 0:
        return _span_attention(q_BSHK, k_BTGK, v_BTGK, mask, mask.spans[0])
    outs: list[Tensor] = []
    start = 0
    for span in mask.spans:
        queries, keys = slice(start, start + span.end - span.first), slice(span.first_key, span.end)
        outs.append(_span_attention(q_BSHK[:, queries], k_BTGK[:, keys], v_BTGK[:, keys], mask, span))
        start = queries.stop
    return torch.cat(outs, dim=1)


def _span_attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: DocumentMask, span: QuerySpan) -> Tensor:
    """Attention of one span. Its queries are the last of the tokens that the keys belong to."""
    if span.documents is not None:
        q_XHK, k_YGK, v_YGK = (x.flatten(0, 1) for x in (q_BSHK, k_BTGK, v_BTGK))
        return VARIABLE_LENGTH[mask.kernel](q_XHK, k_YGK, v_YGK, span.documents, mask.window).view(q_BSHK.shape)
    if mask.kernel == "blocked":
        return blocked_attention(q_BSHK, k_BTGK, v_BTGK, span.document_BT, mask.window)
    return _sdpa(q_BSHK, k_BTGK, v_BTGK, span.allowed_B1ST)


def _sdpa(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, allowed_B1ST: Tensor | None) -> Tensor:
    grouped = q_BSHK.shape[2] != k_BTGK.shape[2]
    if grouped and q_BSHK.is_cuda and (allowed_B1ST is not None or q_BSHK.dtype == torch.float32):
        # The CUDA kernels that take a mask or fp32 take no groups. SDPA would fall back to a full [S, T] softmax.
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


AttentionFunction = Callable[[Tensor, Tensor, Tensor, DocumentMask], Tensor]
"""`attention`, or the function that context parallelism wraps around it."""


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
        self.norms_all_heads = config.qk_norm == "full"
        q_normed, k_normed = (q_width, kv_width) if self.norms_all_heads else (config.head_dim, config.head_dim)
        self.q_norm = RMSNorm(q_normed, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(k_normed, config.norm_eps) if config.qk_norm else None
        self.attention_function: AttentionFunction = attention

    def forward(self, x_BSD: Tensor, rope: Rope, mask: DocumentMask, cache: LayerCache | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]. With a cache, the S tokens also attend to the cached ones, and are appended to it."""
        q_BSHK = self._heads(self.q_proj(x_BSD), self.q_norm)
        k_BSGK = self._heads(self.k_proj(x_BSD), self.k_norm)
        v_BSGK = self._heads(self.v_proj(x_BSD), None)
        q_BSHK, k_BSGK = rope.rotate(q_BSHK), rope.rotate(k_BSGK)
        if cache is not None:
            k_BSGK, v_BSGK = cache.append(k_BSGK, v_BSGK)
        out_BSD: Tensor = self.o_proj(self.attention_function(q_BSHK, k_BSGK, v_BSGK, mask).flatten(2))
        return out_BSD

    def _heads(self, x_BSW: Tensor, norm: RMSNorm | None) -> Tensor:
        """A projection [B, S, H * K] -> [B, S, H, K], each head or all heads together normalized."""
        if norm is not None and self.norms_all_heads:
            x_BSW = norm(x_BSW)
        x_BSHK = torch.unflatten(x_BSW, -1, (-1, self.head_dim))
        if norm is not None and not self.norms_all_heads:
            x_BSHK = norm(x_BSHK)
        return x_BSHK
