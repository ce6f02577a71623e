"""Rows of a data rank, to tensors in host memory, to microbatches on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.reading.packing import NO_LABEL, Batch
from parallel.engine import Microbatch
from pretrain.model.moe.rows import PADDING


@dataclass(frozen=True)
class DataShard:
    """The contiguous rows of every global batch that data rank `rank` reads. The ranks differ by at most one row.

    All ranks run the same number of full microbatches: missing rows are padding without labels.
    """

    rank: int = 0
    ranks: int = 1

    def rows(self, n_rows: int) -> range:
        """Return the rows of a batch of `n_rows` that this rank reads; the range may be empty."""
        return range(n_rows * self.rank // self.ranks, n_rows * (self.rank + 1) // self.ranks)

    def padded_rows(self, n_rows: int, micro_batch: int) -> int:
        """Return the number of rows of every rank after padding to full microbatches of `micro_batch` rows.

        Compiled graphs and pipeline schedules are built for one microbatch size.
        """
        most = -(-n_rows // self.ranks)
        return -(-most // micro_batch) * micro_batch


def pad_batch(batch: Batch, n_rows: int) -> Batch:
    """Append rows until the batch has `n_rows`. An added row is one document without labels."""
    missing, seq_len = n_rows - len(batch.input_ids), batch.input_ids.shape[1]
    if missing == 0:
        return batch
    empty = np.zeros((missing, seq_len), np.int32)
    return replace(
        batch,
        input_ids=np.concatenate((batch.input_ids, empty)),
        labels=np.concatenate((batch.labels, np.full_like(empty, NO_LABEL))),
        document_ids=np.concatenate((batch.document_ids, empty)),
        row_ids=np.concatenate((_row_ids(batch), np.full(missing, PADDING))),
    )


def _row_ids(batch: Batch) -> NDArray[np.int64]:
    """The batch's row ids; 0, 1, 2, ... for one that was read from no stream."""
    return np.arange(len(batch.input_ids)) if batch.row_ids is None else batch.row_ids


@dataclass(frozen=True)
class HostBatch:
    """A data rank's rows of a global batch, in host memory (pinned for a GPU).

    Tensors are [sequences, seq_len], int32.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    document_ids: Tensor
    n_targets: NDArray[np.int64]
    """Tokens with a label, per sequence."""
    row_ids: NDArray[np.int64]
    """Of each sequence, as in `Microbatch`."""
    damaged: tuple[str, ...]
    """One message per sequence that could not be read and was left out."""


def to_host(batch: Batch, device: torch.device) -> HostBatch:
    """Copy a batch to (pinned) host tensors and count its targets.

    Runs in the prefetch thread, not in the training thread.
    """
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
        _row_ids(batch),
        batch.damaged,
    )


def split_microbatches(batch: HostBatch, size: int, device: torch.device) -> Iterator[Microbatch]:
    """Cut a batch into microbatches of `size` sequences. On CUDA the copies do not wait for each other.

    Raises ValueError for a batch that was not padded to full microbatches (`DataShard.padded_rows`, `pad_batch`): the
    last microbatch would be smaller, and compiled once more.
    """
    if len(batch.input_ids) % size:
        raise ValueError(f"a batch of {len(batch.input_ids)} rows does not divide into microbatches of {size}")
    for start in range(0, len(batch.input_ids), size):
        rows = slice(start, start + size)
        yield Microbatch(
            input_ids=_to(device, batch.input_ids[rows]),
            labels=_to(device, batch.labels[rows]),
            positions=batch.positions[rows],
            document_ids=batch.document_ids[rows],
            n_targets=int(batch.n_targets[rows].sum()),
            row_ids=torch.from_numpy(batch.row_ids[rows]),
        )


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device, non_blocking=True).long()
