"""Pipeline parallelism on torch.distributed.pipelining: layers cut into stages, microbatches flow through them in a schedule.

What crosses a cut is one [b, S, D] activation a microbatch on the way there, and its gradient on the way back. Torch keeps memory for
those of all microbatches of a step: 2 * n_microbatches * b * S * D numbers a stage. It adds up gradients without moving them and, where
a stage is an FSDP module, reduces them once, after the last microbatch: ZeRO-2 then holds as many gradients as ZeRO-1. The loss makes the
gradient of the output projection in its forward pass (`pretrain.model.loss`): under GPipe, whose forward passes all come first, the last
stage holds one of it for every microbatch. How zero bubble splits a backward pass is ours (`parallel.pipeline.zero_bubble`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from parallel.engine import ForwardStep, Microbatch, ModelChunk
from parallel.layout import Layout
from parallel.local import local
from parallel.pipeline.schedule import (
    Action,
    Kind,
    assign_layers,
    bubble_fraction,
    check_stages_per_rank,
    has_split_backward,
    rank_of_stage,
    stage_costs,
)
from parallel.pipeline.zero_bubble import ZeroBubbleBackward

SINGLE: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
MULTI: dict[str, type[PipelineScheduleMulti]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class StageModule(nn.Module):
    """Some layers of the model, as torch's pipelines call them: what the stage before gave -> what the next one needs, or the loss.

    FSDP is to be applied to this module, not to `part`: torch holds its reductions back where the module that it calls is an FSDPModule.
    """

    def __init__(self, part: nn.Module, forward_step: ForwardStep, layout: Layout) -> None:
        """A stage of a part that tensor parallelism has not split yet: it may have to split its backward pass first, in place."""
        super().__init__()
        self.part = part
        self._forward_step = forward_step
        self.weight_pass = (
            ZeroBubbleBackward(cast(ModelChunk, part).layers)
            if has_split_backward(layout.pipeline, layout.schedule)
            else None
        )
        self._microbatches: Iterator[Microbatch] = iter(())
        self._scale: Tensor | None = None
        self.sums: tuple[Tensor, Tensor] | None = None

    def begin(self, microbatches: Sequence[Microbatch], scale: Tensor) -> None:
        """Before a step: what the next calls compute. A schedule may do stages in any order, but each does its microbatches in theirs."""
        self._microbatches = iter(microbatches)
        self._scale = scale
        self.sums = _zero_sums(scale.device)
        if self.weight_pass is not None:
            self.weight_pass.begin()

    def forward(self, received: Tensor | None = None) -> Tensor:
        """[b, S, D] -> [b, S, D] for the next microbatch; the last stage gives `scale` * loss, adds (cross-entropy, z-loss) to `sums`."""
        out = self._forward_step(self.part, received, next(self._microbatches))
        if isinstance(out, Tensor):
            return out
        assert self._scale is not None
        assert self.sums is not None
        for total, term in zip(self.sums, (out.cross_entropy, out.z_loss), strict=True):
            total += term.detach()
        return out.total * self._scale


class PipelineRunner:
    """Carries microbatches through the stages of this rank and its neighbours in `group`."""

    def __init__(
        self,
        stages: Mapping[int, StageModule],
        layout: Layout,
        group: dist.ProcessGroup,
        *,
        device: torch.device,
        activation: torch.dtype,
        d_model: int,
        sequence_split: int = 1,
    ) -> None:
        """Raises LayoutError where the layout alone cannot be; `parallel.pipeline.schedule.check_pipeline` checks the microbatches.

        Args:
            stages: those of this rank by their number, `stages_of_rank`.
            layout: its `pipeline`, `schedule` and `stages_per_rank` count here.
            group: the ranks of the axis `pipeline`, in order.
            device: where activations are.
            activation: the type that they are sent in, which is the one that the stages compute them in.
            d_model: D.
            sequence_split: ranks that share out the tokens of what is sent, under sequence parallelism.
        """
        check_stages_per_rank(layout)
        self._stages = stages
        self._layout = layout
        self._group = group
        self._device = device
        self._activation = activation
        self._d_model = d_model
        self._sequence_split = sequence_split
        self._built: tuple[tuple[int, int, int], PipelineScheduleSingle | PipelineScheduleMulti] | None = None

    def train(self, microbatches: Sequence[Microbatch], scale: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward passes of equally shaped microbatches: adds the gradients of `scale` times the summed loss.

        Returns the sums of cross-entropy and z-loss, without `scale`, fp64; zeros on ranks that do not hold the last stage.
        """
        shape = len(microbatches), *microbatches[0].input_ids.shape
        if (
            self._built is None or self._built[0] != shape
        ):  # only the last one is kept: each holds memory for its activations
            self._built = None
            self._built = shape, self._schedule(*shape)
        for stage in self._stages.values():
            stage.begin(microbatches, scale)
        self._built[1].step(target=torch.zeros(len(microbatches)), return_outputs=False)
        return self._sums()

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Forward passes of any number of microbatches: sum of the cross-entropy, fp64; zero without the last stage.

        Time goes in ticks, in each of which a rank computes what is due and then exchanges activations with its neighbours.
        """
        scale = torch.ones((), device=self._device)
        for stage in self._stages.values():
            stage.begin(microbatches, scale)
        due = self._due(len(microbatches))
        here: dict[tuple[int, int], Tensor] = {}  # what was received, by (stage, microbatch) that needs it
        for tick in range(-1, max(due) + 1):
            transfers: list[dist.P2POp] = []
            for i, microbatch in due.get(tick, ()):
                out = self._stages[i](*(() if i == 0 else (here.pop((i, microbatch)),)))
                if i + 1 in self._stages:
                    here[i + 1, microbatch] = out
                elif i + 1 < self._layout.n_stages:
                    transfers.append(self._transfer(dist.isend, out, i + 1))
            for i, microbatch in due.get(tick + 1, ()):
                if i > 0 and i - 1 not in self._stages:
                    here[i, microbatch] = self._activations(*microbatches[microbatch].input_ids.shape)
                    transfers.append(self._transfer(dist.irecv, here[i, microbatch], i - 1))
            for work in dist.batch_isend_irecv(transfers) if transfers else ():
                work.wait()
        return self._sums()[0]

    def _due(self, n_microbatches: int) -> dict[int, list[tuple[int, int]]]:
        """The (stage, microbatch) that this rank is to compute in each tick, one tick after the stage before computes it.

        Looped ranks take the microbatches in rounds of p, so that no two are due at once; the ranks of a V do two while it is full.
        """
        p, held = self._layout.pipeline, self._layout.stages_per_rank
        due: dict[int, list[tuple[int, int]]] = {}
        for microbatch in range(n_microbatches):
            delay = 0 if self._layout.schedule == "zbv" else microbatch // p * p * (held - 1)
            for i in self._stages:
                due.setdefault(microbatch + delay + i, []).append((i, microbatch))
        return due

    def _schedule(self, n_microbatches: int, b: int, S: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Given all shapes, torch need not run the model to learn them."""
        activation = self._activations(b, S, device="meta").requires_grad_()
        loss = torch.empty((), device="meta", requires_grad=True)
        n = self._layout.n_stages
        stages = [
            _Neighbour(
                stage,
                i,
                n,
                self._device,
                input_args=() if i == 0 else (activation,),
                output_args=(loss if i == n - 1 else activation,),
                group=self._group,
                dw_builder=None if stage.weight_pass is None else partial(stage.weight_pass.take, stage),
            )
            for i, stage in self._stages.items()
        ]
        if self._layout.schedule in SINGLE:
            (stage,) = stages
            return SINGLE[self._layout.schedule](stage, n_microbatches, loss_fn=_loss, scale_grads=False)
        return MULTI[self._layout.schedule](list(stages), n_microbatches, loss_fn=_loss, scale_grads=False)

    def _activations(self, b: int, S: int, device: torch.device | str | None = None) -> Tensor:
        return torch.empty(
            b, S // self._sequence_split, self._d_model, dtype=self._activation, device=device or self._device
        )

    def _transfer(
        self, direction: Any, activation: Tensor, peer_stage: int
    ) -> dist.P2POp:  # Any: P2POp compares functions by identity
        return dist.P2POp(direction, activation, group=self._group, group_peer=rank_of_stage(peer_stage, self._layout))

    def _sums(self) -> tuple[Tensor, Tensor]:
        last = self._stages.get(self._layout.n_stages - 1)
        return _zero_sums(self._device) if last is None or last.sums is None else last.sums


