"""The native engine: plain PyTorch on one CPU or GPU, or on a mesh of them.

Master weights are fp32: the optimizer updates them and checkpoints hold them. With bf16 the passes compute with bf16
copies, and gradients are summed up in fp32. In one process the copies are made once per step, and each gradient is
added to its master weight's as soon as it is complete: 2 + 4 + 4 + 8 = 18 bytes per parameter with AdamW
(`parallel.master_weights`). On several processes master weights are sharded and the copies gathered; `parallel.fsdp`
has the table of what that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.engine import EvalResult, ForwardStep, Microbatch, Optimizer, State, StepResult
from parallel.engines.torch.rank_model import RankModel
from parallel.fsdp import FSDPRoot
from parallel.gradients import clip_gradients_, local_squared_norm
from parallel.layout import Layout


class Runner(Protocol):
    """Runs microbatches through the model chunks of this rank."""

    def train(self, microbatches: Sequence[Microbatch], scale: Tensor) -> tuple[Tensor, Tensor]:
        """Run forward and backward passes, and add the gradients of `scale` times the summed loss.

        Returns:
            The summed (cross-entropy, z-loss), fp64. Both are 0 on ranks without the last chunk.
        """

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Run forward passes. Returns the summed cross-entropy, fp64; 0 on ranks without the last chunk."""


class SingleStageRunner:
    """`Runner` of a rank that holds all layers: one microbatch after the other."""

    def __init__(self, model: nn.Module, forward_step: ForwardStep, fsdp_root: FSDPRoot | None = None) -> None:
        self._model = model
        self._forward_step = forward_step
        self._fsdp_root = fsdp_root

    def train(self, microbatches: Sequence[Microbatch], scale: Tensor) -> tuple[Tensor, Tensor]:
        """See `Runner`."""
        cross_entropy, z_loss = torch.zeros(2, dtype=torch.float64, device=scale.device).unbind()
        for i, microbatch in enumerate(microbatches, 1):
            if self._fsdp_root is not None:
                self._fsdp_root.prepare_microbatch(is_last=i == len(microbatches))
            loss = self._forward_step(self._model, None, microbatch)
            assert not isinstance(loss, Tensor)
            (loss.total * scale).backward()  # type: ignore[no-untyped-call]  # torch does not type backward()
            cross_entropy += loss.cross_entropy.detach()
            z_loss += loss.z_loss.detach()
        return cross_entropy, z_loss

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """See `Runner`."""
        total: Tensor | None = None
        for microbatch in microbatches:
            loss = self._forward_step(self._model, None, microbatch)
            assert not isinstance(loss, Tensor)
            total = loss.cross_entropy.double() if total is None else total + loss.cross_entropy
        assert total is not None, "nothing to evaluate"
        return total


