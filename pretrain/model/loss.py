"""Cross-entropy of a linear output layer, without ever holding the logits of a whole batch.

The tokens are processed in chunks. For each chunk the forward pass computes the logits, replaces them by their own
gradient in place, and multiplies that into the gradients of the hidden states and of the weight. The backward pass only
scales these. That takes 3 matrix products, as without chunks, and as little as 1/16 of the logits exists at a time.
Shape suffixes: T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Label of a token without a target; `data_pipeline.reading.packing.NO_LABEL`, which this package may not import."""

_CHUNKS = 16
"""Most chunks: 1/16 of the logits exist at a time. More chunks read the weight, and round its gradient, more often."""

_SMALLEST_CHUNK = {"cpu": 2**22, "cuda": 2**25}
"""Logits: 8 MB in bf16 stay in a CPU's cache, and a GPU needs large products."""

_BLOCK = 2**20
"""fp32 numbers that the uncompiled softmax works on at a time."""


class LossSum(NamedTuple):
    """Sums over the labelled tokens, scalars."""

    total: Tensor
    """cross_entropy + z_loss, to be differentiated, fp32."""

    cross_entropy: Tensor
    """Negative log-likelihood in nats, fp64; detached."""

    z_loss: Tensor
    """Weight of the z-loss * log(Z)^2, fp64; detached."""


class ShardedVocabulary(Protocol):
    """The output weight is divided among ranks. This rank has consecutive rows, so some logits of each token."""

    @property
    def first(self) -> int:
        """Token id of this rank's first row."""

    def all_max(self, x_C: Tensor) -> Tensor:
        """Return the element-wise maximum over all ranks."""

    def all_sum(self, x: Tensor) -> Tensor:
        """Return the element-wise sum over all ranks."""


