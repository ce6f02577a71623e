"""Causal attention in blocks of queries, on plain matrix products: the fast path on CPUs under torch.compile.

PyTorch's CPU kernel spends most of its time outside of the matrix units: on a 2-core machine with AVX512-BF16 its
forward and backward pass takes 2.4 times as long as this file (docs/LOG.md). The algorithm is FlashAttention's
(arXiv:2205.14135, algorithms 1 and 4) with one difference: a block of queries is multiplied with all of its keys at
once. So each product is large, and the softmax needs no running maximum. Memory is O(T * block): the backward pass
recomputes the probabilities from their log-sum-exp.

The queries are the last S of the T tokens that the keys belong to: all tokens, or those of one context-parallel rank.

Shape suffixes: B batch, S queries, T keys, H query heads, G key/value heads, R = H/G query heads a key/value head, K
head width, N = B*G, P queries of a block, C keys that the block sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MASKED = -1e30
"""Score of a pair that may not attend. exp() of it is 0. It is finite, so that no row becomes NaN."""


def block_size(n_keys: int) -> int:
    """Queries in a block. 128 runs fastest; a long row gets at most 16 blocks, because torch.compile unrolls them."""
    return max(128, -(-n_keys // 16))


def blocked_attention(
    q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, document_ids_BT: Tensor | None, window: int | None
) -> Tensor:
    """Causal attention within documents, [B, S, H, K] -> [B, S, H, K].

    `document_ids_BT` must not decrease along T; None means one document a row. With `window` a token sees that many
    tokens, itself included. In bf16 the scores are rounded to bf16 before the softmax: on normal inputs the error is
    0.37% of the output's norm, and that of PyTorch's kernel 0.20%.
    """
    B, S, H, K = q_BSHK.shape
    T, G = k_BTGK.shape[1:3]
    q_NRSK = q_BSHK.view(B, S, G, H // G, K).permute(0, 2, 3, 1, 4).reshape(B * G, H // G, S, K)
    k_NTK = k_BTGK.transpose(1, 2).reshape(B * G, T, K)
    v_NTK = v_BTGK.transpose(1, 2).reshape(B * G, T, K)
    inputs = q_NRSK, k_NTK, v_NTK, document_ids_BT, window
    out_NRSK: Tensor = _BlockedAttention.apply(*inputs)  # type: ignore[no-untyped-call]  # untyped in torch
    return out_NRSK.view(B, G, H // G, S, K).permute(0, 3, 1, 2, 4).reshape(B, S, H, K)


class _Block(NamedTuple):
    """Queries [start, end) of S and their keys [first, last) of T. The last key is the last query's own."""

    start: int
    end: int
    first: int
    last: int


def _blocks(n_queries: int, n_keys: int, window: int | None) -> list[_Block]:
    size, before = block_size(n_keys), n_keys - n_queries
    ranges = [(start, min(start + size, n_queries)) for start in range(0, n_queries, size)]
    return [
        _Block(start, end, 0 if window is None else max(0, before + start - window + 1), before + end)
        for start, end in ranges
    ]


