"""Batches as a pure function of (split, settings, sample number): the whole state of a run's data is one integer, the samples consumed.

A sample is `seq_len` tokens. The global batch that starts at sample g is the slice [g, g + B). A data rank reads its part by asking
for that part of the slice; nothing here knows how many ranks there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import xxhash

from data_pipeline.errors import DataError
from data_pipeline.reading.best_fit import BestFitPlan, read_best_fit
from data_pipeline.reading.mixture import Mixture, build_mixture
from data_pipeline.reading.packing import Batch, count_sequences, read_concatenated
from data_pipeline.settings import MixtureConfig
from data_pipeline.storage.shards import open_split

PREFETCH = 2
"""Batches read ahead."""

_BLOCKS_KEPT = 4

T = TypeVar("T")


class Loader:
    """Sequences of one prepared split.

    With `window` above `seq_len` the order is one of windows of `window` tokens, whose parts of `seq_len` tokens are samples in a row.
    So a run may begin with short sequences and go on with longer ones: it reads the same windows in the same order. The last window of
    a source is filled up; a sample that lies behind the source's end is all padding, without labels.
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
        """Open the split in `folder`; reads its manifest and no token. With `best_fit` it also makes the plan where there is none.

        Args:
            folder: of the split.
            seq_len: tokens in a sample.
            seed: of the order.
            mixture: of the sources.
            packing: how documents become sequences.
            window: the longest sequence that the run ever asks for, a multiple of `seq_len`; None is `seq_len`.
            total_samples: what the run reads, for the stages and the limit of the mixture; None is not known.
            on_damage: whether damaged tokens are an error or a row without labels.
            trusted_paths: folders and files outside of it whose tokens the split may name; None trusts every place.

        Raises:
            DataError: the split is not there or incomplete, or the training split holds less than one sequence (a held-out split
                may: it is one padded sequence then), or the settings do not fit it or each other.
        """
        self.seq_len, self.window, self.seed, self.packing = seq_len, window or seq_len, seed, packing
        if self.window % seq_len:
            raise DataError(f"the longest sequence, {window}, is not a multiple of data.seq_len={seq_len}; change one")
        if packing == "best_fit" and self.window > seq_len:
            raise DataError(
                f"data.packing=best_fit packs for one length, and the run asks for {seq_len} to {self.window} tokens; use concatenate"
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
        self._parts = self.window // seq_len  # samples in a window
        self._plans = [BestFitPlan(shards, seq_len) for shards in self.sources] if packing == "best_fit" else []
        sizes = (
            {plan.shards.source.name: plan.n_sequences for plan in self._plans}
            if self._plans
            else {shards.source.name: count_sequences(shards.n_tokens, self.window) for shards in self.sources}
        )
        self.n_sequences = sum(sizes.values()) * self._parts
        """Samples in which everything is read once."""
        self.mixture = build_mixture(mixture, sizes, seed, total_samples, self._parts)
        """Of windows of `window` tokens."""
        self._shuffled = ShuffledIndex(self.mixture)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples in which each source is read once; 0 where the split holds nothing of it."""
        return {
            name: windows * self._parts for name, windows in zip(self.mixture.names, self.mixture.sizes, strict=True)
        }

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the split's manifest: equal fingerprints are equal data."""
        return self.manifest.fingerprint()

    @property
    def packing_efficiency(self) -> float:
        """Share of the positions that hold tokens and not padding, that of samples which are all padding included."""
        return self.n_tokens / (self.n_sequences * self.seq_len)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples read each source."""
        return self.mixture.epochs(samples // self._parts)

    def order_fingerprint(self, samples: int) -> str:
        """Hash of all that decides the first `samples` samples: loaders of equal pasts give the same ones."""
        mixture = self.mixture.order_fingerprint(-(-samples // self._parts))
        return xxhash.xxh3_128_hexdigest(
            repr((self.fingerprint, self.seq_len, self.window, self.packing, mixture)).encode()
        )

    def batch(self, first: int, count: int, seq_len: int | None = None) -> Batch:
        """Samples [first, first + count) of the endless shuffled stream.

        Args:
            first: sample.
            count: samples.
            seq_len: tokens in a row, a multiple of the sample's that divides `window`: a row is that many samples in a row, so
                there are fewer rows. `first` and `count` are multiples of as many. None is the sample's.

        Raises:
            DataError: a block of a shard does not match its checksum, unless damage is skipped; or a file cannot be opened.
            ValueError: `seq_len`, `first` or `count` does not fit.
        """
        together, rest = divmod(seq_len or self.seq_len, self.seq_len)
        if rest or not together or self._parts % together or first % together or count % together:
            raise ValueError(
                f"samples {first} to {first + count} of {self.seq_len} tokens are not rows of {seq_len}, up to {self.window}"
            )
        return self._read(self._shuffled, first, count, together)

    def sequential(self, source: str, first: int, count: int) -> Batch:
        """Samples [first, first + count) of one source in the order of its shards, for validation; fewer rows where the source ends.

        Raises:
            DataError: a block of a shard does not match its checksum, unless damage is skipped; or a file cannot be opened.
        """
        samples = range(first, min(first + count, self.sizes[source]))
        return self._rows([self.mixture.names.index(source)] * len(samples), list(samples), 1)

    def order(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """What `batch` reads for samples [first, first + count): (number of the source, number of the source's sample) of each."""
        return self._samples(self._shuffled, first, count, 1)

    def _samples(self, order: ShuffledIndex, first: int, count: int, step: int) -> tuple[list[int], list[int]]:
        """Every `step`-th one."""
        parts, window = self._parts, first // self._parts
        sources, sequences = order.windows(window, -(-(first + count) // parts))
        if parts == 1:
            return sources, sequences
        samples = range(first - window * parts, first - window * parts + count, step)
        return [sources[at // parts] for at in samples], [sequences[at // parts] * parts + at % parts for at in samples]

    def _read(self, order: ShuffledIndex, first: int, count: int, together: int) -> Batch:
        """Rows of `together` samples each."""
        return self._rows(*self._samples(order, first, count, together), together)

    def _rows(self, sources: list[int], samples: list[int], together: int) -> Batch:
        """A row for each (number of the source, number of its sample), of `together` samples from there on."""
        if self._plans:
            return read_best_fit(
                self._plans, list(zip(sources, samples, strict=True)), self.seq_len, self.manifest.eot_id, self._skip
            )
        rows = [(source, sample * self.seq_len) for source, sample in zip(sources, samples, strict=True)]
        return read_concatenated(self.sources, rows, together * self.seq_len, self.manifest.eot_id, self._skip)


class ShuffledIndex:
    """The windows of a mixture, computed a block at a time; the last few blocks are kept."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._kept: deque[tuple[int, list[int], list[int]]] = deque(maxlen=_BLOCKS_KEPT)

    def windows(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """(number of the source, number of the source's sequence) of windows [start, stop)."""
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
        for kept in tuple(self._kept):  # a copy: prefetching may be adding one
            if kept[0] <= window < kept[0] + len(kept[1]):
                return kept
        block = self.mixture.block(window)
        self._kept.append(new := (block.first, block.sources.tolist(), block.sequences.tolist()))
        return new


def prefetch(
    read: Callable[..., Batch], requests: Iterable[tuple[int, ...]], transform: Callable[[Batch], T]
) -> Iterator[T]:
    """`transform(read(*request))` for each of `requests`, done ahead by one thread.

    An error in the thread is raised here, at its batch. Closing the generator ends the thread.

    Args:
        read: `Loader.batch` or `Loader.sequential`.
        requests: their arguments.
        transform: what else the thread does to a batch, such as moving it to pinned memory.
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
