"""Which parameters the optimizer treats alike: the groups that an architecture's spec puts them into, by canonical name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from pretrain.model.spec import ArchitectureSpec, OptimizerGroup


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are treated alike."""

    spec: OptimizerGroup
    parameters: dict[str, Tensor]
    """By canonical name, in the order in which they were given."""


def group_parameters(
    named_parameters: Iterable[tuple[str, Tensor]], architecture: ArchitectureSpec
) -> list[ParameterGroup]:
    """The groups that have members; every parameter is in exactly one.

    Raises UserError for a parameter that the architecture has no row for: a new kind of parameter needs a decision, not a default.
    """
    members: dict[OptimizerGroup, dict[str, Tensor]] = {}
    for name, parameter in named_parameters:
        _, spec = architecture.find(name)
        members.setdefault(spec.group, {})[name] = parameter
    return [ParameterGroup(group, parameters) for group, parameters in members.items()]
