"""Delete old checkpoints, and what crashes left behind."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from torch.distributed import ProcessGroup

from data_pipeline.errors import StorageError
from pretrain.checkpoint.directory import (
    checkpoint_step,
    committed_checkpoints,
    is_damaged,
    named_folders,
    partial_path,
    unfinished_checkpoints,
)
from pretrain.checkpoint.object_collectives import on_rank_zero
from pretrain.checkpoint.verify import verify_on_all_ranks


def prune(directory: Path, keep: int, group: ProcessGroup | None = None) -> list[str]:
    """Delete all committed checkpoints except the `keep` newest, and what crashes left behind.

    All ranks of `group` call it.

    A checkpoint is renamed before its files are deleted, so a half-deleted one never looks valid. Unfinished
    checkpoints of later steps than the newest committed one stay: another process may be writing them. Checkpoints
    marked as damaged are deleted when the newest one is of the same or a later step and verifies.

    Returns the problems of the newest checkpoint, for which damaged ones had to stay; usually an empty list.
    """
    damaged = on_rank_zero(group, lambda: _delete_old(directory, keep))
    if not damaged:
        return []
    newest = on_rank_zero(group, lambda: committed_checkpoints(directory)[0])
    try:
        problems = verify_on_all_ranks(newest, group)
    except StorageError as error:
        return [str(error)]
    if not problems:
        on_rank_zero(group, lambda: _delete(damaged))
    return problems


def delete_unfinished(directory: Path) -> None:
    """Delete what crashes left behind, of any step. Only the holder of the run directory's lock may call it.

    For any other process, an unfinished checkpoint may be one that is being written.
    """
    _delete(unfinished_checkpoints(directory))


def _delete_old(directory: Path, keep: int) -> list[Path]:
    """Delete old and unfinished checkpoints.

    Return the damaged ones that may go once the newest checkpoint verifies.
    """
    committed = committed_checkpoints(directory)
    for path in committed[keep:]:
        path.rename(partial_path(directory, checkpoint_step(path), f"deleted-{uuid.uuid4().hex[:8]}"))
    newest_step = checkpoint_step(committed[0]) if committed else -1
    old = [
        (path, attempt)
        for path, attempt in named_folders(directory)
        if attempt and checkpoint_step(path) <= newest_step
    ]
    _delete([path for path, attempt in old if not is_damaged(attempt)])
    return [path for path, attempt in old if is_damaged(attempt)]


def _delete(paths: list[Path]) -> None:
    """Delete folders. Of a link to a folder elsewhere, delete only the link."""
    for path in paths:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
