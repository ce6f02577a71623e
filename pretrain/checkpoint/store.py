"""Tensors to a checkpoint and back, through torch.distributed.checkpoint (DCP).

A save is written to a folder of its own, brought to the disk, and committed by one rename: whenever the process dies, a checkpoint is
there whole or not at all. A load compares names, shapes and dtypes before it writes into any tensor.
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from data_pipeline.atomic import sync_folder
from pretrain.checkpoint.directory import checkpoint_path, partial_path, set_aside
from pretrain.checkpoint.files import HashingFileSystem
from pretrain.checkpoint.ranks import gather, is_first, on_first, together
from pretrain.checkpoint.record import FileSum, Manifest, Record, check_file, verify, write_manifest
from pretrain.errors import UserError

StateDict: TypeAlias = "Mapping[str, Tensor | StateDict]"
"""Tensors by name, nested: {"model": {name: tensor}, "optimizer": {name: {slot: tensor}}}. A tied parameter appears once."""

_METADATA = ".metadata"


def save(directory: Path, state: StateDict, record: Record, group: ProcessGroup | None = None) -> Path:
    """Write `state` and `record` as the checkpoint of `record.step` in `directory`, and return its path.

    Every rank of `group` calls it with what it holds: DTensors, or tensors that are the same on all ranks that have them. `directory` is
    on a file system that all of them see; the record is that of the first rank. None is this process alone.

    The tensors may be on any device and are read in place: they must not change until this returns. A checkpoint of the same step
    that is whole is never replaced (UserError: another process writes there too); one that is damaged makes way. Raises OSError where
    the disk is full or not writable, and leaves nothing behind then. An error of one rank is raised on all.
    """
    target = checkpoint_path(directory, record.step)
    together(group, lambda: _refuse_shared_memory(_flat(state)))
    generation = on_first(group, lambda: uuid.uuid4().hex)
    partial = partial_path(directory, record.step, generation[:8])
    try:
        on_first(group, lambda: _make_room(target, partial))
        sums = gather(_write_tensors(partial, state, group), group)
        files = {name: file_sum for of_rank in sums for name, file_sum in of_rank.items()}
        what = {name: getattr(record, name) for name in Record.model_fields}
        on_first(group, lambda: _commit(partial, target, Manifest(**what, generation=generation, files=files)))
    finally:
        if is_first(group):
            shutil.rmtree(partial, ignore_errors=True)
    return target


def load(path: Path, state: StateDict, group: ProcessGroup | None = None) -> None:
    """Fill the tensors of `state`, in place, from the checkpoint at `path`.

    Every rank of `group` calls it with what it holds, on whatever layout; each reads for itself what it needs. None is this process
    alone.

    Top-level sections that `state` does not have ("optimizer", to generate text) stay unread. In those that it has, every name, shape
    and dtype must be equal on both sides, where the ranks together are one side; otherwise a UserError on every rank names the
    differences, and no tensor was touched. Only `.metadata` is hashed here: `record.verify` the checkpoint before, as
    `directory.newest` does.
    """
    saved, here = together(group, lambda: (_saved(path, state), _kinds(state)))
    differences = _differences(saved, here, group)
    if differences:
        raise UserError(
            f"{path} does not fit this run: {'; '.join(differences)}. "
            "Continue with the config it was saved with, or start in another run.dir"
        )
    together(group, lambda: _read_tensors(path, state))


def _make_room(target: Path, partial: Path) -> None:
    """Make the folder to write into. A damaged checkpoint of the same step gets a name that is not read."""
    if target.exists():
        if not verify(target):
            raise UserError(_two_writers(target))
        set_aside(target)
    partial.mkdir(parents=True)


def _commit(partial: Path, target: Path, manifest: Manifest) -> None:
    """Turn what was written into a checkpoint."""
    missing = [name for name in manifest.files if not (partial / name).is_file()]
    if missing:
        raise UserError(
            f"{partial / missing[0]} was written by another rank and is not here: run.dir must be a folder that all ranks share"
        )
    try:
        write_manifest(partial, manifest)
        sync_folder(partial)
        partial.rename(target)  # fails where `target` is there by now, as it is a folder that is not empty
        sync_folder(target.parent)
        sync_folder(target.parent.parent)
    except OSError as error:
        if target.exists():
            raise UserError(_two_writers(target)) from error
        raise


def _write_tensors(folder: Path, state: StateDict, group: ProcessGroup | None) -> dict[str, FileSum]:
    """One file a rank, by DCP; returns the sums of those that this rank wrote. An error of one rank is raised on all.

    One thread: DCP loses errors of its other writing threads.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=False, thread_count=1, overwrite=False)
    file_system = HashingFileSystem()
    writer.fs = file_system
    with _plain_errors():
        dcp_save(dict(state), storage_writer=writer, process_group=group, no_dist=group is None)
    return file_system.sums


