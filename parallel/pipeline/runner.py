"""Pipeline parallelism on torch.distributed.pipelining: microbatches flow through stages of layers.

Between two stages one [b, S, D] activation per microbatch goes forward, and its gradient goes back. What torch does:

- It keeps memory for these tensors of all microbatches of a step: 2 * n_microbatches * b * S * D numbers per stage.
- It sums up gradients without moving them. If a stage is an FSDP module, it reduces them once, after the last
  microbatch. So ZeRO-2 holds as many gradients as ZeRO-1.
- The loss computes the gradient of the output projection in its forward pass (`pretrain.model.loss`). Under GPipe,
  where all forward passes come first, the last stage holds one such gradient per microbatch.

Zero bubble splits the backward pass in our own code (`parallel.pipeline.zero_bubble`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from parallel.engine import Microbatch
from parallel.layout import Layout
from parallel.pipeline.schedule import check_stages_per_rank, rank_of_stage
from parallel.pipeline.stage import StageModule, zero_loss_sums
from parallel.pipeline.torch_schedules import MULTI_STAGE, SINGLE_STAGE
from parallel.torch_compat import PipelineStage


class PipelineRunner:
    """Runs microbatches through the stages of this rank and its pipeline neighbours."""

    def __init__(
        self,
        stages: Mapping[int, StageModule],
        layout: Layout,
        group: dist.ProcessGroup,
        *,
        device: torch.device,
        dtype: torch.dtype,
        d_model: int,
        sequence_shards: int = 1,
    ) -> None:
        """A pipeline for steps that `parallel.pipeline.schedule.check_pipeline` accepts.

        Args:
            stages: of this rank, by number; see `stages_of_rank`.
            layout: its `pipeline`, `schedule` and `stages_per_rank` are used here.
            group: the ranks of the axis `pipeline`, in order.
            device: where activations are.
            dtype: of the activations.
            d_model: their width.
            sequence_shards: number of tensor ranks that share the tokens of an activation, under sequence parallelism.

        Raises:
            LayoutError: the schedule does not take that many stages per rank.
        """
        check_stages_per_rank(layout)
        self._stages = stages
        self._layout = layout
        self._group = group
        self._device = device
        self._dtype = dtype
        self._d_model = d_model
        self._sequence_shards = sequence_shards
        self._schedule: PipelineScheduleSingle | PipelineScheduleMulti | None = None
        self._schedule_shape: tuple[int, int, int] | None = None

    def train(self, microbatches: Sequence[Microbatch], scale: Tensor) -> tuple[Tensor, Tensor]:
        """Run forward and backward passes, and add the gradients of `scale` times the summed loss.

        Args:
            microbatches: of equal shape.
            scale: a scalar.

        Returns:
            The summed (cross-entropy, z-loss) without `scale`, fp64; zeros on ranks without the last stage.
        """
        shape = len(microbatches), *microbatches[0].input_ids.shape
        if self._schedule_shape != shape:
            # Only the last schedule is kept: each has memory for its activations.
            self._schedule = self._schedule_shape = None
            self._schedule, self._schedule_shape = self._build_schedule(*shape), shape
        assert self._schedule is not None
        for stage in self._stages.values():
            stage.begin_step(microbatches, scale)
        self._schedule.step(target=torch.zeros(len(microbatches)), return_outputs=False)
        return self._loss_sums()

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Run forward passes of any number of microbatches.

        Time is counted in ticks. In each tick a rank computes what is due, then exchanges activations with its
        neighbours.

        Returns:
            The summed cross-entropy, fp64; zero on ranks without the last stage.
        """
        scale = torch.ones((), device=self._device)
        for stage in self._stages.values():
            stage.begin_step(microbatches, scale)
        due = self._evaluation_ticks(len(microbatches))
        inputs: dict[tuple[int, int], Tensor] = {}  # by the (stage, microbatch) that needs it
        for tick in range(-1, max(due) + 1):
            transfers: list[dist.P2POp] = []
            for i, microbatch in due.get(tick, ()):
                out = self._stages[i](*(() if i == 0 else (inputs.pop((i, microbatch)),)))
                if i + 1 in self._stages:
                    inputs[i + 1, microbatch] = out
                elif i + 1 < self._layout.n_stages:
                    transfers.append(self._transfer(dist.isend, out, i + 1))
            for i, microbatch in due.get(tick + 1, ()):
                if i > 0 and i - 1 not in self._stages:
                    inputs[i, microbatch] = self._empty_activation(*microbatches[microbatch].input_ids.shape)
                    transfers.append(self._transfer(dist.irecv, inputs[i, microbatch], i - 1))
            for work in dist.batch_isend_irecv(transfers) if transfers else ():
                work.wait()
        return self._loss_sums()[0]

    def _evaluation_ticks(self, n_microbatches: int) -> dict[int, list[tuple[int, int]]]:
        """The (stage, microbatch) pairs that this rank computes in each tick, one tick after the stage before.

        Interleaved ranks take the microbatches in rounds of p, so that no two are due at once. The ranks of a V do
        two per tick while it is full.
        """
        p, stages_per_rank = self._layout.pipeline, self._layout.stages_per_rank
        due: dict[int, list[tuple[int, int]]] = {}
        for microbatch in range(n_microbatches):
            delay = 0 if self._layout.schedule == "zbv" else microbatch // p * p * (stages_per_rank - 1)
            for i in self._stages:
                due.setdefault(microbatch + delay + i, []).append((i, microbatch))
        return due

    def _build_schedule(self, n_microbatches: int, b: int, S: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Build torch's schedule. With all shapes given, torch need not run the model to learn them."""
        activation = self._empty_activation(b, S, device="meta").requires_grad_()
        loss = torch.empty((), device="meta", requires_grad=True)
        n_stages = self._layout.n_stages
        stages = [
            PipelineStage(
                stage,
                i,
                n_stages,
                self._device,
                input_args=() if i == 0 else (activation,),
                output_args=(loss if i == n_stages - 1 else activation,),
                group=self._group,
                dw_builder=None
                if stage.zero_bubble is None
                else partial(stage.zero_bubble.take_weight_gradients, stage),
            )
            for i, stage in self._stages.items()
        ]
        if self._layout.schedule in SINGLE_STAGE:
            (stage,) = stages
            return SINGLE_STAGE[self._layout.schedule](stage, n_microbatches, loss_fn=_loss, scale_grads=False)
        return MULTI_STAGE[self._layout.schedule](list(stages), n_microbatches, loss_fn=_loss, scale_grads=False)

    def _empty_activation(self, b: int, S: int, device: torch.device | str | None = None) -> Tensor:
        shape = b, S // self._sequence_shards, self._d_model
        return torch.empty(shape, dtype=self._dtype, device=device or self._device)

    # Any: P2POp compares functions by identity.
    def _transfer(self, direction: Any, activation: Tensor, peer_stage: int) -> dist.P2POp:
        peer = rank_of_stage(peer_stage, self._layout)
        return dist.P2POp(direction, activation, group=self._group, group_peer=peer)

    def _loss_sums(self) -> tuple[Tensor, Tensor]:
        last = self._stages.get(self._layout.n_stages - 1)
        return zero_loss_sums(self._device) if last is None or last.loss_sums is None else last.loss_sums


def _loss(out: Tensor, _: Tensor) -> Tensor:
    """The loss function that torch wants: the last stage has computed the loss already."""
    return out
