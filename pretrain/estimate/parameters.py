"""The parameters of a model: names and shapes, read from the layers that the architecture builds, and tensor shards.

This module does not import torch. The architecture is imported at run time, and builds its layers on the meta device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from parallel.layout import Layout
from parallel.tensor_styles import SHARD_DIM, shard_dim
from pretrain.config import ModelConfig
from pretrain.errors import UserError
from pretrain.model.spec import OptimizerGroup, ParameterSpec, architecture_of, layer_of


@dataclass(frozen=True)
class ModelParameter:
    """A parameter of the full model."""

    name: str
    shape: tuple[int, ...]
    spec: ParameterSpec
    style: str
    """How tensor parallelism splits its module; see `parallel.tensor_styles`."""
    tensor_dim: int | None = None
    """The dimension that tensor ranks divide. None: every rank has all of it."""

    @property
    def layer(self) -> int | None:
        """Number of its layer; None for the ends of the model."""
        return layer_of(self.name)

    @property
    def is_expert(self) -> bool:
        """Whether it is a stack of experts [E, ...]."""
        return self.style == "experts"

    def local_shape(self, layout: Layout) -> tuple[int, ...]:
        """Shape of what FSDP gathers: a tensor rank's shard, or all of a rank's experts."""
        if self.is_expert:
            return self.shape[0] // layout.expert, *self.shape[1:]
        return tuple(size // layout.tensor if i == self.tensor_dim else size for i, size in enumerate(self.shape))

    def elements(self, layout: Layout, rank: int | None = None) -> int:
        """Elements that FSDP gathers, or the part of them that `rank` stores: FSDP2 rounds chunks of rows up."""
        rows, *rest = self.local_shape(layout)
        if rank is None:
            return rows * math.prod(rest)
        n_ranks, place = layout.fsdp, layout.fsdp_rank(rank)
        if self.is_expert and layout.splits_experts:
            n_ranks, place = layout.expert_fsdp, layout.expert_fsdp_rank(rank)
            if any(size % n_ranks == 0 for size in rest):  # if experts do not divide, their matrices are cut
                return rows * math.prod(rest) // n_ranks
        chunk = -(-rows // n_ranks)
        return min(chunk, max(0, rows - place * chunk)) * math.prod(rest)


@lru_cache(maxsize=4096)
def model_parameters(config: ModelConfig, layers: range, tensor: int = 1) -> tuple[ModelParameter, ...]:
    """The parameters of consecutive layers. Those of the ends of the model come with the first and the last layer.

    Args:
        config: of the full model; `vocab_size` must be resolved.
        layers: `range(config.n_layers)` is the full model.
        tensor: number of tensor-parallel ranks.

    Raises:
        UserError: the architecture does not exist, its table has no row for a parameter, or names an unknown style.
    """
    found = (parameter for layer in layers for parameter in _layer_parameters(config, layer, tensor))
    return tuple({parameter.name: parameter for parameter in found}.values())  # a tied embedding comes with both ends


def check_architecture(config: ModelConfig) -> None:
    """Check that the architecture exists and that its table describes every parameter, before anything is built.

    Raises:
        UserError: in one line, with the module and the row to change.
    """
    model_parameters(config, range(config.n_layers))


@lru_cache(maxsize=4096)
def _layer_parameters(config: ModelConfig, layer: int, tensor: int) -> tuple[ModelParameter, ...]:
    """The parameters of one layer. Cached by layer, because stages of different layouts begin at different layers."""
    architecture = architecture_of(config)
    found = []
    for name, shape in architecture.model.parameter_shapes(config, range(layer, layer + 1)).items():
        style, spec = architecture.find(name)
        if style not in SHARD_DIM:
            raise UserError(
                f"{architecture.source}: SPEC.modules gives {name} the tensor-parallel style {style!r}; "
                f"known styles are {', '.join(SHARD_DIM)}"
            )
        if spec.initial.std is not None and len(shape) not in (2, 3):
            raise UserError(
                f"{architecture.source}: SPEC.modules gives {name}, of shape {list(shape)}, random initial values; "
                "only matrices and stacks of matrices have them: use ONES or ZEROS"
            )
        _check_group(f"{architecture.source}: SPEC.modules gives {name}, of shape {list(shape)}", shape, spec.group)
        found.append(
            ModelParameter(name, shape, spec, style, shard_dim(style, tensor=tensor, kv_heads=config.n_kv_heads))
        )
    return tuple(found)


def _check_group(row: str, shape: tuple[int, ...], group: OptimizerGroup) -> None:
    """Check that Muon finds the matrices that the optimizer group promises.

    Raises:
        UserError: it does not; the line begins with `row`.
    """
    if not group.muon:
        return
    if group.matrices_per_expert == 0 and len(shape) != 2:
        raise UserError(
            f"{row}, the optimizer group {group.name!r}, which Muon takes matrix by matrix; "
            "use a group with matrices_per_expert for stacked experts, or one without muon"
        )
    if group.matrices_per_expert and (len(shape) != 3 or shape[1] % group.matrices_per_expert):
        raise UserError(
            f"{row}, the optimizer group {group.name!r} with matrices_per_expert={group.matrices_per_expert}; "
            "its shape must be [experts, rows, columns], with rows divisible by that number"
        )
