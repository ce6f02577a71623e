"""The model as one rank holds it: what differs between one process and a mesh of ranks, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel import context
from parallel.engine import Microbatch, RoutedLayer
from parallel.fsdp import FSDPRoot
from parallel.layout import Layout
from parallel.local import to_local
from parallel.master_weights import split_master_weights
from parallel.pipeline.tied_embedding import TiedEmbedding
from parallel.torch_compat import foreach_copy_


class RankModel(Protocol):
    """The chunks of the model on this rank, and what an engine does to them around its passes."""

    @property
    def chunks(self) -> Sequence[nn.Module]:
        """In order of their pipeline stage."""

    @property
    def master_weights(self) -> dict[str, nn.Parameter]:
        """The fp32 weights that the optimizer updates, by canonical name."""

    @property
    def routed_layers(self) -> Sequence[RoutedLayer]:
        """The routers of this rank."""

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """What checkpoints hold beside the master weights, by canonical name. The same on all ranks that have it."""

    def shard_microbatch(self, microbatch: Microbatch) -> Microbatch:
        """The part of a microbatch that this rank computes."""

    def n_stages_with(self, name: str) -> int:
        """Number of pipeline ranks that hold the parameter of that name."""

    def finish_gradients(self) -> None:
        """Complete the gradients after the last backward pass of a step."""

    def sync_compute_weights(self) -> None:
        """Copy the master weights to the weights that the passes compute with."""

    def reshard(self) -> None:
        """Free the parameters that a forward pass has gathered, if no backward pass follows."""


def _routed_layers(chunks: Sequence[nn.Module]) -> tuple[list[RoutedLayer], dict[str, Tensor]]:
    """The routers of the chunks, and their buffers that checkpoints hold."""
    routed = {
        name: module for part in chunks for name, module in part.named_modules() if isinstance(module, RoutedLayer)
    }
    buffers = {f"{name}.{key}": x for name, layer in routed.items() for key, x in layer.saved_buffers.items()}
    return list(routed.values()), buffers


class UnshardedModel:
    """`RankModel` of one process: one chunk is the full model, and nothing is sharded."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Turn the parameters of `model` into compute weights of `dtype`."""
        self.chunks = [model]
        self.routed_layers, self.buffers = _routed_layers(self.chunks)
        self.master_weights = split_master_weights(model, dtype)
        # In fp32 the master weights are the compute weights.
        self._compute_weights = [] if dtype == torch.float32 else list(model.parameters())

    def shard_microbatch(self, microbatch: Microbatch) -> Microbatch:
        """See `RankModel`."""
        return microbatch

    def n_stages_with(self, name: str) -> int:
        """See `RankModel`."""
        return 1

    def finish_gradients(self) -> None:
        """See `RankModel`."""

    def sync_compute_weights(self) -> None:
        """See `RankModel`."""
        if self._compute_weights:
            foreach_copy_(self._compute_weights, list(self.master_weights.values()))

    def reshard(self) -> None:
        """See `RankModel`."""


class ShardedModel:
    """`RankModel` of a mesh of any size. FSDP2 holds the master weights and gathers them in the compute dtype."""

    def __init__(
        self,
        chunks: Mapping[int, nn.Module],
        fsdp_roots: Sequence[FSDPRoot],
        mesh: DeviceMesh,
        layout: Layout,
        context_rank: int,
    ) -> None:
        """The model of chunks that have their values.

        Args:
            chunks: by pipeline stage.
            fsdp_roots: of all chunks.
            mesh: of `parallel.mesh.build_mesh`.
            layout: of the mesh.
            context_rank: this rank's place on the axis `context`.
        """
        self.chunks = list(chunks.values())
        self.routed_layers, self.buffers = _routed_layers(self.chunks)
        self._fsdp_roots = fsdp_roots
        self._layout = layout
        self._context_rank = context_rank
        self._tied = TiedEmbedding.of(chunks, layout, mesh) if layout.pipeline > 1 else None
        self.master_weights: dict[str, nn.Parameter] = {}
        # Two chunks on one rank may hold copies of one tied parameter: the second follows the first.
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                if name in self.master_weights:
                    self._copies.append((self.master_weights[name], parameter))
                else:
                    self.master_weights[name] = parameter

    def shard_microbatch(self, microbatch: Microbatch) -> Microbatch:
        """See `RankModel`."""
        if self._layout.context == 1:
            return microbatch
        seq_len = microbatch.input_ids.shape[1]
        return context.shard_sequence(microbatch, context.local_tokens(seq_len, self._layout, self._context_rank))

    def n_stages_with(self, name: str) -> int:
        """See `RankModel`."""
        return 1 if self._tied is None else self._tied.n_stages_with(name)

    def finish_gradients(self) -> None:
        """See `RankModel`."""
        if self._tied is not None:
            self._tied.sum_gradients()

    def sync_compute_weights(self) -> None:
        """See `RankModel`. FSDP2 casts the master weights when it gathers them, so gathered ones are dropped."""
        for master, copy in self._copies:
            to_local(copy).copy_(to_local(master))
        self.reshard()

    def reshard(self) -> None:
        """See `RankModel`."""
        for root in self._fsdp_roots:
            root.reshard()
