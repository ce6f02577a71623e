"""What all conversions share: open the checkpoint of a run, and write the new one as a run directory of its own."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from data_pipeline.atomic import sync_folder, write_synced
from data_pipeline.tokenizing.tokenizer import load_tokenizer
from pretrain.checkpoint.manifest import TrainState
from pretrain.checkpoint.save import save_checkpoint
from pretrain.checkpoint.streaming import LazyTensor, TensorReader
from pretrain.checkpoint.verify import verify_checkpoint
from pretrain.config import RunConfig
from pretrain.config.saved import CONFIG_FILE, dump
from pretrain.console import format_disk_size
from pretrain.errors import UserError
from pretrain.setup.named_checkpoint import NamedCheckpoint, find_checkpoint


@dataclass(frozen=True)
class Source:
    """A verified checkpoint to convert."""

    checkpoint: NamedCheckpoint
    tensors: TensorReader
    tokenizer: Path
    """File of its tokenizer."""

    @property
    def config(self) -> RunConfig:
        """Settings of its run."""
        return self.checkpoint.config


@dataclass(frozen=True)
class Conversion:
    """A new model, and how its tensors are made."""

    kind: Literal["upcycle", "gqa"]
    config: RunConfig
    """Settings of the source with the new model."""
    tensors: Mapping[str, LazyTensor]
    """{canonical name: tensor} of the new model, as an engine's state has them."""
    description: str
    """How the weights were made, in one sentence, for the manifest."""


def open_source(name: str) -> Source:
    """Find the checkpoint that `name` (RUN, RUN@STEP, or its folder) names, read and verify all of it.

    Raises:
        UserError: it does not exist, is damaged, or its tokenizer is gone.
        StorageError: it cannot be read now.
    """
    checkpoint = find_checkpoint(name, name)
    problems = verify_checkpoint(checkpoint.path)
    if problems:
        raise UserError(f"{name}: {problems[0]}; restore it, or name another step as RUN@STEP")
    files = checkpoint.tokenizer_files
    theirs = checkpoint.manifest.tokenizer or next(iter(files), None)
    if theirs is None or theirs not in files:
        places = " or ".join(map(str, checkpoint.tokenizer_paths))
        raise UserError(f"{name}: its tokenizer is not at {places}; put it there, so that it can be copied")
    return Source(checkpoint, TensorReader(checkpoint.path), files[theirs])


def check_target(target: Path) -> None:
    """Raise UserError if the target exists, whatever it is: nothing is ever overwritten."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already and is left as it is; choose another OUT, or remove it first")


def write_run(
    target: Path, source: Source, conversion: Conversion, on_tensor: Callable[[int], None] = lambda n_bytes: None
) -> None:
    """Write a run directory with the converted checkpoint, of step 0, the settings and the tokenizer.

    It is written under another name and committed by one rename: whenever the process dies, `target` exists completely
    or not at all.

    Args:
        target: of the new run directory.
        source: what was converted.
        conversion: what to write.
        on_tensor: called with the bytes of each tensor before it is made.

    Raises:
        UserError: the target exists, or there is no room for it.
        OSError: the disk cannot be written. Nothing is left behind.
    """
    check_target(target)
    config = _with_ancestry(conversion, source.checkpoint, target)
    manifest = source.checkpoint.manifest
    state = TrainState(
        step=0,
        samples=0,
        config=config.model_dump(mode="json"),
        dataset=manifest.dataset,
        tokenizer=load_tokenizer(source.tokenizer).fingerprint,
        order="",
        layout={},
        conversion=conversion.description,
        rng={},
    )
    tensors = {name: _reported(tensor, on_tensor) for name, tensor in conversion.tensors.items()}
    partial = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        _check_room(partial, total_bytes(conversion))
        save_checkpoint(partial / "checkpoints", {"model": tensors}, state, file_per_tensor=True)
        write_synced(partial / "tokenizer.json", source.tokenizer.read_bytes())
        write_synced(partial / CONFIG_FILE, dump(config).encode())
        sync_folder(partial)
        check_target(target)
        partial.rename(target)
        sync_folder(target.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def total_bytes(conversion: Conversion) -> int:
    """Bytes of all tensors of the new model."""
    return sum(tensor.nbytes for tensor in conversion.tensors.values())


def _reported(tensor: LazyTensor, on_tensor: Callable[[int], None]) -> LazyTensor:
    """The same tensor, which says when it is made."""

    def make() -> Tensor:
        on_tensor(tensor.nbytes)
        return tensor.make()

    return LazyTensor.of(tuple(tensor.shape), make)


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"the checkpoint takes {format_disk_size(size)}, and {format_disk_size(free)} are free in "
            f"{folder.absolute().parent}: make room, or choose an OUT on another disk"
        )


def _with_ancestry(conversion: Conversion, source: NamedCheckpoint, target: Path) -> RunConfig:
    """The settings of the new run directory, which name the checkpoint that it was made from."""
    ancestor = source.as_ancestor(conversion.kind)
    before = conversion.config.run
    ancestry = (ancestor, *before.ancestry)
    run = before.model_copy(update={"dir": target, "init_from": None, "init_mode": "weights", "ancestry": ancestry})
    return conversion.config.model_copy(update={"run": run})
