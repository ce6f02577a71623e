"""Compare the files of a checkpoint with its manifest. Executes no code of the checkpoint."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch.distributed as dist
import xxhash
from torch.distributed import ProcessGroup

from data_pipeline.errors import unreadable_error
from pretrain.checked_json import MISSING_FILE_ERRORS
from pretrain.checkpoint.manifest import MANIFEST, FileChecksum, read_manifest
from pretrain.checkpoint.object_collectives import all_gather_object, run_on_all
from pretrain.errors import UserError


def verify_checkpoint(path: Path, rank: int = 0, n_ranks: int = 1) -> list[str]:
    """Read the files of the checkpoint at `path` and return one line for each problem; an empty list means valid.

    With `n_ranks > 1` only every n-th file is read, starting at the `rank`-th. Files that the manifest does not list
    are ignored (`unlisted_files` names them).

    Raises:
        StorageError: a file cannot be read now. It may be intact, so this is not a problem of the checkpoint.
    """
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return [str(error)] if rank == 0 else []
    files = sorted(manifest.files.items())[rank::n_ranks]
    return [problem for name, expected in files if (problem := _file_problem(path / name, expected))]


def verify_on_all_ranks(path: Path, group: ProcessGroup | None) -> list[str]:
    """Verify the checkpoint at `path`, sharing the reading among the ranks of `group`; every rank returns all problems.

    Raises:
        StorageError: on all ranks, if one of them cannot read a file now.
    """
    rank, n_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    problems = run_on_all(group, lambda: verify_checkpoint(path, rank, n_ranks))
    return [problem for of_rank in all_gather_object(problems, group) for problem in of_rank]


def unlisted_files(path: Path) -> list[str]:
    """Return the names in a checkpoint folder that its manifest does not list: files of a file manager or NFS.

    They are never read.

    Raises:
        UserError, StorageError: as `read_manifest`.
    """
    listed = {Path(name).parts[0] for name in read_manifest(path).files} | {MANIFEST}
    try:
        return sorted({entry.name for entry in path.iterdir()} - listed)
    except OSError as error:
        raise unreadable_error(path, error, "listed") from error


def check_file(path: Path, name: str) -> None:
    """Raise UserError unless the file `name` of the checkpoint at `path` matches the manifest."""
    expected = read_manifest(path).files.get(name)
    problem = _file_problem(path / name, expected) if expected else f"{path / MANIFEST} does not list {name}"
    if problem:
        raise UserError(problem)


def _file_problem(file: Path, expected: FileChecksum) -> str | None:
    """Return how `file` differs from its checksum, or None."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != expected.size:
                return f"{file} has {size} bytes instead of {expected.size}"
            digest = hashlib.file_digest(stream, xxhash.xxh3_64).hexdigest()
    except MISSING_FILE_ERRORS:
        return f"{file} is missing"
    except OSError as error:
        raise unreadable_error(file, error, "read") from error
    if digest == expected.xxh3:
        return None
    return f"{file} is damaged: its checksum is {digest} instead of {expected.xxh3}"
