"""Cross-entropy of a linear output layer that never holds the logits of a whole batch.

The tokens go through in chunks. For each chunk the logits are computed, turned into their own gradient in place, and
multiplied into the gradients of the hidden states and of the weight, all in the forward pass; backward only scales them.
So 3 matrix products are done, as without chunks, and at best 1/16 of the logits live at a time.
Shape suffixes: T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token without a target; `data_pipeline.reading.packing.NO_LABEL`, which this package may not import."""

_CHUNKS = 16  # logits alive: 1/16 of all. More chunks read the weight more often and round its gradient more often
_SMALLEST_CHUNK = {"cpu": 2**22, "cuda": 2**25}  # logits; a chunk of 8 MB in bf16 stays in a CPU's cache, a GPU wants large products
_BLOCK = 2**20  # fp32 numbers that the eager softmax works on at a time


class LossSum(NamedTuple):
    """Sums over the labelled tokens, fp32 scalars."""

    total: Tensor
    """What to differentiate: cross_entropy + z_loss."""

    cross_entropy: Tensor
    """Negative log-likelihood in nats; detached."""

    z_loss: Tensor
    """z_loss weight * log(Z)^2; detached."""


SoftmaxGradient = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def softmax_gradient_(logits_CV: Tensor, labels_C: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite the logits with the gradient of the loss for them, but for the label's own column.

    Returns, fp32 [C] each: the negative log-likelihood, the weighted z-loss (both 0 where ignored), and what belongs into
    the label's column. Writing that column is left to the caller because a scatter would keep the rest from being fused.
    """
    # Uncompiled, every operation writes a temporary: a few rows at a time, in one piece of memory, keep that small and in the cache.
    rows = len(logits_CV) if torch.compiler.is_compiling() else max(1, _BLOCK // logits_CV.shape[1])
    scratch_RV = torch.empty(min(rows, len(logits_CV)), logits_CV.shape[1], dtype=torch.float32, device=logits_CV.device)
    blocks = zip(torch.split(logits_CV, rows), torch.split(labels_C, rows), strict=True)
    parts = [_softmax_gradient_block_(logits, labels, z_loss, scratch_RV[: len(logits)]) for logits, labels in blocks]
    nll_C, z_C, column_C = (torch.cat(part) for part in zip(*parts, strict=True))
    return nll_C, z_C, column_C


def _softmax_gradient_block_(logits_CV: Tensor, labels_C: Tensor, z_loss: float, scratch_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    valid_C = (labels_C != IGNORE).float()
    weights_CV = scratch_CV.copy_(logits_CV)
    top_C = weights_CV.amax(-1)
    total_C = weights_CV.sub_(top_C[:, None]).exp_().sum(-1)
    log_z_C = top_C + total_C.log()
    log_p_C = logits_CV.gather(1, labels_C.clamp(min=0)[:, None]).squeeze(1).float() - log_z_C
    scale_C = valid_C * (1 + 2 * z_loss * log_z_C)
    # No gathered logit may enter this line: the compiler would read it in the same kernel, and so write to a second [C, V].
    logits_CV.copy_(weights_CV.mul_((scale_C / total_C)[:, None]))
    column_C = log_p_C.exp() * scale_C - valid_C
    return -log_p_C * valid_C, z_loss * log_z_C.square() * valid_C, column_C


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    z_loss: float = 0.0,
    softmax: SoftmaxGradient = softmax_gradient_,
) -> LossSum:
    """Summed cross-entropy of softmax(hidden @ weight') against the labels, plus z_loss * log(Z)^2 (arXiv:2204.02311, section 5).

    Products are computed in the type of `hidden_TD`, the softmax in fp32, and the weight's gradient is summed over the
    chunks in the weight's own type: a bf16 weight's is rounded once a chunk. Pass `softmax_gradient_` compiled to have it
    so. Labels of -100 are ignored. Without gradients (no_grad, or nothing that requires them) the two
    products that make them are left out; the softmax is overwritten with its gradient all the same.
    """
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        return LossSum(*_LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, z_loss, softmax))  # type: ignore[no-untyped-call]  # in torch
    return LossSum(*_chunked(hidden_TD, weight_VD, labels_T, z_loss, softmax, None, None))


def _chunked(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    z_loss: float,
    softmax: SoftmaxGradient,
    grad_hidden_TD: Tensor | None,
    grad_weight_VD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, cross-entropy, z-loss); fills the gradients of `total` that are given."""
    T, V = len(hidden_TD), len(weight_VD)
    size = math.ceil(T / _chunks(T * V, hidden_TD.device))
    weight_VD = weight_VD.to(hidden_TD.dtype)
    buffer_CV = hidden_TD.new_empty(min(size, T), V)  # one for all chunks: two would live while the second is computed
    cross_entropy = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
    z = torch.zeros_like(cross_entropy)
    for start in range(0, T, size):
        chunk = slice(start, start + size)
        hidden_CD, labels_C = hidden_TD[chunk], labels_T[chunk]
        logits_CV = torch.mm(hidden_CD, weight_VD.T, out=buffer_CV[: len(hidden_CD)])
        nll_C, z_C, column_C = softmax(logits_CV, labels_C, z_loss)
        cross_entropy += nll_C.sum()
        z += z_C.sum()
        row_C = torch.arange(len(logits_CV), device=logits_CV.device)
        gradient_CV = logits_CV.index_put_((row_C, labels_C.clamp(min=0)), column_C.to(logits_CV.dtype))  # scatter_ copies all on a CPU
        if grad_hidden_TD is not None:
            torch.mm(gradient_CV, weight_VD, out=grad_hidden_TD[chunk])
        if grad_weight_VD is not None:
            _add_product(grad_weight_VD, gradient_CV, hidden_CD, first=start == 0)
    return cross_entropy + z, cross_entropy, z


def _chunks(logits: int, device: torch.device) -> int:
    """A power of two, so that chunks are of one size and compiled once."""
    chunks = 1
    while chunks < _CHUNKS and logits // chunks > _SMALLEST_CHUNK.get(device.type, 2**25):
        chunks *= 2
    return chunks


def _add_product(grad_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor, first: bool) -> None:
    """grad_VD (+)= gradient_CV' @ hidden_CD; what it held is ignored the first time."""
    if grad_VD.dtype == hidden_CD.dtype:
        grad_VD.addmm_(gradient_CV.T, hidden_CD, beta=0 if first else 1)
        return
    rows = max(1, _BLOCK // grad_VD.shape[1])  # so that no second [V, D] lives
    for part_RD, gradient_CR in zip(torch.split(grad_VD, rows), torch.split(gradient_CV, rows, dim=1), strict=True):
        product_RD = gradient_CR.T @ hidden_CD
        part_RD.copy_(product_RD) if first else part_RD.add_(product_RD)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in forward, for a loss gradient of 1, and scales them in place in backward."""

    @staticmethod
    def forward(
        ctx: Any,  # torch gives its context no type that takes attributes
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        z_loss: float,
        softmax: SoftmaxGradient,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_hidden_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        total, cross_entropy, z = _chunked(hidden_TD, weight_VD, labels_T, z_loss, softmax, grad_hidden_TD, grad_weight_VD)
        ctx.gradients = grad_hidden_TD, grad_weight_VD
        ctx.mark_non_differentiable(cross_entropy, z)
        return total, cross_entropy, z

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # Any: as above
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy keeps its gradients for one backward pass; call it again for another")
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: a second [V, D] would cost what chunks have saved
        grad_hidden_TD, grad_weight_VD = (None if gradient is None else gradient.mul_(grad_total) for gradient in gradients)
        return grad_hidden_TD, grad_weight_VD, None, None, None
