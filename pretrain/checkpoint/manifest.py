"""The manifest of a checkpoint: the state of the run when it was saved, and the checksum of every file.

Imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from pretrain.checked_json import MANIFEST as MANIFEST
from pretrain.checked_json import MISSING_FILE_ERRORS, format_checked_json, read_checked_json
from pretrain.errors import UserError


class TrainState(BaseModel):
    """State of a run, apart from its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    step: int
    """Optimizer steps done."""

    samples: int
    """Sequences consumed. Resuming the data needs nothing else."""

    config: dict[str, JsonValue]
    """The full config of the run."""

    dataset: str
    """Hash of the data set's manifest."""

    tokenizer: str | None = None
    """Fingerprint of the tokenizer that made the data; None in checkpoints of earlier versions."""

    order: str
    """Fingerprint of everything that decided which samples were consumed. A run may resume only if it would consume
    the same ones."""

    layout: dict[str, int]
    """Ranks along each axis of parallelism, such as {"shard": 8}. A checkpoint loads on any layout."""

    conversion: str | None = None
    """How `pretrain convert` made the weights from another checkpoint. Such a checkpoint has no optimizer state. None
    for one that training has saved."""

    rng: dict[str, dict[str, str]]
    """Random states (`pretrain.checkpoint.rng`) by the coordinates of the rank, such as "shard=0 tensor=1"."""


class FileChecksum(BaseModel):
    """Expected size and hash of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    size: int
    """Bytes."""

    xxh3: str
    """XXH3, 64 bits, as 16 hexadecimal digits."""


class Manifest(TrainState):
    """Content of `manifest.json`: the state of the run and the files of the checkpoint."""

    format: Literal[1] = 1
    """Version of this layout."""

    generation: str
    """UUID of this save. No two saves share it, not even of the same step."""

    files: dict[str, FileChecksum]
    """Every file of the checkpoint except `manifest.json`, by name."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`, with a checksum of itself, and sync it to the disk."""
    content = manifest.model_dump(mode="json")
    with (folder / MANIFEST).open("x", encoding="utf-8") as file:
        file.write(format_checked_json(content))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint at `path`.

    Raises:
        UserError: it does not exist, or it is damaged.
        StorageError: it cannot be read now; its content may be fine.
    """
    file = path / MANIFEST
    try:
        manifest = Manifest.model_validate(read_checked_json(file))
    except MISSING_FILE_ERRORS:
        raise UserError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{file} cannot be read by this version: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{file} is damaged: it names a file outside of the checkpoint, {name!r}")
    return manifest
