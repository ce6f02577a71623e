"""What settings say about runs that go on: which may differ on resume, and where a run began. Imports no torch."""

from __future__ import annotations

from typing import Literal

from data_pipeline.settings import Settings


class MayChange:
    """Marks a setting that may differ when a run is resumed: it changes no number of the run but by rounding, or it
    is one that runs change on purpose, which then goes on from there (a stage of the mixture, the batch size)."""


class MayChangeAhead:
    """Marks a setting of the schedule. It may differ when a run is resumed if every step already taken would have had
    the same learning rate and batch; `pretrain.train.schedule_change` compares them."""


class Ancestor(Settings):
    """A checkpoint that a run began from."""

    run: str
    """Run directory of the checkpoint, or its own folder where that lay in none; an absolute path at that time."""

    step: int
    """Steps that it had taken."""

    samples: int
    """Sequences that it had read."""

    mode: Literal["weights", "full"]
    """What was taken over: see run.init_mode."""

    generation: str
    """Id of the checkpoint: no two saves share one."""

    config: str
    """XXH3 hash, 128 bits, of the settings in the checkpoint."""
