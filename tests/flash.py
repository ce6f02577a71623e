"""A stand-in for the variable-length flash kernels of GPUs, so that how they are called is tested without one."""

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
    """What flash attention's documentation promises, on any device: the last query of a document stands at its last key."""
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
