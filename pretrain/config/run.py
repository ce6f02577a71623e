"""Settings of a run and what it leaves: the `run`, `checkpoint` and `log` sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.settings import Settings
from pretrain.config.resume import Ancestor, MayChange


class RunSettings(Settings):
    """Where a run lives, its seed, and the run that it begins from."""

    dir: Annotated[Path, MayChange()] = Path("runs/default")
    """Run directory: config.yaml, metrics.jsonl, events.jsonl, checkpoints/, report.html. An existing run resumes."""

    seed: int = Field(default=1234, ge=-(2**63), lt=2**64)
    """Seed of the initial weights and of the data order."""

    init_from: str | None = None
    """Begin from a checkpoint of another run, which is only read: RUN (its newest checkpoint) or RUN@STEP. RUN is a run
    directory, or the folder of one checkpoint. The run takes that run's model, and must use its tokenizer. Once it has
    checkpoints of its own, it resumes from those."""

    init_mode: Literal["weights", "full"] = "weights"
    """What `init_from` takes over. `weights`: only the weights; steps, data and schedule begin anew. `full`: also the
    optimizer state, the data position and the step count. train.steps then includes the steps of the other run, and
    with the same settings the losses are those that the other run would have had."""

    ancestry: tuple[Ancestor, ...] = ()
    """Written by the program: the checkpoint that the run began from, then the one that run began from, and so on."""


class CheckpointConfig(Settings):
    """How often checkpoints are saved, how many are kept, and what happens when they are lost."""

    every: int = Field(default=250, gt=0)
    """Steps between checkpoints. The last step and a stopped run are always saved."""

    keep: int = Field(default=3, gt=0)
    """How many of the newest checkpoints to keep. An older one is deleted after the next one is complete."""

    on_invalid: Literal["stop", "go_back"] = "stop"
    """What to do when a checkpoint that events.jsonl names is missing, or no checkpoint is valid: stop with an error,
    or go back to the newest valid one, or to step 0 if there is none. Going back moves damaged checkpoints and old
    records out of the way. `go_back` does nothing while no checkpoint is lost. A newest checkpoint that is only damaged
    does not stop the run, whatever this setting says: the run continues from the valid one before it."""


class LogConfig(Settings):
    """Where a run is logged besides metrics.jsonl and events.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard event files to `tensorboard/` in the run directory."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases. `offline` writes to the run directory, for `wandb sync`."""

    wandb_project: str = "pretrain"
    """Weights & Biases project."""

    samples: tuple[str, ...] = ()
    """Prompts that the trained model continues at the end of the run, shown in the report."""
