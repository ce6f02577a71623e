"""The parameters of a model: names and shapes as the architecture builds them, and how tensor parallelism splits each. No torch here:
the architecture is imported when it is asked, and builds its layers without memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from parallel.layout import Layout
from parallel.tensor_styles import SHARD_DIM, shard_dim
from pretrain.config import ModelConfig
from pretrain.errors import UserError
from pretrain.model.spec import ParameterSpec, architecture_of, layer_of


@dataclass(frozen=True)
class ModelParameter:
    """A parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    spec: ParameterSpec
    style: str
    """How tensor parallelism splits its module; see `parallel.tensor_styles`."""
    tensor_dim: int | None = None
    """The dimension that tensor ranks share out; None leaves it whole."""

    @property
    def layer(self) -> int | None:
        """Number of its layer; None at the ends of the model."""
        return layer_of(self.name)

    def local_shape(self, layout: Layout) -> tuple[int, ...]:
        """What a tensor rank computes with."""
        return tuple(size // layout.tensor if i == self.tensor_dim else size for i, size in enumerate(self.shape))

    def elements(self, layout: Layout, fsdp_rank: int | None = None) -> int:
        """Of a tensor rank's part; with an fsdp rank, of what that one keeps: rows are cut into equal chunks, rounded up (FSDP2)."""
        rows, *rest = self.local_shape(layout)
        if fsdp_rank is not None:
            chunk = -(-rows // layout.fsdp)
            rows = min(chunk, max(0, rows - fsdp_rank * chunk))
        return rows * math.prod(rest)


@lru_cache(maxsize=4096)
def model_parameters(config: ModelConfig, layers: range, tensor: int = 1) -> tuple[ModelParameter, ...]:
    """The parameters of these layers, and of the ends of the model that go with them; `vocab_size` must be resolved.

    Args:
        config: of the whole model.
        layers: consecutive ones; `range(config.n_layers)` is the whole model.
        tensor: ranks that tensor parallelism splits them over.

    Raises:
        UserError: the table of the architecture has no row for a parameter, or names a style that there is not.
    """
    found = (parameter for layer in layers for parameter in _layer_parameters(config, layer, tensor))
    return tuple({parameter.name: parameter for parameter in found}.values())  # a tied embedding goes with both ends


def check_architecture(config: ModelConfig) -> None:
    """Refuse, before anything is built, an architecture that is not there or whose table does not describe all that it builds.

    Raises:
        UserError: in one line, with the module and the row to change.
    """
    model_parameters(config, range(config.n_layers))


@lru_cache(maxsize=4096)
def _layer_parameters(config: ModelConfig, layer: int, tensor: int) -> tuple[ModelParameter, ...]:
    """Of one layer: many layouts are compared, whose stages begin and end at any layer."""
    architecture = architecture_of(config)
    found = []
    for name, shape in architecture.model.parameter_shapes(config, range(layer, layer + 1)).items():
        style, spec = architecture.find(name)
        if style not in SHARD_DIM:
            raise UserError(
                f"{architecture.source}: SPEC.modules gives {name} the tensor-parallel style {style!r}; "
                f"there are {', '.join(SHARD_DIM)}"
            )
        found.append(
            ModelParameter(name, shape, spec, style, shard_dim(style, tensor=tensor, kv_heads=config.n_kv_heads))
        )
    return tuple(found)