def _read_tensors(path: Path, state: StateDict) -> None:
    """Reading needs no plan in common: each rank knows what it holds, and `.metadata` where that lies."""
    with _plain_errors():
        dcp_load(dict(state), storage_reader=FileSystemReader(path), no_dist=True)


def _two_writers(target: Path) -> str:
    return f"{target} exists already and stays: another process writes into this run directory; stop it, or set another run.dir"


def _refuse_shared_memory(tensors: Mapping[str, Tensor]) -> None:
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        pointer = local.data_ptr()
        if pointer and local.numel() and names.setdefault(pointer, name) != name:
            raise ValueError(
                f"{names[pointer]} and {name} are one tensor: a tied parameter is saved once, under one name"
            )


def _flat(state: StateDict, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by the names that DCP gives them: the keys on the way, joined by dots."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            raise TypeError(
                f"{prefix}{key} is a {type(value).__name__}; a checkpoint holds tensors, everything else belongs in its record"
            )
    return flat


_Kind: TypeAlias = "tuple[torch.Size, torch.dtype] | None"


def _kinds(state: StateDict) -> dict[str, _Kind]:
    """Global shape and dtype of what is here."""
    return {key: (tensor.shape, tensor.dtype) for key, tensor in _flat(state).items()}


def _saved(path: Path, state: StateDict) -> dict[str, _Kind]:
    """The same of what the checkpoint has in the sections of `state`. `.metadata` is a pickle: it is hashed before it is read."""
    check_file(path, _METADATA)
    return {
        key: (entry.size, entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if key.split(".", 1)[0] in state
    }


def _differences(saved: Mapping[str, _Kind], here: Mapping[str, _Kind], group: ProcessGroup | None) -> list[str]:
    """How the checkpoint and what all ranks have together differ, in words.

    A rank passes on what differs, which is nothing as a rule, and one bit for each saved tensor that it has: names of thousands of ranks
    would be many.
    """
    names = sorted(saved)
    bits = sum(1 << number for number, name in enumerate(names) if name in here)
    other = {key: kind for key, kind in here.items() if key not in saved or saved[key] != kind}
    reports = gather((bits, other), group)
    found = reduce(or_, (bits for bits, _ in reports))
    others = {key: kind for _, other in reports for key, kind in other.items()}
    only_saved = [name for number, name in enumerate(names) if not found >> number & 1]
    only_here = sorted(others.keys() - saved.keys())
    changed = [
        f"{key} is {_kind_text(saved[key])} there and {_kind_text(others[key])} here"
        for key in sorted(others.keys() & saved.keys())
    ]
    parts = (
        ("only in the checkpoint", only_saved),
        ("only in the run", only_here),
        ("of another shape or dtype", changed),
    )
    return [
        f"{len(found)} tensor{'s' * (len(found) > 1)} {what} ({', '.join(found[:2])}{', ...' * (len(found) > 2)})"
        for what, found in parts
        if found
    ]


def _kind_text(kind: _Kind) -> str:
    return f"{str(kind[1]).removeprefix('torch.')}{list(kind[0])}" if kind else "no tensor"


@contextmanager
def _plain_errors() -> Generator[None, None, None]:
    """DCP wraps every error into a BaseException of its own, and warns that there is one process: raise the error, drop the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise first from error
