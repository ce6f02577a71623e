"""Which parameter is treated how, by its canonical (Hugging Face) name and its number of dimensions.

| group      | members                              | weight decay | with `muon` |
|------------|--------------------------------------|--------------|-------------|
| matrices   | the matrices of `model.layers.*`     | yes          | Muon        |
| head       | `lm_head.weight`, where it is untied | yes          | AdamW       |
| embeddings | `model.embed_tokens.weight`          | no           | AdamW       |
| vectors    | norms and biases, anywhere           | no           | AdamW       |

A tied output projection is the embedding, appears under its name alone, and is not decayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

GroupName = Literal["matrices", "head", "embeddings", "vectors"]


@dataclass(frozen=True)
class Group:
    """Parameters that are treated alike."""

    name: GroupName
    decays: bool
    """Whether weight decay applies."""
    parameters: dict[str, Tensor]
    """By canonical name, in the order in which they were given."""


_DECAYS: dict[GroupName, bool] = {"matrices": True, "head": True, "embeddings": False, "vectors": False}


def group_parameters(named_parameters: Iterable[tuple[str, Tensor]]) -> list[Group]:
    """The non-empty groups, in the order of the table above; every parameter is in exactly one.

    Raises ValueError for a matrix that no row of the table names: a new kind of parameter needs a decision, not a default.
    """
    members: dict[GroupName, dict[str, Tensor]] = {name: {} for name in _DECAYS}
    for name, parameter in named_parameters:
        members[_group_of(name, parameter)][name] = parameter
    return [Group(group, _DECAYS[group], parameters) for group, parameters in members.items() if parameters]


def _group_of(name: str, parameter: Tensor) -> GroupName:
    if parameter.ndim < 2:
        return "vectors"
    if name.startswith("model.layers."):
        return "matrices"
    if name == "model.embed_tokens.weight":
        return "embeddings"
    if name == "lm_head.weight":
        return "head"
    raise ValueError(
        f"no parameter group for {name} of shape {list(parameter.shape)}: add it to the table in pretrain.optim.groups"
    )
