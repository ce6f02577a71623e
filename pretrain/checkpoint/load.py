"""Load tensors from a checkpoint through torch.distributed.checkpoint (DCP).

Names, shapes and dtypes are compared before the first tensor is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TypeAlias

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from pretrain.checkpoint.object_collectives import all_gather_object, run_on_all
from pretrain.checkpoint.state_dict import StateDict, flatten_state_dict, unwrap_dcp_errors
from pretrain.checkpoint.verify import check_file
from pretrain.errors import UserError

TensorSpec: TypeAlias = "tuple[torch.Size, torch.dtype] | None"
"""Global shape and dtype; None for an entry of the checkpoint that is not a tensor."""

_METADATA = ".metadata"


def load_checkpoint(path: Path, state: StateDict, group: ProcessGroup | None = None) -> None:
    """Load the checkpoint at `path` into the tensors of `state`, in place.

    Every rank of `group` calls it with its own tensors, on any layout, and reads what it needs; None is a single
    process.

    Top-level sections that `state` lacks ("optimizer", to generate text) are not read. In the other sections, names,
    shapes and dtypes of the checkpoint and of all ranks together must be equal. Only `.metadata` is hashed here: verify
    the checkpoint first (`verify_checkpoint`, `latest_valid`).

    Raises:
        UserError: on every rank, if they differ. No tensor was changed.
    """
    saved, local = run_on_all(group, lambda: (_saved_specs(path, state), _local_specs(state)))
    differences = _differences(saved, local, group)
    if differences:
        raise UserError(
            f"{path} does not fit this run: {'; '.join(differences)}. "
            "Continue with the config it was saved with, or start in another run.dir"
        )
    run_on_all(group, lambda: _read_tensors(path, state))


def _read_tensors(path: Path, state: StateDict) -> None:
    """Each rank reads its own tensors from the offsets in `.metadata`: the ranks need no common plan."""
    with unwrap_dcp_errors():
        dcp_load(dict(state), storage_reader=FileSystemReader(path), no_dist=True)


def _local_specs(state: StateDict) -> dict[str, TensorSpec]:
    """Return the specs of this rank's tensors."""
    return {key: (tensor.shape, tensor.dtype) for key, tensor in flatten_state_dict(state).items()}


def _saved_specs(path: Path, state: StateDict) -> dict[str, TensorSpec]:
    """Return the specs of the checkpoint in the sections of `state`.

    `.metadata` is a pickle, so it is hashed before it is read.
    """
    check_file(path, _METADATA)
    return {
        key: (entry.size, entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if key.split(".", 1)[0] in state
    }


def _differences(
    saved: Mapping[str, TensorSpec], local: Mapping[str, TensorSpec], group: ProcessGroup | None
) -> list[str]:
    """Describe how the checkpoint differs from the tensors of all ranks together.

    Each rank sends one bit per saved tensor and only the specs that differ, usually none: sending all names would be
    large on thousands of ranks.
    """
    names = sorted(saved)
    local_bits = sum(1 << number for number, name in enumerate(names) if name in local)
    local_differing = {key: spec for key, spec in local.items() if key not in saved or saved[key] != spec}
    reports = all_gather_object((local_bits, local_differing), group)
    bits = reduce(or_, (of_rank for of_rank, _ in reports))
    differing = {key: spec for _, of_rank in reports for key, spec in of_rank.items()}
    only_saved = [name for number, name in enumerate(names) if not bits >> number & 1]
    only_in_run = sorted(differing.keys() - saved.keys())
    changed = [
        f"{key} is {_format_spec(saved[key])} in the checkpoint and {_format_spec(differing[key])} in the run"
        for key in sorted(differing.keys() & saved.keys())
    ]
    groups = (
        ("only in the checkpoint", only_saved),
        ("only in the run", only_in_run),
        ("of another shape or dtype", changed),
    )
    return [
        f"{len(found)} tensor{'s' * (len(found) > 1)} {what} ({', '.join(found[:2])}{', ...' * (len(found) > 2)})"
        for what, found in groups
        if found
    ]


def _format_spec(spec: TensorSpec) -> str:
    return f"{str(spec[1]).removeprefix('torch.')}{list(spec[0])}" if spec else "no tensor"
