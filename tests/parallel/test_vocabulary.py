"""Vocab-parallel loss: sums and gradients match the full vocabulary, without logits of the full vocabulary."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workers import WorkerPool

from parallel.vocabulary import VocabShard, vocab_parallel_loss
from pretrain.model import loss as loss_module
from pretrain.model.loss import linear_cross_entropy, softmax_gradient_

T, D, V, Z = 52, 24, 76, 0.1
Result = tuple[list[float], Tensor, Tensor, int, int]


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=generator)
    labels[::7] = -100
    return hidden, weight, labels


class LargestLastDim(TorchDispatchMode):
    """Records the largest last dimension of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.width = max(
            [self.width, *(x.shape[-1] for x in tree_leaves(out) if isinstance(x, Tensor) and x.ndim == 2)]
        )
        return out


def run_rank(dtype: torch.dtype = torch.float32, compiled: bool = False, wrong_by: int = 0) -> Result:
    """(sums, summed gradient of hidden, gradient of the full weight, largest last dimension, forward all-reduces)."""
    hidden, weight, labels = problem(dtype)
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = weight.detach().chunk(size)[rank].clone().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    loss = vocab_parallel_loss(linear_cross_entropy, group, lambda x: x)
    softmax = torch.compile(softmax_gradient_, backend="aot_eager", fullgraph=True) if compiled else softmax_gradient_
    first = (rank + wrong_by) % size * len(rows)
    collectives, widest = CommDebugMode(), LargestLastDim()
    with ExitStack() as stack:
        stack.enter_context(patch.object(loss_module, "_CHUNKS", 4))
        stack.enter_context(patch.object(loss_module, "_SMALLEST_CHUNK", {"cpu": 1}))
        stack.enter_context(patch("parallel.vocabulary.VocabShard", lambda _, group: VocabShard(first, group)))
        for mode in () if compiled else (collectives, widest):  # under dispatch modes nothing is compiled
            stack.enter_context(mode)
        sums = loss(hidden, rows, labels, Z, softmax=softmax)
    grad_hidden, grad_rows = torch.autograd.grad(sums.total, (hidden, rows))
    dist.all_reduce(grad_hidden)
    parts = [torch.empty_like(grad_rows) for _ in range(size)]
    dist.all_gather(parts, grad_rows)
    return [x.item() for x in sums], grad_hidden, torch.cat(parts), widest.width, collectives.get_total_counts()


def errors(results: list[Result], dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Largest relative error of (sums, gradients) against the full vocabulary in one process."""
    hidden, weight, labels = (
        x.detach().float().requires_grad_() if x.is_floating_point() else x for x in problem(dtype)
    )
    expected = linear_cross_entropy(hidden, weight, labels, Z)
    gradients = torch.autograd.grad(expected.total, (hidden, weight))
    of_sums = max(abs(x - y.item()) / y.item() for sums, *_ in results for x, y in zip(sums, expected, strict=True))
    of_gradients = max(
        float((x - y).norm() / y.norm()) for _, *ours, _, _ in results for x, y in zip(ours, gradients, strict=True)
    )
    return of_sums, of_gradients


@pytest.mark.parametrize(("size", "compiled"), [(2, False), (4, False), (2, True)])
def test_sums_and_gradients_match_the_full_vocabulary(workers: WorkerPool, size: int, compiled: bool) -> None:
    of_sums, of_gradients = errors(workers.run(run_rank, size, torch.float32, compiled))
    assert of_sums < 1e-6
    assert of_gradients < 1e-6


def test_bf16_matches_within_its_rounding(workers: WorkerPool) -> None:
    of_sums, of_gradients = errors(workers.run(run_rank, 2, torch.bfloat16), torch.bfloat16)
    assert of_sums < 1e-3
    assert of_gradients < 1e-2


def test_no_full_logits_are_made_and_a_chunk_has_two_collectives(workers: WorkerPool) -> None:
    for *_, widest, collectives in workers.run(run_rank, 2):
        assert widest == V // 2
        assert collectives == 2 * 4


def test_a_wrong_vocabulary_offset_is_detected(workers: WorkerPool) -> None:
    of_sums, of_gradients = errors(workers.run(run_rank, 2, torch.float32, False, 1))
    assert of_sums > 1e-2
    assert of_gradients > 1e-2