def _zero_sums(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of (cross-entropy, z-loss), fp64: a step may have thousands of microbatches."""
    return torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.float64, device=device)


class _Neighbour(PipelineStage):
    """Torch 2.11 greets the neighbours of a stage before the first step, itself among them at the turn of a V, which gloo cannot.

    There is no public way to leave that out; later releases do not call this.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.peer != dist.get_rank()]


def _loss(out: Tensor, _: Tensor) -> Tensor:
    return out


@dataclass(frozen=True)
class TiedEmbedding:
    """The embedding and the output projection as one parameter, of which the first and the last stage hold a copy each."""

    name: str
    copies: Sequence[nn.Module]
    """The parts on this rank that hold it: none, one, or both."""
    group: dist.ProcessGroup
    is_first: bool
    peer: int | None
    """Rank in `group` that holds the other copy; None if it is this one."""

    @classmethod
    def of(cls, parts: Mapping[int, nn.Module], layout: Layout, mesh: DeviceMesh) -> TiedEmbedding | None:
        """What this rank has to do with the parameter that the `parts` of the model, by stage, say is tied; None if they say none is."""
        name = cast(str | None, next(iter(parts.values())).tied_parameter)
        if name is None:
            return None
        first, last = 0, layout.n_stages - 1
        copies = [parts[stage] for stage in (first, last) if stage in parts]
        ends = {rank_of_stage(first, layout), rank_of_stage(last, layout)}
        group = mesh["pipeline"].get_group()
        others = ends - {dist.get_rank(group)}
        return cls(name, copies, group, first in parts, others.pop() if others else None)

    def n_copies(self, name: str) -> int:
        """How many ranks of the pipeline step a parameter of that name."""
        return 1 if name != self.name or self.peer is None else 2

    def sum_gradients(self) -> None:
        """After the backward pass: give both copies the gradient of the one parameter that they are.

        Where one rank holds both, the first alone gets it and the second none: the second is to be copied from the first.
        """
        match [part.get_parameter(self.name) for part in self.copies]:
            case [parameter]:
                self._exchange(_gradient(parameter))
            case [first, last]:
                _gradient(first).add_(_gradient(last))
                last.grad = None

    def _exchange(self, gradient: Tensor) -> None:
        """Sum it with the peer's: there and back, so that no process group is needed besides the pipeline's, and both get the same bits."""
        assert self.peer is not None
        if self.is_first:
            dist.send(gradient, group=self.group, group_dst=self.peer)
            dist.recv(gradient, group=self.group, group_src=self.peer)
        else:
            theirs = torch.empty_like(gradient)
            dist.recv(theirs, group=self.group, group_src=self.peer)
            dist.send(gradient.add_(theirs), group=self.group, group_dst=self.peer)


