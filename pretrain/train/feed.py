"""Batches of numpy arrays -> microbatches of tensors on the device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.packing import NO_LABEL, Batch
from parallel.engine import Microbatch


def microbatches(batch: Batch, size: int, device: torch.device) -> Iterator[Microbatch]:
    """Cut a batch into microbatches of `size` sequences; the last one may be smaller. On CUDA the copies do not wait for each other."""
    for start in range(0, len(batch.input_ids), size):
        rows = slice(start, start + size)
        labels = batch.labels[rows]
        yield Microbatch(
            input_ids=_to(device, batch.input_ids[rows]),
            labels=_to(device, labels),
            positions=torch.from_numpy(batch.positions[rows]),
            document_ids=torch.from_numpy(batch.document_ids[rows]),
            n_targets=int(np.count_nonzero(labels != NO_LABEL)),
        )


def _to(device: torch.device, array: NDArray[np.integer]) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