class SoftmaxGradient(Protocol):
    """`softmax_gradient_`, compiled or not."""

    def __call__(
        self, logits_CV: Tensor, labels_C: Tensor, z_loss: float, vocabulary: ShardedVocabulary | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Overwrite logits [C, V] for labels [C]; return three fp32 [C]."""


def softmax_gradient_(
    logits_CV: Tensor, labels_C: Tensor, z_loss: float, vocabulary: ShardedVocabulary | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite the logits with the gradient of the loss with respect to them, except in the label's column.

    The caller writes that column (`_label_columns`): a scatter in here would keep the compiler from fusing the rest.

    Returns:
        The negative log-likelihood, the weighted z-loss (both 0 where the label is ignored), and the gradient in the
        label's column, fp32 [C] each.
    """
    if vocabulary is not None:
        return _sharded_gradient_(logits_CV, labels_C, z_loss, vocabulary)
    if torch.compiler.is_compiling():
        return _full_gradient_(logits_CV, labels_C, z_loss, torch.empty_like(logits_CV, dtype=torch.float32))
    # Uncompiled, every operation writes a temporary. A few rows at a time keep the temporaries small, and in the cache.
    rows = min(len(logits_CV), max(1, _BLOCK // logits_CV.shape[1]))
    scratch_RV = torch.empty(rows, logits_CV.shape[1], dtype=torch.float32, device=logits_CV.device)
    blocks = zip(torch.split(logits_CV, rows), torch.split(labels_C, rows), strict=True)
    results = [_full_gradient_(logits, labels, z_loss, scratch_RV[: len(logits)]) for logits, labels in blocks]
    nll_C, z_C, column_C = (torch.cat(result) for result in zip(*results, strict=True))
    return nll_C, z_C, column_C


def _full_gradient_(
    logits_CV: Tensor, labels_C: Tensor, z_loss: float, scratch_CV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_gradient_` of the full vocabulary. `scratch_CV` is fp32 memory to work in."""
    valid_C = (labels_C != IGNORE).float()
    weights_CV, top_C, total_C = _exponentials_(logits_CV, scratch_CV)
    label_logit_C = _label_logits(logits_CV, labels_C, first=0)
    log_z_C = top_C + total_C.log()
    scale_C = valid_C * (1 + 2 * z_loss * log_z_C)
    # No gathered logit may enter this line: the compiler would read it in the same kernel, and need a second [C, V].
    logits_CV.copy_(weights_CV.mul_((scale_C / total_C)[:, None]))
    column_C = (label_logit_C - log_z_C).exp() * scale_C - valid_C
    return (log_z_C - label_logit_C) * valid_C, z_loss * log_z_C.square() * valid_C, column_C


def _sharded_gradient_(
    logits_CV: Tensor, labels_C: Tensor, z_loss: float, vocabulary: ShardedVocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_gradient_` of this rank's rows of the vocabulary. The losses are those of the full vocabulary.

    In one piece: a few rows at a time would have each wait for the other ranks.
    """
    valid_C = (labels_C != IGNORE).float()
    first, end = vocabulary.first, vocabulary.first + logits_CV.shape[1]
    is_own_C = valid_C * ((labels_C >= first) & (labels_C < end)).float()
    scratch_CV = torch.empty_like(logits_CV, dtype=torch.float32)
    weights_CV, own_top_C, own_total_C = _exponentials_(logits_CV, scratch_CV)
    column_logit_C = _label_logits(logits_CV, labels_C, first)
    top_C = vocabulary.all_max(own_top_C)
    shift_C = (own_top_C - top_C).exp()
    statistics_2C = torch.stack((own_total_C * shift_C, column_logit_C * is_own_C))
    total_C, label_logit_C = vocabulary.all_sum(statistics_2C).unbind()
    log_z_C = top_C + total_C.log()
    scale_C = valid_C * (1 + 2 * z_loss * log_z_C)
    # No gathered logit may enter this line, as above. The weights are relative to this rank's own largest logit.
    logits_CV.copy_(weights_CV.mul_((scale_C / (total_C / shift_C))[:, None]))
    column_C = (column_logit_C - log_z_C).exp() * scale_C - is_own_C
    return (log_z_C - label_logit_C) * valid_C, z_loss * log_z_C.square() * valid_C, column_C


def _exponentials_(logits_CV: Tensor, scratch_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(logit - largest) in the scratch memory, the largest logit [C], the sum of the exponentials [C])."""
    weights_CV = scratch_CV.copy_(logits_CV)
    top_C = weights_CV.amax(-1)
    total_C = weights_CV.sub_(top_C[:, None]).exp_().sum(-1)
    return weights_CV, top_C, total_C


def _label_logits(logits_CV: Tensor, labels_C: Tensor, first: int) -> Tensor:
    """The logit in the label's column, fp32 [C]."""
    columns_C = _label_columns(labels_C, logits_CV.shape[1], first)
    return logits_CV.gather(1, columns_C[:, None]).squeeze(1).float()


def _label_columns(labels_C: Tensor, V: int, first: int) -> Tensor:
    """The label's column, if the columns begin with token `first`. Any column if the label has none."""
    return (labels_C - first).clamp(0, V - 1)


class LinearLoss(Protocol):
    """The loss that a model calls: `linear_cross_entropy`, or the function that tensor parallelism wraps around it."""

    def __call__(
        self,
        hidden: Tensor,
        weight_VD: Tensor,
        labels: Tensor,
        z_loss: float,
        softmax: SoftmaxGradient = softmax_gradient_,
    ) -> LossSum:
        """Return the summed loss of hidden states [..., D] and labels [...]."""


def linear_cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    z_loss: float = 0.0,
    softmax: SoftmaxGradient = softmax_gradient_,
    vocabulary: ShardedVocabulary | None = None,
) -> LossSum:
    """Sum the cross-entropy of softmax(hidden @ weight') over the labels, plus z_loss * log(Z)^2.

    Products are computed in the dtype of `hidden`, the softmax in fp32. The weight's gradient is summed over the chunks
    in the weight's own dtype, so a bf16 gradient is rounded once a chunk. Without gradients (no_grad, or no input that
    requires them) the two products for the gradients are skipped.

    Args:
        hidden: hidden states [..., D].
        weight_VD: the output projection.
        labels: [...]; labels of -100 are ignored.
        z_loss: weight of the z-loss (arXiv:2204.02311, section 5).
        softmax: `softmax_gradient_`, or the same function compiled.
        vocabulary: given if `weight_VD` has this rank's rows only. Every rank gets the sums over the full vocabulary.
            The gradient of `hidden` is this rank's addend, which the caller sums over the ranks.
    """
    hidden_TD, labels_T = hidden.flatten(0, -2), labels.flatten()
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        inputs = hidden_TD, weight_VD, labels_T, z_loss, softmax, vocabulary
        return LossSum(*_LinearCrossEntropy.apply(*inputs))  # type: ignore[no-untyped-call]  # untyped in torch
    return LossSum(*_chunked(hidden_TD, weight_VD, labels_T, z_loss, softmax, vocabulary, None, None))


def _chunked(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    z_loss: float,
    softmax: SoftmaxGradient,
    vocabulary: ShardedVocabulary | None,
    grad_hidden_TD: Tensor | None,
    grad_weight_VD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, cross-entropy, z-loss). Writes the gradients of `total` into the tensors that are given for them."""
    T, V = len(hidden_TD), len(weight_VD)
    size = math.ceil(T / _chunks(T * V, hidden_TD.device))
    weight_VD = weight_VD.to(hidden_TD.dtype)
    # One buffer for all chunks. With a new one for each, two would exist while the second is computed.
    buffer_CV = hidden_TD.new_empty(size, V)
    # The softmax always gets full chunks, so that it is compiled for one size. Old rows fill up the last chunk.
    labels_T = F.pad(labels_T, (0, -T % size), value=IGNORE) if T % size else labels_T
    cross_entropy = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
    z = torch.zeros_like(cross_entropy)
    for start in range(0, T, size):
        chunk = slice(start, start + size)
        hidden_CD, labels_C = hidden_TD[chunk], labels_T[chunk]
        logits_CV = torch.mm(hidden_CD, weight_VD.T, out=buffer_CV[: len(hidden_CD)])
        nll_C, z_C, column_C = softmax(buffer_CV, labels_C, z_loss, vocabulary)
        cross_entropy += nll_C.sum(dtype=torch.float64)
        z += z_C.sum(dtype=torch.float64)
        rows = len(logits_CV)
        columns_C = _label_columns(labels_C[:rows], V, 0 if vocabulary is None else vocabulary.first)
        where = torch.arange(rows, device=logits_CV.device), columns_C
        gradient_CV = logits_CV.index_put_(where, column_C[:rows].to(logits_CV.dtype))  # scatter_ copies all on a CPU
        if grad_hidden_TD is not None:
            torch.mm(gradient_CV, weight_VD, out=grad_hidden_TD[chunk])
        if grad_weight_VD is not None:
            _add_product(grad_weight_VD, gradient_CV, hidden_CD, first=start == 0)
    return (cross_entropy + z).float(), cross_entropy, z


def _chunks(logits: int, device: torch.device) -> int:
    """Number of chunks: a power of two, so that most batches divide evenly."""
    chunks = 1
    while chunks < _CHUNKS and logits // chunks > _SMALLEST_CHUNK.get(device.type, 2**25):
        chunks *= 2
    return chunks


def _add_product(grad_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor, first: bool) -> None:
    """grad_VD += gradient_CV' @ hidden_CD. The `first` time, overwrite what grad_VD contains."""
    if grad_VD.dtype == hidden_CD.dtype:
        grad_VD.addmm_(gradient_CV.T, hidden_CD, beta=0 if first else 1)
        return
    rows = max(1, _BLOCK // grad_VD.shape[1])  # a few rows at a time, so that there is no second [V, D]
    for part_RD, gradient_CR in zip(torch.split(grad_VD, rows), torch.split(gradient_CV, rows, dim=1), strict=True):
        product_RD = gradient_CR.T @ hidden_CD
        part_RD.copy_(product_RD) if first else part_RD.add_(product_RD)


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute the gradients in forward, for a loss gradient of 1. Scale them in place in backward."""

    @staticmethod
    def forward(
        ctx: Any,  # torch gives its context no type that takes attributes
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        z_loss: float,
        softmax: SoftmaxGradient,
        vocabulary: ShardedVocabulary | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_hidden_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        total, cross_entropy, z = _chunked(
            hidden_TD, weight_VD, labels_T, z_loss, softmax, vocabulary, grad_hidden_TD, grad_weight_VD
        )
        ctx.gradients = grad_hidden_TD, grad_weight_VD
        ctx.mark_non_differentiable(cross_entropy, z)
        return total, cross_entropy, z

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # Any: as above
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy keeps its gradients for one backward pass; "
                "call the first one with retain_graph=True"
            )
        gradients = ctx.gradients
        # Private. save_for_backward() would tell whether the graph is kept, but would free what it saved too late.
        if torch._C._autograd._get_current_graph_task_keep_graph():
            scaled = [None if gradient is None else gradient * grad_total for gradient in gradients]
        else:
            ctx.gradients = None  # scaled in place: a second [V, D] would cost the memory that chunks have saved
            scaled = [None if gradient is None else gradient.mul_(grad_total) for gradient in gradients]
        return *scaled, None, None, None, None
