"""Reads every byte of a prepared data set and says what is wrong with it, all of it, not only the first thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.manifest import BLOCK_BYTES, DTYPES, MANIFEST, Manifest, Shard, load_manifest
from data_pipeline.shards import index_bytes, index_lengths
from data_pipeline.tokenizer import load_tokenizer


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` read and found."""

    splits: tuple[str, ...]
    shards: int
    bytes_read: int
    problems: tuple[str, ...]
    """One line for each thing that is wrong; empty if all is well."""


def verify(path: Path, progress: Callable[[int], None] = lambda _: None) -> VerifyReport:
    """Check a prepared data set (or one split of it) byte by byte: sizes, checksums, counts, document ends, the tokenizer.

    Args:
        path: `data.path`, or one split's folder.
        progress: is given the bytes read after every shard.

    Raises:
        DataError: there is nothing prepared at `path`.
    """
    is_split = (path / MANIFEST).is_file()
    folders = [path] if is_split else [path / name for name in ("train", "validation") if (path / name).is_dir()]
    if not folders:
        raise DataError(f"{path} holds no prepared data; run `pretrain data prepare`, or set data.path")
    problems: list[str] = []
    n_shards = n_bytes = 0
    for folder in folders:
        try:
            manifest = load_manifest(folder)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += _check_totals(folder, manifest)
        if not is_split:
            problems += _check_tokenizer(path, manifest)
        for shard in manifest.shards:
            problems += _check_shard(folder, shard, manifest)
            n_shards, n_bytes = n_shards + 1, n_bytes + shard.bin_bytes + shard.idx_bytes
            progress(n_bytes)
    return VerifyReport(tuple(folder.name for folder in folders), n_shards, n_bytes, tuple(problems))


def _check_totals(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    for what in ("tokens", "documents"):
        total, parts = getattr(manifest, what), sum(getattr(shard, what) for shard in manifest.shards)
        if total != parts:
            problems.append(f"{folder / MANIFEST}: {total} {what} in all, but its shards list {parts}")
    return problems


def _check_tokenizer(path: Path, manifest: Manifest) -> list[str]:
    try:
        tokenizer = load_tokenizer(path)
    except DataError as error:
        return [str(error)]
    if tokenizer.fingerprint != manifest.tokenizer:
        return [f"{path / 'tokenizer.json'} did not make {manifest.split}/: fingerprint {tokenizer.fingerprint}, not {manifest.tokenizer}"]
    return []


def _check_shard(folder: Path, shard: Shard, manifest: Manifest) -> list[str]:
    """Problems of one pair of files; reads a MiB at a time."""
    try:
        index = (folder / f"{shard.name}.idx").read_bytes()
        bin_problems, ends = _check_bin(folder / f"{shard.name}.bin", shard, manifest)
    except OSError as error:
        return [f"{error.filename}: cannot be read: {error.strerror}"]
    name = folder / f"{shard.name}.idx"
    if xxhash.xxh3_128_hexdigest(index) != shard.idx_xxh3_128:
        return [*bin_problems, f"{name}: does not match its checksum"]
    lengths = index_lengths(index)
    if index != index_bytes(lengths, manifest.dtype) or len(lengths) != shard.documents or int(lengths.sum()) != shard.tokens:
        return [*bin_problems, f"{name}: does not describe {shard.documents} documents of {shard.tokens} tokens in all"]
    if not bin_problems and not np.isin(np.cumsum(lengths) - 1, ends, assume_unique=True).all():
        return [f"{name}: a document does not end with the end-of-text token {manifest.eot_id}"]
    return bin_problems


def _check_bin(file: Path, shard: Shard, manifest: Manifest) -> tuple[list[str], NDArray[np.int64]]:
    """(problems, where the end-of-text tokens are)."""
    problems: list[str] = []
    ends: list[NDArray[np.int64]] = []
    whole, size = xxhash.xxh3_128(), 0
    expected = shard.blocks()
    with file.open("rb") as stream:
        for number, block in enumerate(iter(lambda: stream.read(BLOCK_BYTES), b"")):
            whole.update(block)
            if number >= len(expected) or xxhash.xxh3_64_intdigest(block) != expected[number]:
                problems.append(f"{file}: block {number} of {len(expected)} does not match its checksum")
            dtype = DTYPES[manifest.dtype]
            tokens = np.frombuffer(block, dtype, len(block) // dtype.itemsize)
            if tokens.size and int(tokens.max()) >= manifest.vocab_size:
                problems.append(f"{file}: block {number} holds token {tokens.max()}, the vocabulary has {manifest.vocab_size}")
            ends.append(np.flatnonzero(tokens == manifest.eot_id) + size // dtype.itemsize)
            size += len(block)
    if size != shard.bin_bytes:
        problems.append(f"{file}: {size} bytes where the manifest says {shard.bin_bytes}")
    elif not problems and whole.hexdigest() != shard.bin_xxh3_128:
        problems.append(f"{file}: does not match its checksum")
    return problems, np.concatenate([np.empty(0, np.int64), *ends])
