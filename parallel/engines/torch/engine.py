"""The native engine: plain PyTorch on one CPU or GPU, or on any grid of them.

Weights are kept in fp32 (the masters: what the optimizer updates and checkpoints hold). Under bf16 the forward and backward pass use
copies of them, and gradients are added up in fp32. On one process the copies are made once a step, and each gradient is added to its
master's as soon as it is complete: 2 + 4 + 4 + 8 = 18 bytes a parameter with AdamW (`parallel.master_weights`). On several processes the masters
are divided and the copies gathered (`parallel.fsdp`, which says what that saves).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.engine import ForwardStep, Microbatch, Optimizer, State, StepResult
from parallel.fsdp import FSDPRoot
from parallel.gradients import clip_gradients_, local_squared_norm
from parallel.layout import Layout


class Runner(Protocol):
    """Carries microbatches through the parts of the model that this rank holds."""

    def train(self, microbatches: Sequence[Microbatch], scale: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward passes: adds the gradients of `scale` times the summed loss; sums of (cross-entropy, z-loss), fp64.

        The sums are 0 where the last part of the model is not.
        """

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Forward passes: sum of the cross-entropy, fp64, 0 where the last part of the model is not."""


class SingleStageRunner:
    """`Runner` of a rank that holds all layers: microbatches one after the other."""

    def __init__(self, model: nn.Module, forward_step: ForwardStep, sharded: FSDPRoot | None = None) -> None:
        self._model = model
        self._forward_step = forward_step
        self._sharded = sharded

    def train(self, microbatches: Sequence[Microbatch], scale: Tensor) -> tuple[Tensor, Tensor]:
        """See `Runner`."""
        cross_entropy, z_loss = torch.zeros(2, dtype=torch.float64, device=scale.device).unbind()
        for i, microbatch in enumerate(microbatches, 1):
            if self._sharded is not None:
                self._sharded.before(last=i == len(microbatches))
            sums = self._forward_step(self._model, None, microbatch)
            assert not isinstance(sums, Tensor)
            (sums.total * scale).backward()  # type: ignore[no-untyped-call]  # torch does not type backward()
            cross_entropy += sums.cross_entropy.detach()
            z_loss += sums.z_loss.detach()
        return cross_entropy, z_loss

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """See `Runner`."""
        total: Tensor | None = None
        for microbatch in microbatches:
            sums = self._forward_step(self._model, None, microbatch)
            assert not isinstance(sums, Tensor)
            total = sums.cross_entropy.double() if total is None else total + sums.cross_entropy
        assert total is not None, "nothing to evaluate"
        return total


class TorchEngine:
    """`Engine` over the parameters of this rank: what a step is, wherever parameters and microbatches are."""

    def __init__(
        self,
        model_chunks: Sequence[nn.Module],
        master_weights: dict[str, nn.Parameter],
        optimizer: Optimizer,
        runner: Runner,
        *,
        device: torch.device,
        max_grad_norm: float | None,
        layout: Layout = Layout(),  # noqa: B008  # frozen
        rank: int = 0,
        n_copies: Callable[[str], int] = lambda _: 1,
        cut: Callable[[Microbatch], Microbatch] = lambda microbatch: microbatch,
        finish_gradients: Callable[[], None] = lambda: None,
        refresh: Callable[[], None] = lambda: None,
        after_evaluation: Callable[[], None] = lambda: None,
    ) -> None:
        """An engine of its pieces; `parallel.engines.torch.build` puts them together.

        model_chunks: of the model, on this rank. masters: its fp32 parameters by canonical name. device: of the losses. n_copies: stages that
        hold a parameter. cut: a microbatch's share of a context rank. finish_gradients: called between the last backward pass and the
        norm. refresh: called when masters have changed. after_evaluation: called after forward passes that no backward pass follows.
        """
        self.model_chunks = model_chunks
        self.master_weights = master_weights
        self._optimizer = optimizer
        self._runner = runner
        self._device = device
        self._max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        self.layout = layout
        at = layout.coordinates(rank)
        self._counts_targets = (
            at["pipeline"] == at["context"] == at["tensor"] == 0
        )  # one rank of all that read the same rows
        self._n_copies = n_copies
        self._cut = cut
        self._finish_gradients = finish_gradients
        self._refresh = refresh
        self._after_evaluation = after_evaluation

    @property
    def model(self) -> nn.Module:
        """The model, where one rank holds all layers."""
        (model,) = self.model_chunks
        return model

    def train_step(
        self, microbatches: Sequence[Microbatch], lr_scale: float, stop_requested: Callable[[], bool] = lambda: False
    ) -> StepResult:
        """One optimizer step; the loss is averaged over the targets of the global batch, however they are spread."""
        n_targets = self._count_targets(microbatches).clamp(min=1)
        cross_entropy, z_loss = self._runner.train([self._cut(m) for m in microbatches], n_targets.float().reciprocal())
        self._finish_gradients()
        share = local_squared_norm(self.master_weights, self.layout, self._n_copies)
        # Tensor ranks have the same loss; all other ranks have different parts of it, or none.
        losses = torch.stack([cross_entropy, z_loss]) / (self.layout.tensor * n_targets)
        stop_here = torch.full((), stop_requested(), dtype=torch.float64, device=self._device)
        loss, z, squares, n_stops = self._sum(
            torch.cat([losses, torch.stack([share.to(self._device), stop_here])])
        ).tolist()
        result = StepResult(loss, z, squares**0.5, stop_requested=n_stops > 0)
        if result.is_finite:  # weights that met a NaN are lost; the loop decides what happens next
            clip_gradients_(self.master_weights.values(), self._max_grad_norm, result.grad_norm)
            self._optimizer.set_lr(lr_scale)
            self._optimizer.step()
            self.sync_compute_weights()
        self._optimizer.zero_grad()
        return result

    @torch.no_grad()
    def eval_step(self, microbatches: Sequence[Microbatch]) -> tuple[float, int]:
        """(sum of the cross-entropy in nats, number of targets) over all data ranks."""
        n_targets = self._count_targets(microbatches)
        total = self._sum(self._runner.evaluate([self._cut(m) for m in microbatches]) / self.layout.tensor)
        self._after_evaluation()
        return total.item(), int(n_targets)

    def state(self) -> State:
        """Live fp32 masters and optimizer state by canonical name; DTensors where they are divided."""
        model: dict[str, Tensor | dict[str, Tensor]] = {
            name: master.detach() for name, master in self.master_weights.items()
        }
        return {"model": model, "optimizer": dict(self._optimizer.state())}

    @torch.no_grad()
    def sync_compute_weights(self) -> None:
        """Let the next pass compute with what the masters are now."""
        self._refresh()

    def _count_targets(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Labels of the global batch, int64, on the device: nobody waits for it."""
        mine = sum(microbatch.n_targets for microbatch in microbatches) if self._counts_targets else 0
        return self._sum(
            torch.full((), mine, dtype=torch.int64, device=self._device)
        )  # made there: torch.tensor() would wait to copy it

    def _sum(self, values: Tensor) -> Tensor:
        if self.layout.world_size > 1:
            dist.all_reduce(values)
        return values
