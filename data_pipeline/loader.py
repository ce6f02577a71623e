"""Batches as a pure function of (split, seed, sample number): the whole state of a run's data is one integer, the samples consumed.

The global batch that starts at sample g is the slice [g, g + B). A data rank reads its part by asking for that part of the
slice; nothing here knows how many ranks there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.order import order_key, permute
from data_pipeline.packing import Batch, count_sequences, pack
from data_pipeline.shards import ShardSet

PREFETCH = 2
"""Batches read ahead."""


class Loader:
    """Sequences of one prepared split."""

    def __init__(self, folder: Path, seq_len: int, seed: int) -> None:
        """Open the split in `folder`; reads its manifest and no token.

        Raises:
            DataError: it is not there or incomplete, or the training split holds less than one sequence. A held-out split may:
                it is one padded sequence then.
        """
        self.shards = ShardSet.open(folder)
        self.seq_len, self.seed = seq_len, seed
        self.n_tokens = self.shards.n_tokens
        self.n_sequences = count_sequences(self.n_tokens, seq_len)
        """Sequences in an epoch."""
        if self.n_tokens < seq_len and self.shards.manifest.split == "train":
            raise DataError(
                f"data.seq_len={seq_len} is longer than the data: {folder} holds {self.n_tokens} tokens; "
                f"lower data.seq_len or prepare more text"
            )

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the split's manifest: equal fingerprints are equal data."""
        return self.shards.manifest.fingerprint()

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples [first_sample, first_sample + count) of the endless shuffled stream: each epoch is all sequences in a new order.

        Raises:
            DataError: a block of a shard does not match its checksum.
        """
        samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
        epochs, places = np.divmod(samples, self.n_sequences)
        sequences = np.empty(count, np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            sequences[here] = permute(places[here], self.n_sequences, order_key(self.seed, epoch))
        return pack(self.shards, sequences, self.seq_len)

    def sequential(self, first: int, count: int) -> Batch:
        """Sequences [first, first + count) in the order of the shards, for validation; fewer rows where the split ends.

        Raises:
            DataError: a block of a shard does not match its checksum.
        """
        return pack(self.shards, np.arange(first, min(first + count, self.n_sequences), dtype=np.int64), self.seq_len)


def prefetch(loader: Loader, slices: Iterable[tuple[int, int]]) -> Iterator[Batch]:
    """`loader.batch(first_sample, count)` for each of `slices`, read ahead by one thread.

    An error in the thread is raised here, at its batch. Closing the generator ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    waiting: deque[Future[Batch]] = deque()
    try:
        for first_sample, count in slices:
            waiting.append(pool.submit(loader.batch, first_sample, count))
            if len(waiting) > PREFETCH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
