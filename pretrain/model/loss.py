"""Cross-entropy of a linear output layer that never holds the logits of a whole batch.

The tokens go through in chunks. For each chunk the logits are computed, turned into their own gradient in place, and
multiplied into the gradients of the hidden states and of the weight, all in the forward pass; backward only scales them.
So 3 matrix products are done, as without chunks, and at best 1/16 of the logits live at a time.
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

_CHUNKS = 16  # logits alive: 1/16 of all. More chunks read the weight more often and round its gradient more often
_SMALLEST_CHUNK = {
    "cpu": 2**22,
    "cuda": 2**25,
}  # logits; a chunk of 8 MB in bf16 stays in a CPU's cache, a GPU wants large products
_BLOCK = 2**20  # fp32 numbers that the eager softmax works on at a time


class LossSum(NamedTuple):
    """Sums over the labelled tokens, scalars."""

    total: Tensor
    """What to differentiate: cross_entropy + z_loss, fp32."""

    cross_entropy: Tensor
    """Negative log-likelihood in nats, fp64; detached."""

    z_loss: Tensor
    """z_loss weight * log(Z)^2, fp64; detached."""


class ShardedVocabulary(Protocol):
    """Where the logits at hand are those of consecutive rows of a weight whose other rows are with other ranks."""

    @property
    def first(self) -> int:
        """Token id of the first row."""

    def all_max(self, x_C: Tensor) -> Tensor:
        """The largest of all ranks, element by element."""

    def all_sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, element by element."""


