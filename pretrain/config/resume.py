"""What a setting says about resuming: whether it may change, and where a run began."""

from __future__ import annotations

from typing import Literal

from data_pipeline.settings import Settings


class MayChange:
    """Marks a setting that may change on resume.

    Either it changes no number of the run except by rounding, or users change it on purpose and the run continues with
    the new value (a stage of the mixture, the batch size).
    """


class MayChangeAhead:
    """Marks a setting of the schedule, which may change on resume if it changes no step already taken.

    `pretrain.train.schedule_change` compares the learning rate and the batch of every such step.
    """


AncestorMode = Literal["weights", "full", "upcycle", "gqa"]
"""What a run took over from a checkpoint: see `run.init_mode`, and for the others `pretrain convert --help`."""


class Ancestor(Settings):
    """A checkpoint that a run began from."""

    run: str
    """Run directory of the checkpoint, or the checkpoint's own folder if it lay in none; an absolute path."""

    step: int
    """Steps that it had taken."""

    samples: int
    """Sequences that it had read."""

    mode: AncestorMode
    """What was taken over, or how it was converted."""

    generation: str
    """Id of the checkpoint, unique to each save."""

    config: str
    """XXH3 hash, 128 bits, of the settings in the checkpoint."""
