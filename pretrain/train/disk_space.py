"""Check that the disk has space for the checkpoints of a run, and explain why one could not be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from data_pipeline.errors import StorageError
from parallel.layout import Layout
from pretrain.checked_json import MISSING_FILE_ERRORS
from pretrain.checkpoint.directory import committed_checkpoints, partial_path, unfinished_checkpoints
from pretrain.config import RunConfig
from pretrain.console import format_disk_size
from pretrain.errors import UserError
from pretrain.estimate.parameters import model_parameters
from pretrain.estimate.rank_memory import estimate_rank_memory

OVERHEAD_PER_PARAMETER = 4 * 2048
"""Bytes of a checkpoint per parameter in addition to its values: each of its four tensors (weight and optimizer
state) has a header, an entry in `.metadata` and padding. Measured: 2.0 KB per tensor."""


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the size of one checkpoint on any layout: fp32 weights, optimizer state and the overhead per tensor."""
    memory = estimate_rank_memory(config, Layout(), 0)
    n_parameters = len(model_parameters(config.model, range(config.model.n_layers)))
    return memory.master_bytes + memory.optimizer_bytes + OVERHEAD_PER_PARAMETER * n_parameters


def free_bytes(path: Path) -> int | None:
    """Return the free bytes on the file system of `path`, which need not exist yet; None if unknown. Ignores quotas."""
    for folder in (path.resolve(), *path.resolve().parents):
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize if found.f_blocks else None
    return None


def check_disk_space(config: RunConfig) -> str:
    """Check the disk space before a run starts or resumes. Return a warning if it is short, else an empty string.

    The run needs space for `checkpoint.keep` checkpoints, plus one until the oldest is deleted.

    Raises:
        UserError: not even one checkpoint fits.
    """
    checkpoints, keep = config.run.dir / "checkpoints", config.checkpoint.keep
    size, free = checkpoint_bytes(config), free_bytes(checkpoints)
    if free is None:
        return ""
    existing = committed_checkpoints(checkpoints)
    # These are deleted when the run starts.
    free += sum(_bytes_of(path) for path in (*existing[keep:], *unfinished_checkpoints(checkpoints)))
    if free < size:
        raise UserError(
            f"run.dir={config.run.dir}: a checkpoint takes {format_disk_size(size)}, and {format_disk_size(free)} are "
            "free there: make room, choose a run.dir on another disk, or use a smaller model"
        )
    more = max(1, keep + 1 - len(existing))
    if free < more * size:
        return (
            f"checkpoint.keep={keep} will need {format_disk_size(more * size)} more ({more} checkpoints of "
            f"{format_disk_size(size)}; one is written before the oldest is deleted), and {format_disk_size(free)} are "
            f"free in {config.run.dir}: make room, or lower checkpoint.keep"
        )
    return ""


def check_writable(checkpoints: Path) -> None:
    """Create and remove an empty folder where checkpoints will be saved, to fail now rather than at the first save.

    A full disk is accepted here: `check_disk_space` has checked the space, and `prune` frees some.

    Raises:
        UserError: no folder can be made there.
    """
    probe = partial_path(checkpoints, 0, "probe") if os.path.lexists(checkpoints) else checkpoints
    try:
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return
        what = error.strerror or str(error)
        if checkpoints.is_symlink() and not checkpoints.exists():
            what = f"a link to {checkpoints.readlink()}, which does not exist"
        raise UserError(
            f"{checkpoints} cannot hold checkpoints ({what}), and nothing was trained: make it a folder that can be "
            "written (is a disk not mounted, or mounted read-only?), or choose another run.dir"
        ) from error


def save_failed(config: RunConfig, path: Path, error: OSError) -> StorageError:
    """Return the error for a checkpoint at `path` that could not be written: its size, the free space, the last good
    checkpoint."""
    free = free_bytes(path.parent)
    room = "" if free is None else f", and {format_disk_size(free)} are free"
    try:
        safe = committed_checkpoints(path.parent)
    except StorageError:
        safe = []
    kept = f"The same command resumes from {safe[0].name}" if safe else "There is no checkpoint yet"
    return StorageError(
        f"{path} cannot be written ({error.strerror or error}): it takes "
        f"{format_disk_size(checkpoint_bytes(config))}{room}. {kept}: "
        f"make room or make it writable first, or lower checkpoint.keep={config.checkpoint.keep}"
    )


def _bytes_of(folder: Path) -> int:
    """Return the size of the files in `folder`; 0 if another process has deleted or renamed it."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    except MISSING_FILE_ERRORS:
        return 0
