"""A CPU reference for the variable-length flash-attention kernels, to test the calls of them without a GPU."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Attention as flash-attn documents it, on any device. A document's last query is aligned with its last key."""
    outs = []
    pieces = zip(*(pairwise(ends.tolist()) for ends in (cu_seq_q, cu_seq_k)), strict=True)
    for (start, end), (first, last) in pieces:
        assert end - start <= max_q
        assert end - start <= last - first <= max_k
        repeat = query.shape[1] // key.shape[1]
        keys, values = (x[first:last].repeat_interleave(repeat, 1) for x in (key, value))
        distance = torch.arange(last - first - (end - start), last - first)[:, None] - torch.arange(last - first)
        seen = (distance >= 0) if window_size[0] < 0 else (distance >= 0) & (distance <= window_size[0])
        assert window_size[1] == 0
        scores = torch.einsum("qhk,thk->hqt", query[start:end], keys) / query.shape[-1] ** 0.5
        outs.append(torch.einsum("hqt,thk->qhk", scores.masked_fill(~seen, float("-inf")).softmax(-1), values))
    return torch.cat(outs)


@contextmanager
def flash_on_a_cpu() -> Iterator[None]:
    """Let `varlen_attn` run on a CPU. Only the two CUDA kernels are replaced; PyTorch's operators around them run."""
    with torch.library._scoped_library("aten", "IMPL") as library:  # torch.library.Library cannot be undone
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        yield


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *documents: object,
    window_size_left: int,
    window_size_right: int,
    **_: object,
) -> tuple[Tensor, ...]:
    """Return (output, log-sum-exp, three unused tensors). Records nothing for autograd, like a kernel."""
    window = window_size_left, window_size_right
    # `documents` are in the order of the operator.
    out = reference_varlen(query, key, value, *documents[:4], window_size=window)  # type: ignore[arg-type]
    unused = query.new_empty(0)
    return out, query.new_zeros(query.shape[1], len(query)), unused, unused, unused


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _out: Tensor,
    _lse: Tensor,
    *documents: object,
    window_size_left: int,
    window_size_right: int,
    **_: object,
) -> tuple[Tensor, ...]:
    def gradients() -> tuple[Tensor, ...]:
        given = [x.detach().requires_grad_() for x in (query, key, value)]
        window = window_size_left, window_size_right
        out = reference_varlen(*given, *documents[:4], window_size=window)  # type: ignore[arg-type]  # as above
        return torch.autograd.grad(out, given, grad_out)

    with ThreadPoolExecutor(1) as another:  # inside an operator this thread records nothing for autograd
        return another.submit(gradients).result()
