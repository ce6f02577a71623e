"""The folder `checkpoints/` of a run: the names in it, the newest checkpoint that is whole, and which ones to keep."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch.distributed import ProcessGroup

from pretrain.checkpoint.ranks import gather, on_first
from pretrain.checkpoint.record import verify
from pretrain.errors import UserError

_NAME = re.compile(r"step-(\d{8,})(\.tmp-.+)?")


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the committed checkpoint of `step` lies."""
    return directory / f"step-{step:08d}"


def partial_path(directory: Path, step: int, attempt: str) -> Path:
    """Where a checkpoint of `step` lies before it is committed, or on its way out."""
    return directory / f"step-{step:08d}.tmp-{attempt}"


def newest(directory: Path, on_problem: Callable[[Path, list[str]], None], group: ProcessGroup | None = None) -> Path | None:
    """The newest committed checkpoint in `directory` that verifies; None where there is none at all.

    The ranks of `group` share the reading and find the same one; None is this process alone. Each one that fails is reported to
    `on_problem` with the problems that `record.verify` found, and the next older one is tried. Raises UserError where there are
    checkpoints and none is whole: starting over by itself would throw the run away.
    """
    first_problem = ""
    candidates = on_first(group, lambda: _committed(directory))
    for path in candidates:
        problems = problems_of(path, group)
        if not problems:
            return path
        on_problem(path, problems)
        first_problem = first_problem or problems[0]
    if not candidates:
        return None
    raise UserError(
        f"none of the {len(candidates)} checkpoints in {directory} is whole; the newest fails because {first_problem}. "
        f"Start over in another run.dir, or delete {directory} to start over here"
    )


def problems_of(path: Path, group: ProcessGroup | None) -> list[str]:
    """What `record.verify` finds wrong with the checkpoint at `path`, the same on all ranks of `group`, which share
    the reading."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    return [problem for found in gather(verify(path, rank, ranks), group) for problem in found]


def retain(directory: Path, keep: int) -> None:
    """Delete all committed checkpoints but the `keep` newest, and what crashes left behind.

    A checkpoint is renamed before its files go, so that a half-deleted one never looks whole. Unfinished ones of later steps than
    the newest committed one stay: another process may be writing them.
    """
    committed = _committed(directory)
    for path in committed[keep:]:
        path.rename(partial_path(directory, step_of(path), f"deleted-{uuid.uuid4().hex[:8]}"))
    for path in list(directory.glob("step-*.tmp-*")):
        if _NAME.fullmatch(path.name) and committed and step_of(path) <= step_of(committed[0]):
            shutil.rmtree(path, ignore_errors=True)


def kept_steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints in `directory`, whole or not, newest first."""
    return [step_of(path) for path in _committed(directory)]


def _committed(directory: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in directory.glob("step-*") if (match := _NAME.fullmatch(path.name)) and not match[2]]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint. ValueError for any other name."""
    match = _NAME.fullmatch(path.name)
    if not match:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(match[1])
