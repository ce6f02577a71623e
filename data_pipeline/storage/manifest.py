"""The manifest of a split: what its shards hold, how they were made, what was dropped, and the checksums that prove it.

It is written last, so a folder with a manifest is a whole split.
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
"""Bytes under one block checksum."""

MANIFEST = "manifest.json"
SPLITS = ("validation", "train")
"""In the order in which they are committed."""

TokenDtype = Literal["uint16", "int32"]
DTYPES: dict[TokenDtype, np.dtype[np.integer]] = {"uint16": np.dtype("<u2"), "int32": np.dtype("<i4")}


class ManifestModel(BaseModel):
    """What is written for others to read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Shard(ManifestModel):
    """One `.bin` / `.idx` pair. The `.idx` is always ours, beside the manifest; the `.bin` may be a file of another tool."""

    name: str
    """File name without its ending."""
    tokens: int
    documents: int
    bin_bytes: int
    idx_bytes: int
    bin_xxh3_128: str
    idx_xxh3_128: str
    bin_blocks_xxh3_64: str
    """16 hex digits for each MiB of the tokens, in a row."""
    external_bin: str | None = None
    """Absolute path of the tokens where they are read in place; none is `<name>.bin`."""
    bin_start: int = 0
    """Byte of the file at which the tokens begin."""

    def blocks(self) -> NDArray[np.uint64]:
        """The checksum of each MiB block of the tokens."""
        return np.frombuffer(bytes.fromhex(self.bin_blocks_xxh3_64), ">u8").astype(np.uint64)


class SourceManifest(ManifestModel):
    """One source's part of a split. Documents read = `documents` + all `dropped`."""

    name: str
    documents: int
    tokens: int
    """With the end-of-text token after each document."""
    text_bytes: int | None
    """UTF-8 bytes of the documents' text; none where other tools made the tokens."""
    dtype: TokenDtype
    ends_with_eot: bool
    """Every document ends with the end-of-text token; tokens that other tools made may not."""
    dropped: dict[str, int]
    """Documents left out, by reason."""
    repaired: dict[str, int]
    """Documents changed and kept, by reason."""
    marked: dict[str, int]
    """Documents kept as they are, by what was noticed."""
    unknown_tokens: int = 0
    """Tokens that stand for text that the tokenizer does not know; `marked` has the documents that hold them."""
    lost_characters: int = 0
    """Characters that the tokenizer does not know and left out, as a whole or in part; `marked` has the documents that they were in."""
    shards: tuple[Shard, ...]

    @model_serializer(mode="wrap")
    def _leave_out_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """What versions without these counts wrote, where there is nothing to count."""
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

    To a reader it is information. So settings that only another version has are ignored, and those that this one adds have their defaults.
    """

    settings: PrepareConfig
    """Without `workers`, `dedup.memory_mb` and `allow_lossy_tokenizer`, which decide nothing; `tokenizer` is `auto` and stands for
    `Manifest.tokenizer`."""
    trained_tokenizer: bool
    """The tokenizer was trained on the way; otherwise it was there before."""
    listings: tuple[str | None, ...]
    """Count, bytes and a hash of the names and sizes of each source's files; none for `hf`."""
    lists: str
    """Hash of the files that filters and decontamination read."""
    made_with: dict[str, str]
    """Versions of what decides the bytes."""
    passed_over: tuple[str | None, ...] = ()
    """The files in each source's folders that were not read: count, endings and the names of a few. Empty where all were, and then not
    written. No part of the fingerprint: they change no data."""

    @model_serializer(mode="wrap")
    def _leave_out_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        fields: dict[str, object] = serialize(self)
        if not self.passed_over:
            del fields["passed_over"]
        settings = fields["settings"]
        assert isinstance(settings, dict)
        for name in ("validation", "external", "allow_lossy_tokenizer"):  # settings that earlier versions did not have
            if not getattr(self.settings, name):
                del settings[name]
        return fields

    @field_validator("settings", mode="wrap")
    @classmethod
    def _ignore_other_versions(cls, value: object, validate: ValidatorFunctionWrapHandler) -> PrepareConfig:
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
    """All splits that were made together."""
    vocab_size: int
    eot_id: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    recipe: Recipe
    sources: tuple[SourceManifest, ...]
    _fingerprint: str | None = PrivateAttr(None)
    """Of the file that it was read from: what another version would write may differ."""

    @property
    def documents(self) -> int:
        """Documents of all sources."""
        return sum(source.documents for source in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of all sources."""
        return sum(source.tokens for source in self.sources)

    def to_bytes(self) -> bytes:
        """The file's contents; the same manifest gives the same bytes."""
        return _spelt(self.model_dump(mode="json"))

    def fingerprint(self) -> str:
        """XXH3-128 of the bytes of the file, without `recipe.passed_over`; a checkpoint stores it to know its data again."""
        return self._fingerprint or _fingerprint(self.to_bytes())

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> SplitManifest:  # Any: as in pydantic
        """One with other values is another file."""
        copied = super().model_copy(update=update, deep=deep)
        if update:
            copied._fingerprint = None
        return copied


def load_manifest(folder: Path) -> SplitManifest:
    """Read the manifest of a split.

    Raises:
        DataError: there is none, or it is damaged or of another format.
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
    """Of the bytes of a manifest as they would be if no file had been passed over."""
    if b'"passed_over": [' in content:
        tree = json.loads(content)
        tree["recipe"].pop("passed_over", None)
        content = _spelt(tree)
    return xxhash.xxh3_128_hexdigest(content)


def _spelt(tree: object) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()


def _check_names(file: Path, manifest: SplitManifest) -> None:
    """DataError where the manifest, which may be a stranger's, leads out of its folder by a name."""
    shards = [shard.name for source in manifest.sources for shard in source.shards]
    outside = [name for name in shards if PurePath(name).name != name or name.startswith(".") or "\0" in name]
    outside += [name for name in (manifest.split, *manifest.splits) if name not in SPLITS]
    if outside:
        raise DataError(
            f"{file} names {outside[0]!r}, which is no file of its folder: somebody changed it, so do not use this data; prepare it again"
        )


def check_external_files(folder: Path, manifest: SplitManifest, trusted_paths: Sequence[Path] | None) -> None:
    """Raise DataError if a manifest refers to token files outside of the trusted places.

    folder: of the split. trusted_paths: folders and files that may be read, beside `folder`; None trusts every place.
    """
    if trusted_paths is None:
        return
    places = [Path(os.path.realpath(place.expanduser())) for place in trusted_paths]
    named = sorted(
        {shard.external_bin for source in manifest.sources for shard in source.shards if shard.external_bin is not None}
    )
    others = [name for name in named if not any(Path(os.path.realpath(name)).is_relative_to(place) for place in places)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        folders = ", ".join(sorted({str(PurePath(name).parent) for name in others}))
        raise DataError(
            f"{folder / MANIFEST} has tokens read from {others[0]}{more}, outside of its folder: only if you know who prepared it, set "
            f"data.external=[{folders}], or name the sources in data.sources as they were when it was prepared"
        )


def _remove(tree: Any, where: tuple[int | str, ...]) -> bool:  # Any: JSON
    """Remove the key at a place that pydantic names, if it is there; the branch of a union, which is part of the name, is no key."""
    *path, key = where
    for step in path:
        if step in tree if isinstance(tree, dict) else isinstance(tree, list | tuple):
            tree = tree[step]
    return isinstance(tree, dict) and tree.pop(key, _remove) is not _remove
