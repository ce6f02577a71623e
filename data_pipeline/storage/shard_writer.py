"""Writing a shard: Megatron's `.bin` / `.idx` pair with a checksum for every MiB. The format is told in `shards.py`."""

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
    """Write `<name>.bin` and `<name>.idx` to `folder` and wait until they are on the disk.

    Args:
        folder: is there already.
        name: of the shard.
        tokens: the documents one after the other, [sum(lengths)].
        lengths: tokens of each document.
        dtype: what a token is stored as.
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
    """The manifest's entry for these bytes of tokens and this `.idx`; `progress` is given the bytes hashed so far."""
    whole, blocks = xxhash.xxh3_128(), []
    for start in range(0, len(raw), BLOCK_BYTES):
        block = raw[start : start + BLOCK_BYTES]
        whole.update(block)
        blocks.append(xxhash.xxh3_64_hexdigest(block))
        progress(start + len(block))
    return Shard(
        name=name,
        tokens=tokens,
        documents=documents,
        bin_bytes=len(raw),
        idx_bytes=len(index),
        bin_xxh3_128=whole.hexdigest(),
        idx_xxh3_128=xxhash.xxh3_128_hexdigest(index),
        bin_blocks_xxh3_64="".join(blocks),
        external_bin=None if external_bin is None else str(external_bin),
        bin_start=bin_start,
    )


def is_shard_intact(folder: Path, shard: Shard) -> bool:
    """Whether both files of a shard in `folder` are there, as the entry says."""
    try:
        files = [(folder / f"{shard.name}{ending}").read_bytes() for ending in (".bin", ".idx")]
    except OSError:
        return False
    return [xxhash.xxh3_128_hexdigest(file) for file in files] == [shard.bin_xxh3_128, shard.idx_xxh3_128]
