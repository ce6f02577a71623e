"""The manifest of a checkpoint: what the run was when it was saved, and the checksum of every file. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from data_pipeline.errors import unreadable_error
from pretrain.errors import UserError

MANIFEST = "manifest.json"

GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What opening a file raises when it is not there. Any other OSError may pass: a network mount, permissions, a failing disk."""


class Record(BaseModel):
    """What the run knows besides its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    step: int
    """Optimizer steps done."""

    samples: int
    """Sequences consumed: the data position, all that resuming the data needs."""

    config: dict[str, JsonValue]
    """The full config of the run."""

    dataset: str
    """Hash of the data set's manifest."""

    tokenizer: str | None = None
    """Fingerprint of the tokenizer that made the data; None in checkpoints of earlier versions."""

    order: str
    """Hash of all that decided which samples were consumed: a run may only go on if it would consume the same ones again."""

    layout: dict[str, int]
    """Ranks of each kind of parallelism, such as {"shard": 8}. A checkpoint loads on any layout."""

    rng: dict[str, dict[str, str]]
    """Random states, see `pretrain.checkpoint.rng`, by the logical position of the rank that had them, such as "shard=0 tensor=1"."""


class FileSum(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    size: int
    """Bytes."""

    xxh3: str
    """XXH3, 64 bits, as 16 hexadecimal digits."""


class Manifest(Record):
    """A record with the files it belongs to, as `manifest.json` holds it."""

    format: Literal[1] = 1
    """Version of this layout."""

    generation: str
    """A uuid, new for each save: no two saves share it, not even of the same step."""

    files: dict[str, FileSum]
    """Every file of the checkpoint but `manifest.json`, by its name."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`, with a checksum of itself, and bring it to the disk."""
    content = manifest.model_dump(mode="json")
    with (folder / MANIFEST).open("x", encoding="utf-8") as file:
        json.dump({**content, "checksum": _checksum(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`.

    Raises:
        UserError: there is none, or it is damaged.
        StorageError: it cannot be read now, which says nothing about what it holds.
    """
    file = path / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        if content.pop("checksum", None) != _checksum(content):
            raise ValueError("its own checksum does not match")
        manifest = Manifest.model_validate(content)
        for name in manifest.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"it names a file outside of the checkpoint, {name!r}")
        return manifest
    except GONE:
        raise UserError(f"{path} is no checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise unreadable_error(file, error, "read") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{file} cannot be read by this version: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error


def verify(path: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Compare every file of the checkpoint at `path` with its manifest, reading all of them, or one part in `ranks`, that of `rank`.

    Returns one line for each problem, and an empty list for a checkpoint that is whole. It runs no code of the checkpoint.
    Files that the manifest does not list are ignored; `extra_files` names them.

    Raises:
        StorageError: a file cannot be read now. It may be whole, so that is no problem of the checkpoint.
    """
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return [str(error)] if rank == 0 else []
    files = sorted(manifest.files.items())[rank::ranks]
    return [problem for name, expected in files if (problem := _problem(path / name, expected))]


def extra_files(path: Path) -> list[str]:
    """Names in the folder of a checkpoint that its manifest does not list, as a file manager or NFS leaves them.

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
    """Raise UserError unless the file `name` of the checkpoint at `path` is as the manifest says."""
    expected = read_manifest(path).files.get(name)
    problem = _problem(path / name, expected) if expected else f"{path / MANIFEST} does not list {name}"
    if problem:
        raise UserError(problem)


def _problem(file: Path, expected: FileSum) -> str | None:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != expected.size:
                return f"{file} has {size} bytes instead of {expected.size}"
            digest = hashlib.file_digest(stream, xxhash.xxh3_64).hexdigest()
    except GONE:
        return f"{file} is missing"
    except OSError as error:
        raise unreadable_error(file, error, "read") from error
    return (
        None if digest == expected.xxh3 else f"{file} is damaged: its checksum is {digest} instead of {expected.xxh3}"
    )


def _checksum(content: dict[str, JsonValue]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(canonical.encode())
