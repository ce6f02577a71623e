"""Read and write checkpoints one tensor at a time, for conversions of models that may be larger than the memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from pretrain.checkpoint.state_dict import unwrap_dcp_errors

_SECTION = "model"


class LazyTensor(Tensor):
    """A tensor without values. `save_checkpoint` makes them when it writes the tensor, and frees them afterwards."""

    make: Callable[[], Tensor]
    """Makes the values, on the CPU."""

    @staticmethod
    def of(shape: tuple[int, ...], make: Callable[[], Tensor]) -> LazyTensor:
        """Return an fp32 tensor of that shape."""
        lazy = torch.empty(shape, dtype=torch.float32, device="meta").as_subclass(LazyTensor)
        lazy.make = make
        return lazy

    # torch.distributed.checkpoint asks tensors that have this method for what it writes. `index` is always the whole.
    def __get_tensor_shard__(self, index: object) -> Tensor:
        """Return the values."""
        values = self.make()
        if values.shape != self.shape or values.dtype != self.dtype:
            raise ValueError(f"made {values.dtype}{list(values.shape)} for {self.dtype}{list(self.shape)}")
        return values


class TensorReader:
    """Reads single tensors of the model in a verified checkpoint."""

    def __init__(self, path: Path) -> None:
        """Read the index of the checkpoint at `path`, a pickle: verify the checkpoint first (`verify_checkpoint`)."""
        self._path = path
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
        self._saved = {
            key.removeprefix(f"{_SECTION}."): entry
            for key, entry in saved.items()
            if key.startswith(f"{_SECTION}.") and isinstance(entry, TensorStorageMetadata)
        }

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """{name: shape} of all tensors of the model."""
        return {name: tuple(entry.size) for name, entry in self._saved.items()}

    def read(self, name: str) -> Tensor:
        """Return a full tensor, whatever the layout that it was saved on."""
        entry = self._saved[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with unwrap_dcp_errors():
            dcp_load({_SECTION: {name: tensor}}, storage_reader=FileSystemReader(self._path), no_dist=True)
        return tensor
