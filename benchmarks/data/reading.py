"""Shards to batches: the speed of our loader, and how long it takes to open a large data set."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.data.measure import Measurements

SEQ_LEN, ROWS = 2048, 8
WEIGHTS = {"web": 0.5, "code": 0.3, "books": 0.2}


def document_lengths(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Return log-normal document lengths around 1500 tokens, `tokens` in all or a little less."""
    lengths = np.minimum(rng.lognormal(np.log(1500) - 0.5, 1.0, tokens // 1000).astype(np.int32) + 2, 100_000)
    return lengths[: int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), tokens))]


def write_split(folder: Path, shards: dict[str, int], write: Callable[[Path, str], Any]) -> Path:
    """Write a training split.

    Args:
        folder: gets the folder `train`. A split that is there already is kept.
        shards: number of shards of each source.
        write: writes one shard, given the split's folder and the shard's name, and returns its entry in the manifest.
    """
    from data_pipeline.settings import PrepareConfig
    from data_pipeline.storage.manifest import MANIFEST, Recipe, SourceManifest, SplitManifest

    split = folder / "train"
    if (split / MANIFEST).exists():
        return split
    split.mkdir(parents=True, exist_ok=True)
    sources = []
    for name, count in shards.items():
        entries = tuple(write(split, f"{name}-{number:05d}") for number in range(count))
        sources.append(
            SourceManifest(
                name=name,
                documents=sum(shard.documents for shard in entries),
                tokens=sum(shard.tokens for shard in entries),
                text_bytes=None,
                dtype="uint16",
                ends_with_eot=False,
                dropped={},
                repaired={},
                marked={},
                shards=entries,
            )
        )
    recipe = Recipe(settings=PrepareConfig(), trained_tokenizer=False, listings=(), lists="", made_with={})
    manifest = SplitManifest(
        split="train",
        splits=("train",),
        vocab_size=60_000,
        eot_id=0,
        tokenizer="",
        recipe=recipe,
        sources=tuple(sources),
    )
    (split / MANIFEST).write_bytes(manifest.to_bytes())
    return split


def gather_and_batches(folder: Path) -> Measurements:
    """Measure the tokens per CPU-second of a bare gather and of our loader, in turns. Returns medians."""
    from data_pipeline.reading.loader import Loader
    from data_pipeline.settings import MixtureConfig
    from data_pipeline.storage.shard_writer import write_shard

    rng = np.random.default_rng(0)

    def write_shard_file(split: Path, name: str) -> Any:
        lengths = document_lengths(rng, 20_000_000)
        return write_shard(split, name, rng.integers(0, 60_000, int(lengths.sum()), np.uint16), lengths, "uint16")

    split = write_split(folder / "read", {"web": 5, "code": 3, "books": 2}, write_shard_file)
    with (folder / "bare.bin").open("wb") as bare:
        for file in sorted(split.glob("*.bin")):
            bare.write(file.read_bytes())
    tokens = np.memmap(folder / "bare.bin", np.uint16, "r")
    loader = Loader(split, seq_len=SEQ_LEN, seed=1, mixture=MixtureConfig(by="tokens", weights=WEIGHTS))
    for first in range(0, 4 * loader.n_sequences, 64):  # read and check every block before the clock starts
        loader.batch(first, 64)
    tokens.sum()
    n_batches, sample = 512, 4 * loader.n_sequences
    rates: dict[str, list[float]] = {"gather": [], "batches": []}
    for _ in range(41):
        starts = (rng.integers(0, len(tokens) // SEQ_LEN, (n_batches, ROWS)) * SEQ_LEN).tolist()
        start = time.process_time()
        for rows in starts:
            np.stack([tokens[first : first + SEQ_LEN] for first in rows])
        rates["gather"].append(n_batches * ROWS * SEQ_LEN / (time.process_time() - start))
        start = time.process_time()
        for _ in range(n_batches):
            loader.batch(sample, ROWS)
            sample += ROWS
        rates["batches"].append(n_batches * ROWS * SEQ_LEN / (time.process_time() - start))
    return {name: median(values) for name, values in rates.items()}


def open_large(folder: Path) -> Measurements:
    """Measure how long it takes to open 10M documents of 10B tokens, and to find batches of later epochs.

    The shards are sparse files: nothing here reads a token.
    """
    import xxhash

    from data_pipeline.reading.loader import Loader
    from data_pipeline.storage.manifest import BLOCK_BYTES, Shard
    from data_pipeline.storage.shards import encode_index

    rng, size = np.random.default_rng(0), 250_000_000
    blocks = [xxhash.xxh3_64_hexdigest(bytes(n)) for n in (BLOCK_BYTES, size % BLOCK_BYTES)]

    def write_sparse_shard(split: Path, name: str) -> Shard:
        lengths = rng.integers(100, 1901, 125_000, np.int32)
        lengths[-1] += 125_000_000 - lengths.sum()
        index = encode_index(lengths, "uint16")
        (split / f"{name}.idx").write_bytes(index)
        with (split / f"{name}.bin").open("wb") as stream:
            stream.truncate(size)
        return Shard(
            name=name,
            tokens=125_000_000,
            documents=125_000,
            bin_bytes=size,
            idx_bytes=len(index),
            bin_xxh3_128="",
            idx_xxh3_128=xxhash.xxh3_128_hexdigest(index),
            bin_blocks_xxh3_64=blocks[0] * (size // BLOCK_BYTES) + blocks[1],
        )

    split = write_split(folder / "large", {"web": 50, "code": 20, "books": 10}, write_sparse_shard)
    before, start = resident_megabytes(), time.perf_counter()
    loader = Loader(split, seq_len=SEQ_LEN, seed=1)
    results = {"open_ms": 1e3 * (time.perf_counter() - start), "growth_mb": resident_megabytes() - before}
    n, order_ms = loader.n_sequences, []
    for epoch in range(20):
        for first in (epoch * n, epoch * n + n // 2, (epoch + 1) * n - ROWS):
            fresh = Loader(split, seq_len=SEQ_LEN, seed=1)  # without caches
            start = time.perf_counter()
            fresh.order(first, ROWS)
            order_ms.append(1e3 * (time.perf_counter() - start))
    return results | {"order_ms": order_ms, "tokens": loader.n_tokens, "documents": loader.manifest.documents}


def resident_megabytes() -> float:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
