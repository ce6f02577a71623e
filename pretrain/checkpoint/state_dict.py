"""Nested dicts of tensors, as torch.distributed.checkpoint (DCP) saves and loads them."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

StateDict: TypeAlias = "Mapping[str, Tensor | StateDict]"
"""Tensors by name, nested: {"model": {name: tensor}, "optimizer": {name: {slot: tensor}}}. A tied parameter appears
once."""


def flatten_state_dict(state: StateDict, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors by their names in DCP: the keys on the path, joined by dots.

    TypeError for a value of another type.
    """
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            flat.update(flatten_state_dict(value, f"{prefix}{key}."))
        else:
            raise TypeError(
                f"{prefix}{key} is a {type(value).__name__}; a checkpoint holds tensors, everything else belongs in "
                "its manifest"
            )
    return flat


@contextmanager
def unwrap_dcp_errors() -> Generator[None, None, None]:
    """Raise the error that DCP wraps into a BaseException of its own, and hide its warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise first from error
