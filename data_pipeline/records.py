"""Small files that tell what is finished: each is whole, or as good as not there. A checksum stands in the first line."""

from __future__ import annotations

from pathlib import Path

import xxhash

from data_pipeline.durable import write_synced


def write_record(file: Path, content: bytes) -> None:
    """Write aside and rename."""
    aside = file.with_name(f"{file.name}.tmp")
    write_synced(aside, xxhash.xxh3_128_hexdigest(content).encode() + b"\n" + content)
    aside.replace(file)


def read_record(file: Path) -> bytes | None:
    """None where it is missing or damaged."""
    try:
        digest, _, content = file.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    return content if xxhash.xxh3_128_hexdigest(content).encode() == digest else None
