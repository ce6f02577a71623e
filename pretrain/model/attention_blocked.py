"""Causal attention in blocks of queries, on plain matrix products: the fast path on CPUs under torch.compile.

PyTorch's CPU kernel spends most of its time outside the matrix units: on a 2-core machine with AVX512-BF16 its forward and backward
pass takes 2.4 times as long as this file (docs/LOG.md). The algorithm is FlashAttention's (arXiv:2205.14135,
algorithms 1 and 4) with one difference: a block of queries meets all its keys at once, so that each product is large, and the softmax needs
no running maximum. Memory is O(S * block), since the backward pass computes the probabilities again from their log-sum-exp.

Shape suffixes: B batch, S sequence, H query heads, G key/value heads, R = H/G query heads a key/value head, K head width,
N = B*G, P queries of a block, C keys that the block sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MASKED = -1e30
"""Score of a pair that may not attend: exp() of it is 0, and it is finite, so that no row can become NaN."""


def block_size(seq_len: int) -> int:
    """Queries in a block: 128 runs fastest, and a long sequence gets no more than 16 blocks, because torch.compile unrolls them."""
    return max(128, -(-seq_len // 16))


def blocked_attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, document_ids_BS: Tensor | None, window: int | None) -> Tensor:
    """Causal attention within documents, [B, S, H, K] -> [B, S, H, K].

    `document_ids_BS` must not decrease along S; None means one document a row. With `window` a token sees that many tokens, itself
    included. In bf16 the scores are rounded to bf16 before the softmax: on normal inputs the error is 0.37% of the output's norm, where
    PyTorch's kernel has 0.20%.
    """
    B, S, H, K = q_BSHK.shape
    G = k_BSGK.shape[2]
    q_NRSK = q_BSHK.view(B, S, G, H // G, K).permute(0, 2, 3, 1, 4).reshape(B * G, H // G, S, K)
    k_NSK = k_BSGK.transpose(1, 2).reshape(B * G, S, K)
    v_NSK = v_BSGK.transpose(1, 2).reshape(B * G, S, K)
    out_NRSK: Tensor = _BlockedAttention.apply(q_NRSK, k_NSK, v_NSK, document_ids_BS, window)  # type: ignore[no-untyped-call]  # untyped in torch
    return out_NRSK.view(B, G, H // G, S, K).permute(0, 3, 1, 2, 4).reshape(B, S, H, K)


def _blocks(seq_len: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end, first key) of each block; its keys end where its queries end."""
    size = block_size(seq_len)
    starts = range(0, seq_len, size)
    return [(start, min(start + size, seq_len), 0 if window is None else max(0, start - window + 1)) for start in starts]


def _scores(q_NRPK: Tensor, k_NCK: Tensor, block: tuple[int, int, int], document_ids_BS: Tensor | None, window: int | None) -> Tensor:
    """Masked fp32 scores [N, R, P, C] of one block."""
    start, end, first = block
    N, R, P, K = q_NRPK.shape
    scores = torch.bmm(q_NRPK.reshape(N, R * P, K), k_NCK.transpose(1, 2)).view(N, R, P, end - first).float() * K**-0.5
    query = torch.arange(start, end, device=scores.device)[:, None]
    key = torch.arange(first, end, device=scores.device)[None, :]
    allowed = query >= key
    if window is not None:
        allowed = allowed & (query - key < window)
    if document_ids_BS is None:
        return torch.where(allowed, scores, MASKED)
    same_BPC = document_ids_BS[:, start:end, None] == document_ids_BS[:, None, first:end]
    B = document_ids_BS.shape[0]
    allowed_BPC = (same_BPC & allowed)[:, None, None]
    return torch.where(allowed_BPC, scores.view(B, N // B, R, P, end - first), MASKED).view(N, R, P, end - first)


class _BlockedAttention(torch.autograd.Function):
    """The forward and backward pass over q [N, R, S, K] and k, v [N, S, K]."""

    @staticmethod
    def forward(
        ctx: Any,  # torch gives its context no type that takes attributes
        q_NRSK: Tensor,
        k_NSK: Tensor,
        v_NSK: Tensor,
        document_ids_BS: Tensor | None,
        window: int | None,
    ) -> Tensor:
        N, R, S, K = q_NRSK.shape
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for start, end, first in _blocks(S, window):
            scores = _scores(q_NRSK[:, :, start:end], k_NSK[:, first:end], (start, end, first), document_ids_BS, window)
            top = scores.amax(-1, keepdim=True)
            weights = torch.exp(scores - top)
            total = weights.sum(-1, keepdim=True)
            # Divided after the product: [P, K] numbers instead of [P, C], and the compiler computes each exponential once.
            out = torch.bmm(weights.to(q_NRSK.dtype).view(N, R * (end - start), end - first), v_NSK[:, first:end])
            outs.append((out.view(N, R, end - start, K).float() / total).to(q_NRSK.dtype))
            lses.append(top + total.log())
        out_NRSK, lse_NRS1 = torch.cat(outs, 2), torch.cat(lses, 2)
        ctx.save_for_backward(q_NRSK, k_NSK, v_NSK, out_NRSK, lse_NRS1, document_ids_BS)
        ctx.window = window
        return out_NRSK

    @staticmethod
    def backward(ctx: Any, grad_NRSK: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # Any: as above
        q_NRSK, k_NSK, v_NSK, out_NRSK, lse_NRS1, document_ids_BS = ctx.saved_tensors
        N, R, S, K = q_NRSK.shape
        dtype = q_NRSK.dtype
        # Row sums of (gradient * output): what the softmax's backward pass subtracts (FlashAttention, appendix B.4).
        delta_NRS1 = (grad_NRSK.float() * out_NRSK.float()).sum(-1, keepdim=True)
        grad_k = torch.zeros(N, S, K, device=q_NRSK.device)
        grad_v = torch.zeros(N, S, K, device=q_NRSK.device)
        grad_q: list[Tensor] = []
        for start, end, first in _blocks(S, ctx.window):
            rows, keys = end - start, end - first
            q_NRPK, k_NCK = q_NRSK[:, :, start:end], k_NSK[:, first:end]
            scores = _scores(q_NRPK, k_NCK, (start, end, first), document_ids_BS, ctx.window)
            probs = torch.exp(scores - lse_NRS1[:, :, start:end])
            grad_NPK = grad_NRSK[:, :, start:end].reshape(N, R * rows, K)
            grad_probs = torch.bmm(grad_NPK, v_NSK[:, first:end].transpose(1, 2)).view(N, R, rows, keys).float()
            grad_scores = (probs * (grad_probs - delta_NRS1[:, :, start:end]) * K**-0.5).to(dtype).view(N, R * rows, keys)
            grad_q.append(torch.bmm(grad_scores, k_NCK).view(N, R, rows, K))
            grad_k[:, first:end] += torch.bmm(grad_scores.transpose(1, 2), q_NRPK.reshape(N, R * rows, K))
            grad_v[:, first:end] += torch.bmm(probs.to(dtype).view(N, R * rows, keys).transpose(1, 2), grad_NPK)
        return torch.cat(grad_q, 2), grad_k.to(dtype), grad_v.to(dtype), None, None
