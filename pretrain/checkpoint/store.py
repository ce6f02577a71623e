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
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from data_pipeline.durable import sync_folder
from pretrain.checkpoint.directory import checkpoint_path, partial_path
from pretrain.checkpoint.files import HashingFileSystem
from pretrain.checkpoint.record import FileSum, Manifest, Record, check_file, verify, write_manifest
from pretrain.errors import UserError

StateDict: TypeAlias = "Mapping[str, Tensor | StateDict]"
"""Tensors by name, nested: {"model": {name: tensor}, "optimizer": {name: {slot: tensor}}}. A tied parameter appears once."""

_METADATA = ".metadata"


def save(directory: Path, state: StateDict, record: Record) -> Path:
    """Write `state` and `record` as the checkpoint of `record.step` in `directory`, and return its path.

    The tensors may be on any device and are read in place: they must not change until this returns. A checkpoint of the same step
    that is whole is never replaced (UserError: another process writes there too); one that is damaged makes way. Raises OSError where
    the disk is full or not writable, and leaves nothing behind then.
    """
    target = checkpoint_path(directory, record.step)
    generation = uuid.uuid4().hex
    partial = partial_path(directory, record.step, generation[:8])
    try:
        if target.exists():
            _make_way(target, partial.with_name(f"{partial.name}-replaced"))
        partial.mkdir(parents=True)
        files = _write_tensors(partial, state)
        what = {name: getattr(record, name) for name in Record.model_fields}
        write_manifest(partial, Manifest(**what, generation=generation, files=files))
        sync_folder(partial)
        partial.rename(target)  # fails where `target` is there by now, as it is a folder that is not empty
        sync_folder(directory)
        sync_folder(directory.parent)
    except OSError as error:
        if target.exists():
            raise UserError(_two_writers(target)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def load(path: Path, state: StateDict) -> None:
    """Fill the tensors of `state`, in place, from the checkpoint at `path`.

    Top-level sections that `state` does not have ("optimizer", to generate text) stay unread. In those that it has, every name, shape
    and dtype must be equal on both sides; otherwise a UserError names the differences, and no tensor was touched. Only `.metadata` is
    hashed here: `record.verify` the checkpoint before, as `directory.newest` does.
    """
    check_file(path, _METADATA)
    reader = FileSystemReader(path)
    saved = {
        key: (entry.size, entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.split(".", 1)[0] in state
    }
    differences = _differences(saved, {key: (tensor.shape, tensor.dtype) for key, tensor in _flat(state).items()})
    if differences:
        raise UserError(
            f"{path} does not fit this run: {'; '.join(differences)}. "
            "Continue with the config it was saved with, or start in another run.dir"
        )
    with _plain_errors():
        dcp_load(dict(state), storage_reader=reader, no_dist=True)


def _write_tensors(folder: Path, state: StateDict) -> dict[str, FileSum]:
    """One file a rank, by DCP. One thread: DCP loses errors of its other writing threads."""
    _refuse_shared_memory(_flat(state))
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=False, thread_count=1, overwrite=False)
    file_system = HashingFileSystem()
    writer.fs = file_system
    with _plain_errors():
        dcp_save(dict(state), storage_writer=writer, no_dist=True)
    return file_system.sums


def _make_way(target: Path, aside: Path) -> None:
    """Move a damaged checkpoint to a name that is not read and that `directory.retain` deletes."""
    if not verify(target):
        raise UserError(_two_writers(target))
    target.rename(aside)


def _two_writers(target: Path) -> str:
    return f"{target} exists already and stays: another process writes into this run directory; stop it, or set another run.dir"


def _refuse_shared_memory(tensors: Mapping[str, Tensor]) -> None:
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        pointer = tensor.data_ptr()
        if pointer and tensor.numel() and names.setdefault(pointer, name) != name:
            raise ValueError(f"{names[pointer]} and {name} are one tensor: a tied parameter is saved once, under one name")


def _flat(state: StateDict, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by the names that DCP gives them: the keys on the way, joined by dots."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            raise TypeError(f"{prefix}{key} is a {type(value).__name__}; a checkpoint holds tensors, everything else belongs in its record")
    return flat


_Kind: TypeAlias = "tuple[torch.Size, torch.dtype] | None"


def _differences(saved: Mapping[str, _Kind], here: Mapping[str, _Kind]) -> list[str]:
    only_saved = sorted(saved.keys() - here.keys())
    only_here = sorted(here.keys() - saved.keys())
    changed = [
        f"{key} is {_kind_text(saved[key])} there and {_kind_text(here[key])} here"
        for key in sorted(saved.keys() & here.keys())
        if saved[key] != here[key]
    ]
    parts = (("only in the checkpoint", only_saved), ("only in the run", only_here), ("of another shape or dtype", changed))
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
            raise _disk_error_behind(first) or first from error


def _disk_error_behind(error: BaseException | None) -> OSError | None:
    """torch.save answers a failed write with an error of its own about file positions; what the disk said is in that one's context."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__context__
    return None
