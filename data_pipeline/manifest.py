"""The manifest of a split: what its shards hold, how they were made, what was dropped, and the checksums that prove it.

It is written last, so a folder with a manifest is a whole split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import DataError
from data_pipeline.settings import SourceConfig

BLOCK_BYTES = 1 << 20
"""Bytes under one block checksum."""

MANIFEST = "manifest.json"
TokenDtype = Literal["uint16", "int32"]
DTYPES: dict[TokenDtype, np.dtype[np.integer]] = {"uint16": np.dtype("<u2"), "int32": np.dtype("<i4")}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Shard(_Record):
    """One `.bin` / `.idx` pair."""

    name: str
    """File name without its ending."""
    tokens: int
    documents: int
    bin_bytes: int
    idx_bytes: int
    bin_xxh3_128: str
    idx_xxh3_128: str
    bin_blocks_xxh3_64: str
    """16 hex digits for each MiB of the `.bin`, in a row."""

    def blocks(self) -> NDArray[np.uint64]:
        """The checksum of each MiB block of the `.bin`."""
        return np.frombuffer(bytes.fromhex(self.bin_blocks_xxh3_64), ">u8").astype(np.uint64)


class TrainedTokenizer(_Record):
    """The settings of a tokenizer that was trained on the way."""

    vocab_size: int
    sample_mb: float


class Recipe(_Record):
    """How a split was made: the same recipe gives the same bytes."""

    sources: tuple[SourceConfig, ...]
    listings: tuple[str | None, ...]
    """Count, bytes and a hash of the names and sizes of each source's files; none for `hf`."""
    trained_tokenizer: TrainedTokenizer | None
    """None where the tokenizer was there before."""
    validation_fraction: float
    shard_tokens: int
    made_with: dict[str, str]
    """Versions of what decides the bytes."""


class Manifest(_Record):
    """`manifest.json`."""

    format: Literal["pretrain-shards-1"] = "pretrain-shards-1"
    split: str
    documents: int
    tokens: int
    """With the end-of-text token after each document."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    dtype: TokenDtype
    vocab_size: int
    eot_id: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    dropped: dict[str, int]
    """Documents left out, by reason."""
    repaired: dict[str, int]
    """Documents changed and kept, by reason."""
    recipe: Recipe
    shards: tuple[Shard, ...]

    def to_bytes(self) -> bytes:
        """The file's contents; the same manifest gives the same bytes."""
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()

    def fingerprint(self) -> str:
        """xxh3-128 of the file; a checkpoint stores it to know its data again."""
        return xxhash.xxh3_128_hexdigest(self.to_bytes())


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a split.

    Raises:
        DataError: there is none, or it is damaged or of another format.
    """
    file = folder / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} holds no prepared data (no {MANIFEST}); run `pretrain data prepare`, or set data.path") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{file} is damaged or of another version ({where or 'JSON'}: {first['msg']}); prepare the data again") from error
