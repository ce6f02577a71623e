"""Save tensors as a checkpoint through torch.distributed.checkpoint (DCP).

A save writes into its own folder, syncs it to the disk, and commits it by one rename: whenever the process dies, the
checkpoint exists completely or not at all.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from data_pipeline.atomic import sync_folder
from pretrain.checkpoint.directory import checkpoint_path, mark_damaged, partial_path
from pretrain.checkpoint.hashing_file_system import HashingFileSystem
from pretrain.checkpoint.manifest import FileChecksum, Manifest, TrainState, write_manifest
from pretrain.checkpoint.object_collectives import all_gather_object, is_rank_zero, on_rank_zero, run_on_all
from pretrain.checkpoint.state_dict import StateDict, flatten_state_dict, unwrap_dcp_errors
from pretrain.checkpoint.verify import verify_checkpoint
from pretrain.errors import UserError


def save_checkpoint(
    directory: Path,
    state: StateDict,
    train_state: TrainState,
    group: ProcessGroup | None = None,
    *,
    file_per_tensor: bool = False,
) -> Path:
    """Write the checkpoint of `train_state.step` into `directory` and return its path. Every rank of `group` calls it.

    Args:
        directory: the `checkpoints/` folder, on a file system that all ranks share.
        state: this rank's tensors: DTensors, or tensors that are equal on all ranks that have them. They may be on any
            device and are read in place: they must not change until this returns.
        train_state: that of rank 0 is saved.
        group: None is a single process.
        file_per_tensor: write a file for each tensor instead of one for each rank. DCP holds what it writes until a
            file is complete, so this needs memory for two tensors only if `state` has `streaming.LazyTensor`s.

    Raises:
        UserError: a valid checkpoint of this step exists: another process writes there too. A damaged one is replaced.
        OSError: the disk is full or not writable. Nothing is left behind.

    An error of one rank is raised on all.
    """
    target = checkpoint_path(directory, train_state.step)
    run_on_all(group, lambda: _refuse_shared_memory(flatten_state_dict(state)))
    generation = on_rank_zero(group, lambda: uuid.uuid4().hex)
    partial = partial_path(directory, train_state.step, generation[:8])
    try:
        on_rank_zero(group, lambda: _make_partial_folder(target, partial))
        checksums = all_gather_object(_write_tensors(partial, state, group, file_per_tensor), group)
        files = {name: checksum for of_rank in checksums for name, checksum in of_rank.items()}
        fields = {name: getattr(train_state, name) for name in TrainState.model_fields}
        on_rank_zero(group, lambda: _commit(partial, target, Manifest(**fields, generation=generation, files=files)))
    finally:
        if is_rank_zero(group):
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _make_partial_folder(target: Path, partial: Path) -> None:
    """Make the folder to write into. Rename a damaged checkpoint of the same step, so that nothing reads it."""
    if target.exists():
        if not verify_checkpoint(target):
            raise UserError(_two_writers(target))
        mark_damaged(target)
    partial.mkdir(parents=True)


def _write_tensors(
    folder: Path, state: StateDict, group: ProcessGroup | None, file_per_tensor: bool
) -> dict[str, FileChecksum]:
    """Write the files of this rank and return their checksums. DCP raises an error of one rank on all.

    One thread: DCP loses the errors of additional writer threads.
    """
    writer = FileSystemWriter(
        folder, single_file_per_rank=not file_per_tensor, sync_files=False, thread_count=1, overwrite=False
    )
    file_system = HashingFileSystem()
    writer.fs = file_system
    with unwrap_dcp_errors():
        dcp_save(dict(state), storage_writer=writer, process_group=group, no_dist=group is None)
    return file_system.checksums


def _commit(partial: Path, target: Path, manifest: Manifest) -> None:
    """Turn the written folder into a checkpoint."""
    missing = [name for name in manifest.files if not (partial / name).is_file()]
    if missing:
        raise UserError(
            f"{partial / missing[0]} was written by another rank and is not visible here: "
            "run.dir must be a folder that all ranks share"
        )
    try:
        write_manifest(partial, manifest)
        sync_folder(partial)
        partial.rename(target)  # fails if `target` exists by now, because that folder is not empty
        sync_folder(target.parent)
        sync_folder(target.parent.parent)
    except OSError as error:
        if target.exists():
            raise UserError(_two_writers(target)) from error
        raise


def _two_writers(target: Path) -> str:
    return (
        f"{target} exists already and was kept: another process writes into this run directory; "
        "stop it, or set another run.dir"
    )


def _refuse_shared_memory(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if two tensors share memory."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        pointer = local.data_ptr()
        if pointer and local.numel() and names.setdefault(pointer, name) != name:
            raise ValueError(
                f"{names[pointer]} and {name} are the same tensor: save a tied parameter once, under one name"
            )