@torch.no_grad()
def _gradient(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of it, to be changed in place."""
    assert parameter.grad is not None, "every step trains the embedding"
    return local(parameter.grad)


def schedule_actions(layout: Layout, n_microbatches: int) -> dict[int, list[Action]]:
    """What each rank of the pipeline does, in its order."""
    p = layout.pipeline
    if layout.schedule in SINGLE:
        ahead = {
            rank: n_microbatches if layout.schedule == "gpipe" else min(n_microbatches, p - rank) for rank in range(p)
        }
        return {rank: _one_stage(rank, n_microbatches, ahead[rank]) for rank in range(p)}
    # Torch makes the order of all ranks when a schedule is made, for which three numbers of a stage are enough; it has no function for it.
    shape = SimpleNamespace(num_stages=layout.n_stages, group_size=p, group_rank=0, submod=None)
    stages: list[Any] = [shape] * layout.stages_per_rank  # Any: not a stage, see above
    actions = MULTI[layout.schedule](stages, n_microbatches).pipeline_order
    return {
        rank: [
            Action(_KINDS[a.computation_type.name], a.stage_index, a.microbatch_index or 0) for a in actions[rank] if a
        ]
        for rank in range(p)
    }


_KINDS: dict[str, Kind] = {
    "FORWARD": "forward",
    "FULL_BACKWARD": "backward",
    "BACKWARD_INPUT": "input",
    "BACKWARD_WEIGHT": "weight",
}


def _one_stage(stage: int, n_microbatches: int, ahead: int) -> list[Action]:
    """`ahead` forward passes, then a backward and a forward pass in turn, then the backward passes that are left."""
    forward = [Action("forward", stage, i) for i in range(n_microbatches)]
    backward = [Action("backward", stage, i) for i in range(n_microbatches)]
    turns = [action for pair in zip(backward, forward[ahead:], strict=False) for action in pair]
    return forward[:ahead] + turns + backward[n_microbatches - ahead :]


def layout_bubble_fraction(layout: Layout, n_microbatches: int, costs: Sequence[float] | None = None) -> float:
    """Which part of a step the average rank waits, if a backward pass takes twice a forward pass and sending takes no time.

    `costs` of the stages; None is equal ones. Then p ranks with m microbatches wait (p - 1) / (m + p - 1) of a step under GPipe and 1F1B,
    and (p - 1) / (v m + p - 1) with v interleaved stages each (arXiv:2104.04473, section 2.2, which divides by the work alone).
    """
    return bubble_fraction(schedule_actions(layout, n_microbatches), costs or [1.0] * layout.n_stages)


def describe_pipeline(
    layout: Layout, n_layers: int, n_microbatches: int, *, first_cost: float, last_cost: float
) -> str:
    """One line for the start of a run.

    `4 stages of 3+3+3+2 layers on 4 ranks, 1f1b, 16 microbatches a step: ranks wait 18% of it`
    """
    counts = [
        len(layers) for layers in assign_layers(n_layers, layout.n_stages, first_cost=first_cost, last_cost=last_cost)
    ]
    waited = layout_bubble_fraction(
        layout, n_microbatches, stage_costs(counts, first_cost=first_cost, last_cost=last_cost)
    )
    return (
        f"{layout.n_stages} stages of {'+'.join(map(str, counts))} layers on {layout.pipeline} ranks, {layout.schedule}, "
        f"{n_microbatches} microbatches a step: ranks wait {waited:.0%} of it"
    )
