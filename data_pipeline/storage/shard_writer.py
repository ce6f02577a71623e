"""Writing a shard: Megatron's `.bin` / `.idx` pair with a checksum for every MiB. `shards.py` describes the format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.atomic import write_synced
from data_pipeline.storage.manifest import BLOCK_BYTES, DTYPES, Shard, TokenDtype
from data_pipeline.storage.shards import encode_index


def write_shard(
    folder: Path, name: str, tokens: NDArray[np.integer], lengths: NDArray[np.int32], dtype: TokenDtype
) -> Shard:
    """Write `<name>.bin` and `<name>.idx` to `folder`, fsync them, and return the manifest's entry.

    Args:
        folder: an existing folder.
        name: name of the shard.
        tokens: the concatenated documents, [sum(lengths)].
        lengths: tokens of each document, [documents].
        dtype: the type to store tokens as.
    """
    raw = np.ascontiguousarray(tokens, DTYPES[dtype]).data.cast("B")
    index = encode_index(lengths, dtype)
    write_synced(folder / f"{name}.bin", raw)
    write_synced(folder / f"{name}.idx", index)
    return describe_shard(name, raw, index, tokens=len(tokens), documents=len(lengths))


def describe_shard(
    name: str,
    raw: memoryview,
    index: bytes,
    *,
    tokens: int,
    documents: int,
    external_bin: Path | None = None,
    bin_start: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Shard:
    """Return the manifest's entry for a shard. `progress` is called with the bytes hashed so far."""
    file_hash, blocks = xxhash.xxh3_128(), []
    for start in range(0, len(raw), BLOCK_BYTES):
        block = raw[start : start + BLOCK_BYTES]
        file_hash.update(block)
        blocks.append(xxhash.xxh3_64_hexdigest(block))
        progress(start + len(block))
    return Shard(
        name=name,
        tokens=tokens,
        documents=documents,
        bin_bytes=len(raw),
        idx_bytes=len(index),
        bin_xxh3_128=file_hash.hexdigest(),
        idx_xxh3_128=xxhash.xxh3_128_hexdigest(index),
        bin_blocks_xxh3_64="".join(blocks),
        external_bin=None if external_bin is None else str(external_bin),
        bin_start=bin_start,
    )


def is_shard_intact(folder: Path, shard: Shard) -> bool:
    """Return whether both files of a shard exist in `folder` and match the checksums of its manifest entry."""
    try:
        files = [(folder / f"{shard.name}{ending}").read_bytes() for ending in (".bin", ".idx")]
    except OSError:
        return False
    return [xxhash.xxh3_128_hexdigest(file) for file in files] == [shard.bin_xxh3_128, shard.idx_xxh3_128]