def _scores(q_NRPK: Tensor, k_NCK: Tensor, block: _Block, document_ids_BT: Tensor | None, window: int | None) -> Tensor:
    """Masked fp32 scores [N, R, P, C] of one block."""
    N, R, P, K = q_NRPK.shape
    C = block.last - block.first
    scores = torch.bmm(q_NRPK.reshape(N, R * P, K), k_NCK.transpose(1, 2)).view(N, R, P, C).float() * K**-0.5
    query = torch.arange(block.last - P, block.last, device=scores.device)[:, None]
    key = torch.arange(block.first, block.last, device=scores.device)[None, :]
    allowed = query >= key
    if window is not None:
        allowed = allowed & (query - key < window)
    if document_ids_BT is None:
        return torch.where(allowed, scores, MASKED)
    same_BPC = (
        document_ids_BT[:, block.last - P : block.last, None] == document_ids_BT[:, None, block.first : block.last]
    )
    B = document_ids_BT.shape[0]
    allowed_BPC = (same_BPC & allowed)[:, None, None]
    return torch.where(allowed_BPC, scores.view(B, N // B, R, P, C), MASKED).view(N, R, P, C)


class _BlockedAttention(torch.autograd.Function):
    """The forward and backward pass over q [N, R, S, K] and k, v [N, T, K]."""

    @staticmethod
    def forward(
        ctx: Any,  # torch gives its context no type that takes attributes
        q_NRSK: Tensor,
        k_NTK: Tensor,
        v_NTK: Tensor,
        document_ids_BT: Tensor | None,
        window: int | None,
    ) -> Tensor:
        N, R, S, K = q_NRSK.shape
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for block in _blocks(S, k_NTK.shape[1], window):
            start, end, first, last = block
            scores = _scores(q_NRSK[:, :, start:end], k_NTK[:, first:last], block, document_ids_BT, window)
            top = scores.amax(-1, keepdim=True)
            weights = torch.exp(scores - top)
            total = weights.sum(-1, keepdim=True)
            # Divide after the product: [P, K] numbers instead of [P, C]. The compiler computes each exponential once.
            out = torch.bmm(weights.to(q_NRSK.dtype).view(N, R * (end - start), last - first), v_NTK[:, first:last])
            outs.append((out.view(N, R, end - start, K).float() / total).to(q_NRSK.dtype))
            lses.append(top + total.log())
        out_NRSK, lse_NRS1 = torch.cat(outs, 2), torch.cat(lses, 2)
        ctx.save_for_backward(q_NRSK, k_NTK, v_NTK, out_NRSK, lse_NRS1, document_ids_BT)
        ctx.window = window
        return out_NRSK

    @staticmethod
    def backward(ctx: Any, grad_NRSK: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # Any: as above
        q_NRSK, k_NTK, v_NTK, out_NRSK, lse_NRS1, document_ids_BT = ctx.saved_tensors
        N, R, S, K = q_NRSK.shape
        T, dtype = k_NTK.shape[1], q_NRSK.dtype
        # Row sums of (gradient * output): what the softmax's backward pass subtracts (FlashAttention, appendix B.4).
        delta_NRS1 = (grad_NRSK.float() * out_NRSK.float()).sum(-1, keepdim=True)
        grad_k = torch.zeros(N, T, K, device=q_NRSK.device)
        grad_v = torch.zeros(N, T, K, device=q_NRSK.device)
        grad_q: list[Tensor] = []
        for block in _blocks(S, T, ctx.window):
            start, end, first, last = block
            rows, keys = end - start, last - first
            q_NRPK, k_NCK = q_NRSK[:, :, start:end], k_NTK[:, first:last]
            scores = _scores(q_NRPK, k_NCK, block, document_ids_BT, ctx.window)
            probs = torch.exp(scores - lse_NRS1[:, :, start:end])
            grad_NPK = grad_NRSK[:, :, start:end].reshape(N, R * rows, K)
            grad_probs = torch.bmm(grad_NPK, v_NTK[:, first:last].transpose(1, 2)).view(N, R, rows, keys).float()
            grad_scores = (
                (probs * (grad_probs - delta_NRS1[:, :, start:end]) * K**-0.5).to(dtype).view(N, R * rows, keys)
            )
            grad_q.append(torch.bmm(grad_scores, k_NCK).view(N, R, rows, K))
            grad_k[:, first:last] += torch.bmm(grad_scores.transpose(1, 2), q_NRPK.reshape(N, R * rows, K))
            grad_v[:, first:last] += torch.bmm(probs.to(dtype).view(N, R * rows, keys).transpose(1, 2), grad_NPK)
        return torch.cat(grad_q, 2), grad_k.to(dtype), grad_v.to(dtype), None, None
