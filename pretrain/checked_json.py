"""JSON files with a checksum of their own content. Reading one verifies it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import xxhash
from pydantic import JsonValue

from data_pipeline.errors import unreadable_error
from pretrain.errors import UserError

MANIFEST = "manifest.json"
"""Name of such a file in the folder of a checkpoint."""

MISSING_FILE_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What opening a file raises if it does not exist. Any other OSError may be temporary: a network mount, permissions, a
failing disk."""


def format_checked_json(content: Mapping[str, JsonValue]) -> str:
    """`content` as JSON text, with its checksum."""
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1)


def read_checked_json(file: Path) -> dict[str, JsonValue]:
    """The content of such a file, without its checksum.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: there is no such file.
        UserError: it is damaged.
        StorageError: it cannot be read now, which says nothing about its content.
    """
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        if content.pop("checksum", None) != _checksum(content):
            raise ValueError("its own checksum does not match")
    except MISSING_FILE_ERRORS:
        raise
    except OSError as error:
        raise unreadable_error(file, error, "read") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    return content


def _checksum(content: Mapping[str, JsonValue]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(canonical.encode())
