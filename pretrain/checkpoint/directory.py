"""The `checkpoints/` folder of a run: names of checkpoints, which exist, and the latest valid one."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.distributed import ProcessGroup

from data_pipeline.errors import unreadable_error
from pretrain.checked_json import MISSING_FILE_ERRORS
from pretrain.checkpoint.manifest import MANIFEST, read_manifest
from pretrain.checkpoint.object_collectives import on_rank_zero
from pretrain.checkpoint.verify import verify_on_all_ranks
from pretrain.errors import UserError

_NAME = re.compile(r"step-(\d{8,})(?:\.tmp-(.+))?")
_DAMAGED = "damaged-"


class NoValidCheckpoint(UserError):
    """There are checkpoints, but none is valid. `args[0]` says why."""

    def __str__(self) -> str:
        return f"{self.args[0]}. Restore one of them from a copy"


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the path of the committed checkpoint of `step`."""
    return directory / f"step-{step:08d}"


def partial_path(directory: Path, step: int, attempt: str) -> Path:
    """Return the path of a checkpoint that is being written or deleted."""
    return directory / f"step-{step:08d}.tmp-{attempt}"


def checkpoint_step(path: Path) -> int:
    """Return the step in the name of a checkpoint. ValueError for any other name."""
    match = _NAME.fullmatch(path.name)
    if not match:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(match[1])


def latest_valid(
    directory: Path, on_problem: Callable[[Path, list[str]], None], group: ProcessGroup | None = None
) -> Path | None:
    """Return the newest committed checkpoint that verifies, or None if there are no checkpoints.

    Changes nothing on disk.

    The ranks of `group` share the reading and return the same path; None is a single process.

    Args:
        directory: the `checkpoints/` folder.
        on_problem: called with each newer checkpoint that fails and with its problems.
        group: ranks that call this together.

    Raises:
        NoValidCheckpoint: there are checkpoints, but none is valid. Starting over silently would throw the run away.
        UserError: a checkpoint is named like another step.
        StorageError: something cannot be read now. It may be valid, so an older checkpoint must not replace it.
    """
    first_problem = ""
    candidates = on_rank_zero(group, lambda: committed_checkpoints(directory))
    for path in candidates:
        on_rank_zero(group, partial(check_name, path))
        problems = verify_on_all_ranks(path, group)
        if not problems:
            return path
        on_problem(path, problems)
        first_problem = first_problem or problems[0]
    if not candidates:
        return None
    raise NoValidCheckpoint(
        f"none of the {len(candidates)} checkpoints in {directory} is valid; the newest fails because {first_problem}"
    )


def committed_checkpoints(directory: Path) -> list[Path]:
    """Return the folders named like a committed checkpoint, newest first. Files and dangling links are not checkpoints.

    Raises:
        StorageError: the folder cannot be listed.
    """
    committed = (path for path, attempt in named_folders(directory) if attempt is None)
    return sorted(committed, key=checkpoint_step, reverse=True)


def committed_steps(directory: Path) -> list[int]:
    """Return the steps of the committed checkpoints, valid or not, newest first."""
    return [checkpoint_step(path) for path in committed_checkpoints(directory)]


def steps_on_disk(directory: Path) -> set[int]:
    """Return the steps that have a checkpoint on disk: committed ones, valid or not, and those marked as damaged."""
    folders = named_folders(directory)
    return {checkpoint_step(path) for path, attempt in folders if attempt is None or is_damaged(attempt)}


def unfinished_checkpoints(directory: Path) -> list[Path]:
    """Return what crashes left behind: checkpoints of any step whose save or deletion did not end.

    Not the damaged ones.
    """
    return [path for path, attempt in named_folders(directory) if attempt is not None and not is_damaged(attempt)]


def named_folders(directory: Path) -> list[tuple[Path, str | None]]:
    """Return (path, attempt) of each folder that is named like a checkpoint; the attempt of a committed one is None."""
    try:
        found = [(path, match[2]) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [(path, attempt) for path, attempt in found if path.is_dir()]
    except MISSING_FILE_ERRORS:
        return []
    except OSError as error:
        raise unreadable_error(directory, error, "listed") from error


def mark_damaged(path: Path) -> None:
    """Rename a damaged checkpoint so that nothing reads it. `prune` deletes it once the run has passed its step."""
    path.rename(partial_path(path.parent, checkpoint_step(path), f"{_DAMAGED}{uuid.uuid4().hex[:8]}"))


def is_damaged(attempt: str) -> bool:
    """Return whether the attempt in a folder name marks a damaged checkpoint."""
    return attempt.startswith(_DAMAGED) or attempt.endswith("-replaced")  # the suffix of earlier versions


def check_name(path: Path) -> None:
    """Raise UserError if a valid manifest has another step than the folder name: somebody renamed or copied the
    checkpoint."""
    try:
        step = read_manifest(path).step
    except UserError:
        return
    if step != checkpoint_step(path):
        right = checkpoint_path(path.parent, step)
        rename = "" if right.exists() else f"rename it to {right.name}, or "
        raise UserError(
            f"{path} is named like the checkpoint of step {checkpoint_step(path)}, but its {MANIFEST} says step "
            f"{step}; {rename}move it out of {path.parent}"
        )