class TorchEngine:
    """`InspectableEngine` on torch modules. A step is the same for one process and for every layout."""

    def __init__(
        self,
        model: RankModel,
        runner: Runner,
        optimizer: Optimizer,
        *,
        layout: Layout,
        rank: int,
        device: torch.device,
        max_grad_norm: float | None,
        routing_shape: tuple[int, int] = (0, 0),
    ) -> None:
        """Put the parts together; `parallel.engines.torch.build` makes them.

        Args:
            model: what this rank holds of the model.
            runner: runs microbatches through it.
            optimizer: over the model's master weights.
            layout: of all ranks.
            rank: of this process.
            device: where the losses are.
            max_grad_norm: as in `EngineOptions`.
            routing_shape: layers of the full model, and numbers that each `RoutedLayer` counts.
        """
        self._model = model
        self._runner = runner
        self._optimizer = optimizer
        self.layout = layout
        self._device = device
        self._routing_shape = routing_shape
        self._max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        # Of all ranks that read the same rows, one counts their targets.
        coordinates = layout.coordinates(rank)
        self._counts_targets = coordinates["pipeline"] == coordinates["context"] == coordinates["tensor"] == 0

    @property
    def model_chunks(self) -> Sequence[nn.Module]:
        """See `InspectableEngine`."""
        return self._model.chunks

    @property
    def master_weights(self) -> dict[str, nn.Parameter]:
        """See `InspectableEngine`."""
        return self._model.master_weights

    @property
    def model(self) -> nn.Module:
        """The only chunk of a rank that holds all layers."""
        (model,) = self._model.chunks
        return model

    def train_step(
        self,
        microbatches: Sequence[Microbatch],
        lr_scale: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """See `Engine`. The loss is averaged over the targets of the global batch, however they are distributed."""
        n_targets, n_tokens = self._count_targets_and_tokens(microbatches).clamp(min=1).unbind()
        for layer in self._model.routed_layers:
            layer.begin_step(n_tokens.float().reciprocal())
        local = [self._model.shard_microbatch(microbatch) for microbatch in microbatches]
        cross_entropy, z_loss = self._runner.train(local, n_targets.float().reciprocal())
        self._model.finish_gradients()
        squared_norm = local_squared_norm(self.master_weights, self.layout, self._model.n_stages_with)
        # Tensor ranks have the same loss. All other ranks have different parts of it, or none.
        losses = torch.stack([cross_entropy, z_loss]) / (self.layout.tensor * n_targets)
        stop = torch.full((), stop_requested(), dtype=torch.float64, device=self._device)
        scalars = torch.cat([losses, torch.stack([squared_norm.to(self._device), stop])])
        sums, routing = self._all_reduce_with_routing(scalars)
        # One copy to the host brings everything that the step reports.
        on_host = torch.cat([sums, n_tokens[None].double(), routing.flatten()]).cpu()
        mean_loss, mean_z_loss, global_squared_norm, n_stop_requests, total_tokens = on_host[:5].tolist()
        result = StepResult(
            mean_loss,
            mean_z_loss,
            global_squared_norm**0.5,
            stop_requested=n_stop_requests > 0,
            routing=on_host[5:].view_as(routing) if routing.numel() else None,
            n_tokens=int(total_tokens),
        )
        if result.is_finite:  # a NaN would ruin the weights; the loop decides what happens next
            for layer in self._model.routed_layers:
                layer.end_step(routing[layer.layer])
            clip_gradients_(self.master_weights.values(), self._max_grad_norm, result.grad_norm)
            self._optimizer.set_lr(lr_scale)
            self._optimizer.step()
            self.sync_compute_weights()
        self._optimizer.zero_grad()
        return result

    @torch.no_grad()
    def eval_step(self, microbatches: Sequence[Microbatch]) -> EvalResult:
        """See `Engine`."""
        n_targets, _ = self._count_targets_and_tokens(microbatches).unbind()
        local = [self._model.shard_microbatch(microbatch) for microbatch in microbatches]
        total, routing = self._all_reduce_with_routing(self._runner.evaluate(local)[None] / self.layout.tensor)
        self._model.reshard()
        return EvalResult(total.item(), int(n_targets), routing.cpu() if routing.numel() else None)

    def state(self) -> State:
        """See `Engine`. Tensors are DTensors if they are sharded."""
        model: dict[str, Tensor | dict[str, Tensor]] = {
            name: master_weight.detach() for name, master_weight in self.master_weights.items()
        }
        model |= self._model.buffers
        return {"model": model, "optimizer": dict(self._optimizer.state())}

    @torch.no_grad()
    def sync_compute_weights(self) -> None:
        """See `Engine`."""
        self._model.sync_compute_weights()

    def _count_targets_and_tokens(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Numbers of (targets, tokens) of the global batch, int64, on the device. Nobody waits for them."""
        counts = sum(m.n_targets for m in microbatches), sum(m.n_tokens for m in microbatches)
        # torch.full() makes them on the device; torch.tensor() would wait for a copy.
        counted = [torch.full((), n * self._counts_targets, dtype=torch.int64, device=self._device) for n in counts]
        return self._all_reduce(torch.stack(counted))

    def _all_reduce_with_routing(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sum fp64 values [N] over all ranks, and in the same message what the routed layers counted.

        Returns:
            ([N], [n_layers, routing_width]); the latter has no elements without routed layers.
        """
        n_layers, width = self._routing_shape
        routing = values.new_zeros(n_layers if width else 0, width)
        for layer in self._model.routed_layers:
            routing[layer.layer] = layer.take_sums()
        summed = self._all_reduce(torch.cat([values, routing.flatten()]))
        return summed[: len(values)], summed[len(values) :].view_as(routing)

    def _all_reduce(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.layout.world_size > 1:
            dist.all_reduce(values)
        return values
