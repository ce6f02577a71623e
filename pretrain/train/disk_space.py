"""Whether the disk has room for the checkpoints of a run, and what to say when one cannot be written."""

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
"""Bytes beside the numbers of a parameter and its optimizer state: each of the four tensors has a header, a place in `.metadata`
and padding. Measured: 2.0 KB a tensor."""


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of one checkpoint: fp32 weights and optimizer state, whatever the layout, and what surrounds the tensors."""
    held = estimate_rank_memory(config, Layout(), 0)
    n_weights = len(model_parameters(config.model, range(config.model.n_layers)))
    return held.master_bytes + held.optimizer_bytes + OVERHEAD_PER_PARAMETER * n_weights


def free_bytes(path: Path) -> int | None:
    """What may still be written where `path` is, or will be made; None where the file system does not tell.

    Quotas are not seen.
    """
    for folder in (path.resolve(), *path.resolve().parents):
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize if found.f_blocks else None
    return None


def check_disk_space(config: RunConfig) -> str:
    """Ask for room before a run begins or goes on. Returns a warning where it is short, empty where it is not.

    `checkpoint.keep` checkpoints stay, and one more is there until the oldest is deleted.

    Raises:
        UserError: not even one checkpoint fits.
    """
    checkpoints, keep = config.run.dir / "checkpoints", config.checkpoint.keep
    size, free = checkpoint_bytes(config), free_bytes(checkpoints)
    if free is None:
        return ""
    there = committed_checkpoints(checkpoints)
    free += sum(
        _bytes_of(path) for path in (*there[keep:], *unfinished_checkpoints(checkpoints))
    )  # deleted when the run goes on
    if free < size:
        raise UserError(
            f"run.dir={config.run.dir}: a checkpoint takes {format_disk_size(size)}, and {format_disk_size(free)} are free there: make room, choose "
            f"a run.dir on another disk, or use a smaller model"
        )
    more = max(1, keep + 1 - len(there))
    if free < more * size:
        return (
            f"checkpoint.keep={keep} will need {format_disk_size(more * size)} more ({more} checkpoints of {format_disk_size(size)}; one is written "
            f"before the oldest is deleted), and {format_disk_size(free)} are free in {config.run.dir}: make room, or lower checkpoint.keep"
        )
    return ""


def check_writable(checkpoints: Path) -> None:
    """Make and remove an empty folder where checkpoints will be saved: better refused now than at the first save.

    Room is not asked for here: `check_disk_space` has done that, and `prune` makes some.

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
            what = f"a link to {checkpoints.readlink()}, which is not there"
        raise UserError(
            f"{checkpoints} cannot hold checkpoints ({what}), and nothing was trained: make it a folder that can be "
            "written (is a disk not mounted, or mounted read-only?), or choose another run.dir"
        ) from error


def save_failed(config: RunConfig, path: Path, error: OSError) -> StorageError:
    """What to say when the checkpoint at `path` could not be written: what it needs, what is free, what is safe."""
    free = free_bytes(path.parent)
    room = "" if free is None else f", and {format_disk_size(free)} are free"
    try:
        safe = committed_checkpoints(path.parent)
    except StorageError:
        safe = []
    kept = f"Safe is {safe[0].name}, from which the same command goes on" if safe else "No checkpoint is there yet"
    return StorageError(
        f"{path} cannot be written ({error.strerror or error}): it takes {format_disk_size(checkpoint_bytes(config))}{room}. {kept}: "
        f"make room or make it writable first, or lower checkpoint.keep={config.checkpoint.keep}"
    )


def _bytes_of(folder: Path) -> int:
    """Size of its files; 0 where another process has deleted or renamed it meanwhile."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    except MISSING_FILE_ERRORS:
        return 0
