"""Batches as a pure function of (split, settings, sample number). The only state is the number of samples consumed.

A sample is `seq_len` tokens. The global batch that starts at sample g is the slice [g, g + B). Each data rank requests
its part of the slice. The loader does not know how many ranks there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.reading.best_fit import BestFitPlan, read_best_fit
from data_pipeline.reading.mixture import Mixture, build_mixture
from data_pipeline.reading.packing import Batch, count_sequences, read_concatenated
from data_pipeline.settings import MixtureConfig
from data_pipeline.storage.shards import open_split

PREFETCH = 2
"""Batches that `prefetch` reads ahead."""

_CACHED_BLOCKS = 4

T = TypeVar("T")


class Loader:
    """Reads shuffled sequences of one prepared split.

    The unit that is shuffled is a window of `window` tokens. A window holds window / seq_len consecutive samples. So a
    run may begin with short sequences and continue with longer ones: it reads the same windows in the same order. The
    last window of a source is padded. Samples behind the end of the source are all padding, without labels.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seq_len: int,
        seed: int,
        mixture: MixtureConfig = MixtureConfig(),  # noqa: B008 - frozen
        packing: Literal["concatenate", "best_fit"] = "concatenate",
        window: int | None = None,
        total_samples: int | None = None,
        on_damage: Literal["stop", "skip"] = "stop",
        trusted_paths: Sequence[Path] | None = None,
    ) -> None:
        """Open the split in `folder` without reading tokens. With `best_fit`, make the plan if it is missing.

        Args:
            folder: the folder of the split.
            seq_len: tokens in a sample.
            seed: seed of the order.
            mixture: how to mix the sources.
            packing: how to pack documents into sequences.
            window: the longest sequence that the run ever requests, a multiple of `seq_len`. None means `seq_len`.
            total_samples: samples that the run reads, for the stages and `max_epochs` of the mixture. None if unknown.
            on_damage: raise an error for damaged tokens (`stop`), or turn their rows into padding without labels
                (`skip`).
            trusted_paths: as in `shards.open_split`.

        Raises:
            DataError: the split is missing or incomplete; the training split holds less than one sequence (a held-out
                split may: it becomes one padded sequence); or the settings do not fit the split or each other.
        """
        self.seq_len, self.window, self.seed, self.packing = seq_len, window or seq_len, seed, packing
        if self.window % seq_len:
            raise DataError(f"the longest sequence, {window}, is not a multiple of data.seq_len={seq_len}; change one")
        if packing == "best_fit" and self.window > seq_len:
            raise DataError(
                f"data.packing=best_fit packs for one length, and the run uses {seq_len} to {self.window} tokens; use "
                "concatenate"
            )
        split = open_split(folder, trusted_paths)
        self.manifest, self.sources = split.manifest, split.sources
        self.n_tokens = self.manifest.tokens
        if self.n_tokens < (self.window if self.manifest.split == "train" else 1):
            raise DataError(
                f"data.seq_len={self.window} is longer than the data: {folder} holds {self.n_tokens} tokens; "
                f"lower data.seq_len or prepare more text"
            )
        self._skip = on_damage == "skip"
        self._samples_per_window = self.window // seq_len
        self._plans = [BestFitPlan(shards, seq_len) for shards in self.sources] if packing == "best_fit" else []
        sizes = {shards.source.name: count_sequences(shards.n_tokens, self.window) for shards in self.sources}
        if self._plans:
            sizes = {plan.shards.source.name: plan.n_sequences for plan in self._plans}
        self.n_sequences = sum(sizes.values()) * self._samples_per_window
        """Samples in one epoch over all sources."""
        self.mixture = build_mixture(mixture, sizes, seed, total_samples, self._samples_per_window)
        """The mixture, in windows."""
        self._shuffled = ShuffledIndex(self.mixture)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples in one epoch of each source; 0 if the split holds nothing of the source."""
        return {
            name: windows * self._samples_per_window
            for name, windows in zip(self.mixture.names, self.mixture.sizes, strict=True)
        }

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the split's manifest: equal fingerprints are equal data."""
        return self.manifest.fingerprint()

    @property
    def packing_efficiency(self) -> float:
        """Fraction of the positions of one epoch that hold tokens, not padding."""
        return self.n_tokens / (self.n_sequences * self.seq_len)

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how often the first `samples` samples read each source."""
        return self.mixture.epochs(samples // self._samples_per_window)

    def order_fingerprint(self, samples: int) -> str:
        """Hash everything that the first `samples` samples depend on: equal fingerprints mean equal samples."""
        mixture = self.mixture.order_fingerprint(-(-samples // self._samples_per_window))
        return xxhash.xxh3_128_hexdigest(
            repr((self.fingerprint, self.seq_len, self.window, self.packing, mixture)).encode()
        )

    def batch(self, first: int, count: int, seq_len: int | None = None) -> Batch:
        """Read samples [first, first + count) of the endless shuffled stream.

        Args:
            first: first sample.
            count: number of samples.
            seq_len: tokens in a row: a multiple of the loader's `seq_len`, and a divisor of `window`. A row then holds
                several consecutive samples, and `first` and `count` must be multiples of that number. None means the
                loader's `seq_len`.

        Raises:
            DataError: a block of a shard does not match its checksum (unless damage is skipped), or a file cannot be
                opened.
            ValueError: `seq_len`, `first` or `count` does not fit.
        """
        per_row, rest = divmod(seq_len or self.seq_len, self.seq_len)
        if rest or not per_row or self._samples_per_window % per_row or first % per_row or count % per_row:
            raise ValueError(
                f"samples {first} to {first + count} of {self.seq_len} tokens are not rows of {seq_len}, up to "
                f"{self.window}"
            )
        rows = self._rows(*self._locate(first, count, per_row), per_row)
        return replace(rows, row_ids=np.arange(first, first + count, per_row))

    def sequential(self, source: str, first: int, count: int) -> Batch:
        """Read samples [first, first + count) of a source, unshuffled, for validation. Stops at its end.

        Raises:
            DataError: a block of a shard does not match its checksum (unless damage is skipped), or a file cannot be
                opened.
        """
        samples = range(first, min(first + count, self.sizes[source]))
        rows = self._rows([self.mixture.names.index(source)] * len(samples), list(samples), 1)
        return replace(rows, row_ids=np.arange(samples.start, samples.stop))

    def order(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """Return the (index of the source, sample of that source) that `batch` reads for samples [first, first +
        count)."""
        return self._locate(first, count, 1)

    def _locate(self, first: int, count: int, step: int) -> tuple[list[int], list[int]]:
        """Return (index of the source, sample of that source) for every `step`-th of samples [first, first + count)."""
        per_window, window = self._samples_per_window, first // self._samples_per_window
        sources, sequences = self._shuffled.windows(window, -(-(first + count) // per_window))
        if per_window == 1:
            return sources, sequences
        offset = first - window * per_window
        located = [divmod(sample, per_window) for sample in range(offset, offset + count, step)]
        return [sources[w] for w, _ in located], [sequences[w] * per_window + sample for w, sample in located]

    def _rows(self, sources: list[int], samples: list[int], per_row: int) -> Batch:
        """Read a row for each (index of the source, sample of that source): `per_row` samples from there on."""
        if self._plans:
            return read_best_fit(
                self._plans, list(zip(sources, samples, strict=True)), self.seq_len, self.manifest.eot_id, self._skip
            )
        rows = [(source, sample * self.seq_len) for source, sample in zip(sources, samples, strict=True)]
        return read_concatenated(self.sources, rows, per_row * self.seq_len, self.manifest.eot_id, self._skip)


class ShuffledIndex:
    """The shuffled order of a mixture's windows, computed one block at a time. Caches the last few blocks."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._cache: deque[tuple[int, list[int], list[int]]] = deque(maxlen=_CACHED_BLOCKS)

    def windows(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """Return (index of the source, sequence of that source) for windows [start, stop)."""
        sources: list[int] = []
        sequences: list[int] = []
        while start < stop:
            first, block_sources, block_sequences = self._block(start)
            low, high = start - first, min(stop - first, len(block_sources))
            sources += block_sources[low:high]
            sequences += block_sequences[low:high]
            start = first + high
        return sources, sequences

    def _block(self, window: int) -> tuple[int, list[int], list[int]]:
        """Return (first window, sources, sequences) of the block that holds `window`."""
        for cached in tuple(self._cache):  # a copy, because the prefetch thread may add a block
            if cached[0] <= window < cached[0] + len(cached[1]):
                return cached
        block = self.mixture.block(window)
        self._cache.append(new := (block.first, block.sources.tolist(), block.sequences.tolist()))
        return new


def prefetch(
    read: Callable[..., Batch], requests: Iterable[tuple[int, ...]], transform: Callable[[Batch], T]
) -> Iterator[T]:
    """Yield `transform(read(*request))` for each request. One thread computes the results ahead of time.

    An error in the thread is raised when its batch is due. Closing the generator ends the thread.

    Args:
        read: `Loader.batch` or `Loader.sequential`.
        requests: arguments for each call of `read`.
        transform: what the thread does to a batch after reading it, such as moving it to pinned memory.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    waiting: deque[Future[T]] = deque()
    try:
        for request in requests:
            waiting.append(pool.submit(lambda request: transform(read(*request)), request))
            if len(waiting) > PREFETCH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
