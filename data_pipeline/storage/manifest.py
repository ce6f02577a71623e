"""The manifest of a split: its shards with their checksums, how they were made, and what was dropped.

It is written last, so a folder with a manifest holds a complete split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from data_pipeline.errors import DataError, unreadable_error
from data_pipeline.settings import PrepareConfig

BLOCK_BYTES = 1 << 20
"""Bytes covered by one block checksum."""

MANIFEST = "manifest.json"
SPLITS = ("validation", "train")
"""In the order in which they are committed: `train` last."""

TokenDtype = Literal["uint16", "int32"]
DTYPES: dict[TokenDtype, np.dtype[np.integer]] = {"uint16": np.dtype("<u2"), "int32": np.dtype("<i4")}


class ManifestModel(BaseModel):
    """Base of everything that is written to a manifest: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Shard(ManifestModel):
    """One `.bin` / `.idx` pair. The `.idx` is beside the manifest. The `.bin` may be another tool's file elsewhere."""

    name: str
    """File name without extension."""
    tokens: int
    documents: int
    bin_bytes: int
    idx_bytes: int
    bin_xxh3_128: str
    idx_xxh3_128: str
    bin_blocks_xxh3_64: str
    """16 hex digits for each MiB of the tokens, concatenated."""
    external_bin: str | None = None
    """Absolute path of the token file if it is read in place. None stands for `<name>.bin` beside the manifest."""
    bin_start: int = 0
    """Byte of the file at which the tokens begin."""

    def block_checksums(self) -> NDArray[np.uint64]:
        """Return the XXH3-64 of each MiB block of the tokens."""
        return np.frombuffer(bytes.fromhex(self.bin_blocks_xxh3_64), ">u8").astype(np.uint64)