class SoftmaxGradient(Protocol):
    """`softmax_gradient_`, or it compiled."""

    def __call__(
        self, logits_CV: Tensor, labels_C: Tensor, z_loss: float, vocabulary: ShardedVocabulary | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [C, V], overwritten, and labels [C] -> three fp32 [C]."""


def softmax_gradient_(
    logits_CV: Tensor, labels_C: Tensor, z_loss: float, vocabulary: ShardedVocabulary | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite the logits with the gradient of the loss for them, but for the column at `_columns`.

    Returns, fp32 [C] each: the negative log-likelihood, the weighted z-loss (both 0 where ignored), and what belongs into
    that column. Writing it is left to the caller because a scatter would keep the rest from being fused.
    """
    # Uncompiled, every operation writes a temporary: a few rows at a time, in one piece of memory, keep that small and in the cache.
    # Not where each block would wait for other ranks: there the vocabulary is a part, and so are the temporaries.
    at_once = torch.compiler.is_compiling() or vocabulary is not None
    rows = len(logits_CV) if at_once else max(1, _BLOCK // logits_CV.shape[1])
    scratch_RV = torch.empty(
        min(rows, len(logits_CV)), logits_CV.shape[1], dtype=torch.float32, device=logits_CV.device
    )
    blocks = zip(torch.split(logits_CV, rows), torch.split(labels_C, rows), strict=True)
    parts = [
        _softmax_gradient_block_(logits, labels, z_loss, vocabulary, scratch_RV[: len(logits)])
        for logits, labels in blocks
    ]
    nll_C, z_C, column_C = (torch.cat(part) for part in zip(*parts, strict=True))
    return nll_C, z_C, column_C


def _softmax_gradient_block_(
    logits_CV: Tensor, labels_C: Tensor, z_loss: float, vocabulary: ShardedVocabulary | None, scratch_CV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    valid_C = (labels_C != IGNORE).float()
    weights_CV = scratch_CV.copy_(logits_CV)
    top_C = weights_CV.amax(-1)
    total_C = weights_CV.sub_(top_C[:, None]).exp_().sum(-1)
    own_C, own_total_C = valid_C, total_C
    column_logit_C = label_logit_C = (
        logits_CV.gather(1, _columns(labels_C, logits_CV.shape[1], vocabulary)[:, None]).squeeze(1).float()
    )
    if vocabulary is not None:
        own_C = valid_C * ((labels_C >= vocabulary.first) & (labels_C < vocabulary.first + logits_CV.shape[1])).float()
        own_top_C, top_C = top_C, vocabulary.all_max(top_C)
        shift_C = (own_top_C - top_C).exp()
        total_C, label_logit_C = vocabulary.all_sum(torch.stack((total_C * shift_C, column_logit_C * own_C))).unbind()
        own_total_C = total_C / shift_C
    log_z_C = top_C + total_C.log()
    scale_C = valid_C * (1 + 2 * z_loss * log_z_C)
    # No gathered logit may enter this line: the compiler would read it in the same kernel, and so write to a second [C, V].
    logits_CV.copy_(weights_CV.mul_((scale_C / own_total_C)[:, None]))
    column_C = (column_logit_C - log_z_C).exp() * scale_C - own_C
    return (log_z_C - label_logit_C) * valid_C, z_loss * log_z_C.square() * valid_C, column_C


def _columns(labels_C: Tensor, V: int, vocabulary: ShardedVocabulary | None) -> Tensor:
    """The label's column; where another rank has it, or there is none, one that is here all the same."""
    return (labels_C if vocabulary is None else labels_C - vocabulary.first).clamp(0, V - 1)


class LinearLoss(Protocol):
    """What a model calls for its loss: `linear_cross_entropy`, or what parallelism puts around it."""

    def __call__(
        self,
        hidden: Tensor,
        weight_VD: Tensor,
        labels: Tensor,
        z_loss: float,
        softmax: SoftmaxGradient = softmax_gradient_,
    ) -> LossSum:
        """Hidden states [..., D] and labels [...] -> the summed loss."""


def linear_cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    z_loss: float = 0.0,
    softmax: SoftmaxGradient = softmax_gradient_,
    vocabulary: ShardedVocabulary | None = None,
) -> LossSum:
    """Summed cross-entropy of softmax(hidden @ weight') against the labels, plus z_loss * log(Z)^2 (arXiv:2204.02311, section 5).

    Hidden states are [..., D], labels [...]; labels of -100 are ignored. Products are computed in the type of `hidden`, the softmax in
    fp32, and the weight's gradient is summed over the chunks in the weight's own type: a bf16 weight's is rounded once a chunk. Pass
    `softmax_gradient_` compiled to have it so. Without gradients (no_grad, or nothing that requires them) the two products that make them
    are left out; the softmax is overwritten with its gradient all the same.

    With a part of the vocabulary, `weight_VD` has its rows alone. The sums are those of the whole vocabulary, on every rank; the gradient
    of `hidden` is this part's addend, which the caller sums over the ranks.
    """
    hidden_TD, labels_T = hidden.flatten(0, -2), labels.flatten()
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        return LossSum(*_LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, z_loss, softmax, vocabulary))  # type: ignore[no-untyped-call]  # in torch
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
    """(total, cross-entropy, z-loss); fills the gradients of `total` that are given."""
    T, V = len(hidden_TD), len(weight_VD)
    size = math.ceil(T / _chunks(T * V, hidden_TD.device))
    weight_VD = weight_VD.to(hidden_TD.dtype)
    buffer_CV = hidden_TD.new_empty(size, V)  # one for all chunks: two would live while the second is computed
    # The softmax always gets whole chunks, so that it is compiled for one size. What fills the last one up are rows of the chunk before.
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
        where = torch.arange(rows, device=logits_CV.device), _columns(labels_C[:rows], V, vocabulary)
        gradient_CV = logits_CV.index_put_(where, column_C[:rows].to(logits_CV.dtype))  # scatter_ copies all on a CPU
        if grad_hidden_TD is not None:
            torch.mm(gradient_CV, weight_VD, out=grad_hidden_TD[chunk])
        if grad_weight_VD is not None:
            _add_product(grad_weight_VD, gradient_CV, hidden_CD, first=start == 0)
    return (cross_entropy + z).float(), cross_entropy, z


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
                "linear_cross_entropy keeps its gradients for one backward pass; give the one before retain_graph=True"
            )
        gradients = ctx.gradients
        # Private: save_for_backward() is the public way to hear that a graph is kept, and would not let go of what it saved in time.
        if torch._C._autograd._get_current_graph_task_keep_graph():
            scaled = [None if gradient is None else gradient * grad_total for gradient in gradients]
        else:
            ctx.gradients = None  # scaled in place: a second [V, D] would cost what chunks have saved
            scaled = [None if gradient is None else gradient.mul_(grad_total) for gradient in gradients]
        return *scaled, None, None, None, None
