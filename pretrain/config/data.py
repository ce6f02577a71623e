"""Settings of the data: the `data` section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.settings import MixtureConfig, PrepareConfig, Settings
from pretrain.config.resume import MayChange


class SeqLenStageConfig(Settings):
    """Longer sequences from some point of the run on."""

    start: str | int = Field(alias="from")
    """Where the stage begins: a share of the run such as `80%`, or a number of sequences of data.seq_len tokens. It
    begins with the next whole step."""

    seq_len: int = Field(gt=0)
    """Tokens in a sequence: a multiple of the stage before. A batch keeps its tokens, so it has fewer sequences."""


class DataConfig(PrepareConfig):
    """Where the text comes from, how it becomes tokens, and how tokens become sequences.

    Settings that prepare the data may change on resume: a checkpoint identifies its data by the fingerprint of the
    shards.
    """

    path: Annotated[Path, MayChange()] = Path("data/default")
    """Prepared data set: train/ and validation/ shards with their manifests, and the tokenizer."""

    seq_len: int = Field(default=2048, gt=0)
    """Tokens in a training sequence."""

    seq_len_schedule: Annotated[tuple[SeqLenStageConfig, ...], MayChange()] = ()
    """Stages with longer sequences later in the run, each with `from` and `seq_len`. The text keeps its order."""

    window: Annotated[int | None, MayChange()] = Field(default=None, gt=0)
    """Tokens in a window, the unit in which text is shuffled: a multiple of the longest sequence. None takes the
    longest of seq_len and seq_len_schedule. Set it if longer sequences may be added later."""

    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents fill sequences. `concatenate`: one after the other, cut where a sequence ends. `best_fit`
    (arXiv:2404.10830): no document that fits into a sequence is cut, at the price of some padding."""

    mixture: Annotated[MixtureConfig, MayChange()] = MixtureConfig()

    on_damage: Annotated[Literal["stop", "skip"], MayChange()] = "stop"
    """If part of a shard does not match its checksum: stop, or skip the sequences that touch it and log each one."""
