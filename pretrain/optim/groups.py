"""Parameter groups, as the architecture's spec assigns them by canonical name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from pretrain.model.spec import ArchitectureSpec, OptimizerGroup


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimizer treats alike."""

    spec: OptimizerGroup
    parameters: dict[str, Tensor]
    """{canonical name: parameter}, in the order in which they were given."""


def group_parameters(
    named_parameters: Iterable[tuple[str, Tensor]], architecture: ArchitectureSpec
) -> list[ParameterGroup]:
    """Group the parameters. Each is in exactly one group, and no group is empty.

    Raises:
        UserError: the architecture's table has no row for a parameter. A new kind needs a decision, not a default.
    """
    members: dict[OptimizerGroup, dict[str, Tensor]] = {}
    for name, parameter in named_parameters:
        _, spec = architecture.find(name)
        members.setdefault(spec.group, {})[name] = parameter
    return [ParameterGroup(group, parameters) for group, parameters in members.items()]
