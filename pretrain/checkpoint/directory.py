"""The folder `checkpoints/` of a run: the names in it, the newest checkpoint that is whole, and which ones to keep."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch.distributed import ProcessGroup

from data_pipeline.errors import StorageError, unreadable_error
from pretrain.checkpoint.ranks import gather, on_first, together
from pretrain.checkpoint.record import GONE, MANIFEST, read_manifest, verify
from pretrain.errors import UserError

_NAME = re.compile(r"step-(\d{8,})(?:\.tmp-(.+))?")
_DAMAGED = "damaged-"


class NoneWhole(UserError):
    """There are checkpoints, and none of them is whole. Made with the sentence that says why."""

    def __str__(self) -> str:
        return f"{self.args[0]}. Restore one of them from a copy"


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the committed checkpoint of `step` lies."""
    return directory / f"step-{step:08d}"


def partial_path(directory: Path, step: int, attempt: str) -> Path:
    """Where a checkpoint of `step` lies before it is committed, or on its way out."""
    return directory / f"step-{step:08d}.tmp-{attempt}"


def newest(
    directory: Path, on_problem: Callable[[Path, list[str]], None], group: ProcessGroup | None = None
) -> Path | None:
    """The newest committed checkpoint in `directory` that verifies; None where there is none. Nothing is changed.

    The ranks of `group` share the reading and find the same one; None is this process alone. Each one that fails is reported to
    `on_problem` with the problems that `record.verify` found, and the next older one is tried.

    Raises:
        NoneWhole: there are checkpoints, and none is whole: starting over by itself would throw the run away.
        UserError: a checkpoint has the name of another step.
        StorageError: something cannot be read now: an older checkpoint would throw away what may be whole.
    """
    first_problem = ""
    candidates = on_first(group, lambda: committed(directory))
    for path in candidates:
        on_first(group, partial(check_name, path))
        problems = problems_of(path, group)
        if not problems:
            return path
        on_problem(path, problems)
        first_problem = first_problem or problems[0]
    if not candidates:
        return None
    raise NoneWhole(
        f"none of the {len(candidates)} checkpoints in {directory} is whole; the newest fails because {first_problem}"
    )


def problems_of(path: Path, group: ProcessGroup | None) -> list[str]:
    """What `record.verify` finds wrong with the checkpoint at `path`, the same on all ranks of `group`, which share
    the reading. StorageError, on all of them, where one cannot read now."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    found = together(group, lambda: verify(path, rank, ranks))
    return [problem for of_rank in gather(found, group) for problem in of_rank]


def retain(directory: Path, keep: int, group: ProcessGroup | None = None) -> list[str]:
    """Delete all committed checkpoints but the `keep` newest, and what crashes left. All ranks of `group` call it.

    A checkpoint is renamed before its files go, so that a half-deleted one never looks whole. Unfinished ones of later steps than
    the newest committed one stay: another process may be writing them. What was set aside as damaged goes when the newest
    one is of the same step or a later one, and has been read back and found whole.

    Returns why damaged ones had to stay: a line for each problem of the newest one, nothing as a rule.
    """
    aside = on_first(group, lambda: _tidy(directory, keep))
    if not aside:
        return []
    target = on_first(group, lambda: committed(directory)[0])
    try:
        problems = problems_of(target, group)
    except StorageError as error:
        return [str(error)]
    if not problems:
        on_first(group, lambda: _delete(aside))
    return problems


def unfinished(directory: Path) -> list[Path]:
    """What crashes left: checkpoints that were being saved or deleted, of any step. Not those set aside as damaged."""
    return [path for path, attempt in _folders(directory) if attempt is not None and not _is_set_aside(attempt)]


def delete_unfinished(directory: Path) -> None:
    """Delete what crashes left, of later steps than the newest committed one as well. Only the process that holds the
    lock of the run directory may call it: to any other, an unfinished checkpoint may be one that is being written."""
    _delete(unfinished(directory))


def kept_steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints in `directory`, whole or not, newest first."""
    return [step_of(path) for path in committed(directory)]


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to a name that is not read. `retain` deletes it once the run has gone past it."""
    path.rename(partial_path(path.parent, step_of(path), f"{_DAMAGED}{uuid.uuid4().hex[:8]}"))


def committed(directory: Path) -> list[Path]:
    """Checkpoints by their names, newest first. Files and dangling links of such a name are none.

    StorageError where it cannot be listed.
    """
    return sorted((path for path, attempt in _folders(directory) if attempt is None), key=step_of, reverse=True)


def steps_there(directory: Path) -> set[int]:
    """Steps with a checkpoint on disk: committed ones, valid or not, and those set aside as damaged."""
    return {step_of(path) for path, attempt in _folders(directory) if attempt is None or _is_set_aside(attempt)}


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint. ValueError for any other name."""
    match = _NAME.fullmatch(path.name)
    if not match:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(match[1])


def _folders(directory: Path) -> list[tuple[Path, str | None]]:
    """(path, attempt) of each folder that is named like a checkpoint; the attempt is None for a committed one."""
    try:
        found = [(path, match[2]) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [(path, attempt) for path, attempt in found if path.is_dir()]
    except GONE:
        return []
    except OSError as error:
        raise unreadable_error(directory, error, "listed") from error


def _is_set_aside(attempt: str) -> bool:
    return attempt.startswith(_DAMAGED) or attempt.endswith("-replaced")  # earlier versions named some like this


def check_name(path: Path) -> None:
    """UserError where a whole manifest is of another step than the name says: somebody has renamed or copied it."""
    try:
        step = read_manifest(path).step
    except UserError:
        return
    if step != step_of(path):
        right = checkpoint_path(path.parent, step)
        rename = "" if right.exists() else f"rename it to {right.name}, or "
        raise UserError(
            f"{path} is named like the checkpoint of step {step_of(path)}, but its {MANIFEST} says step {step}; "
            f"{rename}move it out of {path.parent}"
        )


def _tidy(directory: Path, keep: int) -> list[Path]:
    """Delete old and unfinished checkpoints. Return the damaged ones, which may be deleted once the newest checkpoint verifies."""
    whole = committed(directory)
    for path in whole[keep:]:
        path.rename(partial_path(directory, step_of(path), f"deleted-{uuid.uuid4().hex[:8]}"))
    old = [
        (path, attempt)
        for path, attempt in _folders(directory)
        if attempt and whole and step_of(path) <= step_of(whole[0])
    ]
    _delete([path for path, attempt in old if not _is_set_aside(attempt)])
    return [path for path, attempt in old if _is_set_aside(attempt)]


def _delete(paths: list[Path]) -> None:
    """Of a link to a folder elsewhere, the link alone."""
    for path in paths:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
