"""The rows of a data rank -> tensors in host memory -> microbatches on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.reading.packing import NO_LABEL, Batch
from parallel.engine import Microbatch


@dataclass(frozen=True)
class DataShard:
    """The part of every global batch that one of `ranks` data ranks reads: rows that follow each other, as many as the others have or one
    fewer. All give equally many whole microbatches: what is missing is filled up with rows that have no labels.
    """

    rank: int = 0
    ranks: int = 1

    def rows(self, n_rows: int) -> range:
        """Those that it reads of a batch of `n_rows`, none perhaps."""
        return range(n_rows * self.rank // self.ranks, n_rows * (self.rank + 1) // self.ranks)

    def padded_rows(self, n_rows: int, micro_batch: int) -> int:
        """How many rows every rank makes of its share: whole microbatches of `micro_batch` rows.

        Compiled graphs, and the schedule of a pipeline, are made for one size of microbatch.
        """
        most = -(-n_rows // self.ranks)
        return -(-most // micro_batch) * micro_batch


def pad_batch(batch: Batch, n_rows: int) -> Batch:
    """The batch with rows added that hold one document and no labels, until there are `n_rows`."""
    missing, seq_len = n_rows - len(batch.input_ids), batch.input_ids.shape[1]
    if missing == 0:
        return batch
    empty = np.zeros((missing, seq_len), np.int32)
    return replace(
        batch,
        input_ids=np.concatenate((batch.input_ids, empty)),
        labels=np.concatenate((batch.labels, np.full_like(empty, NO_LABEL))),
        document_ids=np.concatenate((batch.document_ids, empty)),
    )


@dataclass(frozen=True)
class HostBatch:
    """What a data rank reads of a global batch, in host memory, pinned where it goes to a GPU; each tensor [sequences, seq_len], int32."""

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    document_ids: Tensor
    n_targets: NDArray[np.int64]
    """Tokens with a label in each sequence."""
    damaged: tuple[str, ...]
    """A message for each sequence that could not be read and is left out."""


def to_host(batch: Batch, device: torch.device) -> HostBatch:
    """What the prefetching thread does to a batch: the copies to pinned memory, and the counting, are off the training thread."""
    pin = device.type == "cuda"

    def tensor(array: NDArray[np.int32]) -> Tensor:
        own = torch.from_numpy(np.ascontiguousarray(array))
        return own.pin_memory() if pin else own

    return HostBatch(
        tensor(batch.input_ids),
        tensor(batch.labels),
        torch.from_numpy(batch.positions),
        torch.from_numpy(batch.document_ids),
        np.count_nonzero(batch.labels != NO_LABEL, axis=1),
        batch.damaged,
    )


def split_microbatches(batch: HostBatch, size: int, device: torch.device) -> Iterator[Microbatch]:
    """Cut a batch into microbatches of `size` sequences. On CUDA the copies do not wait for each other.

    Raises ValueError for a batch that is not filled up (`Share.given`): the last microbatch would be smaller, and compiled once more.
    """
    if len(batch.input_ids) % size:
        raise ValueError(f"a batch of {len(batch.input_ids)} rows is not cut into whole microbatches of {size}")
    for start in range(0, len(batch.input_ids), size):
        rows = slice(start, start + size)
        yield Microbatch(
            input_ids=_to(device, batch.input_ids[rows]),
            labels=_to(device, batch.labels[rows]),
            positions=batch.positions[rows],
            document_ids=batch.document_ids[rows],
            n_targets=int(batch.n_targets[rows].sum()),
        )


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device, non_blocking=True).long()
