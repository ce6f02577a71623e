"""Verification of a prepared data set: reads every byte, and reports all problems, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import DataError, StorageError, unreadable_error
from data_pipeline.storage.manifest import (
    BLOCK_BYTES,
    DTYPES,
    MANIFEST,
    SPLITS,
    Shard,
    SourceManifest,
    SplitManifest,
    check_external_files,
    load_manifest,
)
from data_pipeline.storage.shards import decode_lengths, encode_index
from data_pipeline.tokenizing.tokenizer import load_tokenizer


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` read, and the problems it found."""

    splits: tuple[str, ...]
    shards: int
    bytes_read: int
    problems: tuple[str, ...]
    """One line for each problem; empty if the data set is valid."""


def verify(
    path: Path, progress: Callable[[int], None] = lambda _: None, trusted_paths: Sequence[Path] | None = None
) -> VerifyReport:
    """Check a prepared data set, or one split of it: sizes, checksums, counts, document ends, the tokenizer.

    Token files that are read in place are checked too.

    Args:
        path: `data.path`, or the folder of one split.
        progress: called with the bytes read so far, after every MiB and every `.idx`.
        trusted_paths: as in `shards.open_split`. Files elsewhere are not read, but reported as a problem.

    Raises:
        DataError: there is no prepared data at `path`.
        StorageError: a file cannot be read at the moment, so nothing is known about its contents.
    """
    is_split = (path / MANIFEST).is_file()
    folders = [path] if is_split else [path / name for name in reversed(SPLITS) if (path / name).is_dir()]
    if not folders:
        raise DataError(f"{path} holds no prepared data; run `pretrain data prepare`, or set data.path")
    problems: list[str] = []
    n_shards = n_bytes = 0

    def count(read: int) -> None:
        nonlocal n_bytes
        n_bytes += read
        progress(n_bytes)

    for folder in folders:
        try:
            manifest = load_manifest(folder)
            check_external_files(folder, manifest, trusted_paths)
        except StorageError:
            raise
        except DataError as error:
            problems.append(str(error))
            continue
        if not is_split:
            problems += _check_tokenizer(path, manifest)
            missing = [path / name for name in manifest.splits if path / name not in folders]
            problems += [f"{other} is missing; it was made together with {folder}" for other in missing]
        for source in manifest.sources:
            problems += _check_totals(folder, source)
            for shard in source.shards:
                problems += _check_shard(folder, shard, source, manifest, count)
                n_shards += 1
    return VerifyReport(tuple(folder.name for folder in folders), n_shards, n_bytes, tuple(problems))


def largest_id(tokens: NDArray[np.integer]) -> int:
    """Return the largest token id; -1 without tokens. A negative id counts as more than 2^31: not in any vocabulary."""
    return int(tokens.view(f"u{tokens.itemsize}").max()) if tokens.size else -1


def count_missing_eot(tokens: NDArray[np.integer], start: int, ends: NDArray[np.int64], eot_id: int) -> int:
    """Count the documents that end within these tokens with another token than end-of-text.

    Args:
        tokens: consecutive tokens of a stream.
        start: index of the first of them in the stream.
        ends: where each document of the stream ends, ascending.
        eot_id: the end-of-text token.
    """
    first, last = np.searchsorted(ends, [start, start + len(tokens)], side="right")
    return int(np.count_nonzero(tokens[ends[first:last] - 1 - start] != eot_id))


def _check_totals(folder: Path, source: SourceManifest) -> list[str]:
    problems = []
    for what in ("tokens", "documents"):
        total, parts = getattr(source, what), sum(getattr(shard, what) for shard in source.shards)
        if total != parts:
            problems.append(
                f"{folder / MANIFEST}: {source.name} has {total} {what} in all, but its shards list {parts}"
            )
    return problems


def _check_tokenizer(path: Path, manifest: SplitManifest) -> list[str]:
    try:
        tokenizer = load_tokenizer(path)
    except DataError as error:
        return [str(error)]
    if tokenizer.fingerprint != manifest.tokenizer:
        return [
            f"{path / 'tokenizer.json'} did not make {manifest.split}/: fingerprint {tokenizer.fingerprint}, not "
            f"{manifest.tokenizer}"
        ]
    return []


def _check_shard(
    folder: Path, shard: Shard, source: SourceManifest, manifest: SplitManifest, count: Callable[[int], None]
) -> list[str]:
    """Return the problems of one pair of files."""
    file = folder / f"{shard.name}.idx"
    try:
        index = file.read_bytes()
        count(len(index))
        if xxhash.xxh3_128_hexdigest(index) != shard.idx_xxh3_128:
            problems, ends = [f"{file}: does not match its checksum"], None
        else:
            problems, ends = _check_index(file, index, shard, source)
        return problems + _check_bin(folder, shard, source, manifest, ends, count)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return [f"{error.filename}: cannot be read: {error.strerror}"]
    except OSError as error:
        raise unreadable_error(error.filename or folder / shard.name, error, "read") from error


def _check_index(
    file: Path, index: bytes, shard: Shard, source: SourceManifest
) -> tuple[list[str], NDArray[np.int64] | None]:
    """Return (problems, where each document ends); the ends are None if there are problems."""
    lengths = decode_lengths(index)
    ends = np.cumsum(lengths, dtype=np.int64)
    if (
        index != encode_index(lengths, source.dtype)
        or len(lengths) != shard.documents
        or not lengths.all()
        or ends[-1:].sum() != shard.tokens
    ):
        return [f"{file}: does not describe {shard.documents} documents of {shard.tokens} tokens in all"], None
    return [], ends


def _check_bin(
    folder: Path,
    shard: Shard,
    source: SourceManifest,
    manifest: SplitManifest,
    ends: NDArray[np.int64] | None,
    count: Callable[[int], None],
) -> list[str]:
    """Return the problems of a token file, read a MiB at a time. `ends`: where its documents end, None if unknown."""
    file = Path(shard.external_bin or folder / f"{shard.name}.bin")
    problems: list[str] = []
    dtype, file_hash, size, n_missing_eot = DTYPES[source.dtype], xxhash.xxh3_128(), 0, 0
    expected = shard.block_checksums()
    with file.open("rb") as stream:
        stream.seek(shard.bin_start)
        for number, checksum in enumerate(expected):
            block = stream.read(min(BLOCK_BYTES, shard.bin_bytes - size))
            file_hash.update(block)
            if xxhash.xxh3_64_intdigest(block) != checksum:
                problems.append(f"{file}: block {number} of {len(expected)} does not match its checksum")
            tokens = np.frombuffer(block, dtype, len(block) // dtype.itemsize)
            if largest_id(tokens) >= manifest.vocab_size:
                problems.append(
                    f"{file}: block {number} holds token {largest_id(tokens)}, the vocabulary has {manifest.vocab_size}"
                )
            if ends is not None and source.ends_with_eot:
                n_missing_eot += count_missing_eot(tokens, size // dtype.itemsize, ends, manifest.eot_id)
            size += len(block)
            count(len(block))
        found_bytes = stream.seek(0, 2) - shard.bin_start
    if found_bytes < shard.bin_bytes or (found_bytes > shard.bin_bytes and shard.external_bin is None):
        problems.append(f"{file}: {found_bytes} bytes of tokens where the manifest says {shard.bin_bytes}")
    elif not problems and file_hash.hexdigest() != shard.bin_xxh3_128:
        problems.append(f"{file}: does not match its checksum")
    elif n_missing_eot:
        problems.append(
            f"{folder / shard.name}.idx: {n_missing_eot} documents do not end with the end-of-text token "
            f"{manifest.eot_id}"
        )
    return problems