class SourceManifest(ManifestModel):
    """One source in one split. Documents read = `documents` + the sum of `dropped`."""

    name: str
    documents: int
    tokens: int
    """Includes the end-of-text token after each document."""
    text_bytes: int | None
    """UTF-8 bytes of the documents' text; None if other tools made the tokens."""
    dtype: TokenDtype
    ends_with_eot: bool
    """Every document ends with the end-of-text token. May be false for tokens that other tools made."""
    dropped: dict[str, int]
    """Dropped documents, by reason."""
    repaired: dict[str, int]
    """Documents that were changed and kept, by reason."""
    marked: dict[str, int]
    """Documents that were kept unchanged although something was found in them, by finding."""
    unknown_tokens: int = 0
    """Tokens that stand for text that the tokenizer cannot encode. `marked` counts the documents that have some."""
    lost_characters: int = 0
    """Characters that the tokenizer cannot encode and dropped, fully or in part. `marked` counts their documents."""
    shards: tuple[Shard, ...]

    @model_serializer(mode="wrap")
    def _omit_zero_counts(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Omit counts of 0 that older versions did not have, so that the bytes are those of the older versions."""
        fields: dict[str, object] = serialize(self)
        return {
            name: value for name, value in fields.items() if value or name not in ("unknown_tokens", "lost_characters")
        }

    @property
    def read(self) -> int:
        """Documents read: written or dropped."""
        return self.documents + sum(self.dropped.values())


class Recipe(ManifestModel):
    """How a split was made: the same recipe gives the same bytes.

    For a reader it is only information. So unknown settings are ignored, and missing ones have their defaults.
    """

    settings: PrepareConfig
    """`workers`, `dedup.memory_mb` and `allow_lossy_tokenizer` have their defaults, because they do not change the
    result. `tokenizer` is always `auto`: `SplitManifest.tokenizer` has the fingerprint of the tokenizer that was
    used."""
    trained_tokenizer: bool
    """Whether the tokenizer was trained during the preparation, instead of given."""
    listings: tuple[str | None, ...]
    """For each source: the number of files, their bytes, and a hash of their names and sizes. None for `hf`."""
    lists: str
    """Hash of the files that filters and decontamination read."""
    made_with: dict[str, str]
    """Versions of Python and of the packages that influence the bytes."""
    passed_over: tuple[str | None, ...] = ()
    """For each source: the files in its folders that were not read, as count, extensions and a few names. Empty, and
    then not written, if all files were read. Not part of the fingerprint, because these files do not change the
    data."""

    @model_serializer(mode="wrap")
    def _omit_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Omit empty fields that older versions did not have, so that the bytes are those of the older versions."""
        fields: dict[str, object] = serialize(self)
        if not self.passed_over:
            del fields["passed_over"]
        settings = fields["settings"]
        assert isinstance(settings, dict)
        for name in ("validation", "external", "allow_lossy_tokenizer"):
            if not getattr(self.settings, name):
                del settings[name]
        return fields

    @field_validator("settings", mode="wrap")
    @classmethod
    def _ignore_unknown_settings(cls, value: object, validate: ValidatorFunctionWrapHandler) -> PrepareConfig:
        """Remove the settings that another version wrote and this one does not know, until the rest is valid."""
        while True:
            try:
                config: PrepareConfig = validate(value)
            except ValidationError as error:
                value = deepcopy(value)
                unknown = [problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"]
                if not any(_remove(value, where) for where in unknown):
                    raise
            else:
                return config


class SplitManifest(ManifestModel):
    """`manifest.json`."""

    format: Literal["pretrain-shards-2"] = "pretrain-shards-2"
    split: str
    splits: tuple[str, ...]
    """All splits that were made in the same preparation."""
    vocab_size: int
    eot_id: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    recipe: Recipe
    sources: tuple[SourceManifest, ...]
    _fingerprint: str | None = PrivateAttr(None)
    """Fingerprint of the file that this was read from. Another version may write the same manifest as other bytes."""

    @property
    def documents(self) -> int:
        """Documents of all sources."""
        return sum(source.documents for source in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of all sources."""
        return sum(source.tokens for source in self.sources)

    def to_bytes(self) -> bytes:
        """Return the contents of the file. Equal manifests give equal bytes."""
        return _to_json(self.model_dump(mode="json"))

    def fingerprint(self) -> str:
        """Return the XXH3-128 of the file without `recipe.passed_over`. Checkpoints store it to recognise their
        data."""
        return self._fingerprint or _fingerprint(self.to_bytes())

    # Any: as in pydantic
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> SplitManifest:
        """Return a copy. If values are updated, the fingerprint of the original file does not hold for it."""
        copied = super().model_copy(update=update, deep=deep)
        if update:
            copied._fingerprint = None
        return copied


def load_manifest(folder: Path) -> SplitManifest:
    """Read the manifest of the split in `folder`.

    Raises:
        DataError: there is no manifest, or it is damaged or of another format.
    """
    file = folder / MANIFEST
    try:
        content = file.read_bytes()
        manifest = SplitManifest.model_validate_json(content)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder} holds no prepared data (no {MANIFEST}); run `pretrain data prepare`, or set data.path"
        ) from None
    except OSError as error:
        raise unreadable_error(file, error, "read") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{file} is damaged or of another version ({where or 'JSON'}: {first['msg']}); prepare the data again"
        ) from error
    _check_names(file, manifest)
    manifest._fingerprint = _fingerprint(content)
    return manifest


def _fingerprint(content: bytes) -> str:
    """Hash the bytes of a manifest as they would be without `recipe.passed_over`."""
    if b'"passed_over": [' in content:
        tree = json.loads(content)
        tree["recipe"].pop("passed_over", None)
        content = _to_json(tree)
    return xxhash.xxh3_128_hexdigest(content)


def _to_json(tree: object) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()


def _check_names(file: Path, manifest: SplitManifest) -> None:
    """Raise DataError if a name in the manifest leads out of its folder. Manifests may come from untrusted sources."""
    shards = [shard.name for source in manifest.sources for shard in source.shards]
    outside = [name for name in shards if PurePath(name).name != name or name.startswith(".") or "\0" in name]
    outside += [name for name in (manifest.split, *manifest.splits) if name not in SPLITS]
    if outside:
        raise DataError(
            f"{file} names {outside[0]!r}, which is not a file of its folder: somebody changed it, so do not use this "
            "data; prepare it again"
        )


def check_external_files(folder: Path, manifest: SplitManifest, trusted_paths: Sequence[Path] | None) -> None:
    """Raise DataError if a manifest refers to token files outside of the trusted paths.

    Args:
        folder: the folder of the split.
        manifest: the manifest of the split.
        trusted_paths: folders and files that may be read. None allows every path.
    """
    if trusted_paths is None:
        return
    trusted = [Path(os.path.realpath(path.expanduser())) for path in trusted_paths]
    named = sorted(
        {shard.external_bin for source in manifest.sources for shard in source.shards if shard.external_bin is not None}
    )
    outside = [name for name in named if not any(Path(os.path.realpath(name)).is_relative_to(path) for path in trusted)]
    if outside:
        more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        folders = ", ".join(sorted({str(PurePath(name).parent) for name in outside}))
        raise DataError(
            f"{folder / MANIFEST} has tokens read from {outside[0]}{more}, outside of its folder: only if you know who "
            f"prepared it, set data.external=[{folders}], or name the sources in data.sources as they were when it was "
            "prepared"
        )


def _remove(tree: Any, where: tuple[int | str, ...]) -> bool:  # Any: JSON
    """Remove the key at a location that pydantic reports, ignoring branches of unions; return whether it existed."""
    *path, key = where
    for step in path:
        if step in tree if isinstance(tree, dict) else isinstance(tree, list | tuple):
            tree = tree[step]
    return isinstance(tree, dict) and tree.pop(key, _remove) is not _remove
