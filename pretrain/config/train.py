"""Settings of the training loop: the `train` and `eval` sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.settings import AUTO, OrAuto, Settings
from pretrain.config.resume import MayChange, MayChangeAhead


class ProfileConfig(Settings):
    """The steps that torch.profiler records."""

    start: int = Field(alias="from", gt=0)
    """First profiled step. The step before it warms the profiler up. A run resumed within the window profiles the
    rest."""

    steps: int = Field(default=3, gt=0, le=100)
    """Profiled steps."""


class TrainConfig(Settings):
    """How long to train, in what batches, and how to compute."""

    steps: Annotated[int, MayChangeAhead()] = Field(default=1000, gt=0)
    """Optimizer steps of the whole run. It may change on resume if every step already taken would have had the same
    learning rate."""

    batch_size: Annotated[int, MayChange()] = Field(default=32, gt=0)
    """Sequences in a global batch. If it changes on resume, the data continues at the sequence where it stopped."""

    batch_ramp_steps: Annotated[int, MayChangeAhead()] = Field(default=0, ge=0)
    """Steps over which the batch grows linearly from `batch_ramp_start` to `batch_size`; 0 is no ramp."""

    batch_ramp_start: Annotated[int, MayChangeAhead()] = Field(default=1, gt=0)
    """Sequences in the first global batch of a ramp."""

    micro_batch_size: Annotated[OrAuto[Annotated[int, Field(gt=0)]], MayChange()] = AUTO
    """Sequences in one forward and backward pass; gradients accumulate over the global batch. Every pass has this size:
    batches that do not fill it, as in a ramp or in validation, are padded with sequences that do not count. `auto` is
    the largest divisor of `batch_size` with at most 16,384 tokens, and with at most 10% padding over the run in a batch
    ramp."""

    z_loss: float = Field(default=0.0, ge=0, le=10)
    """Weight of log(Z)^2 in the loss (arXiv:2204.02311, section 5). It keeps the logits from drifting."""

    device: Annotated[OrAuto[Literal["cpu", "cuda"]], MayChange()] = AUTO
    """`auto` is CUDA if there is a GPU."""

    precision: OrAuto[Literal["bf16", "fp32"]] = AUTO
    """Number format of the forward and backward pass. Weights and optimizer state are always fp32. `auto` is bf16 if
    the device multiplies it natively."""

    recompute: Annotated[Literal["none", "full", "selective"], MayChange()] = "none"
    """Activations that the backward pass recomputes instead of keeping. `full` keeps only the inputs of blocks,
    `selective` also the results of expensive operators (`recompute_keep`)."""

    recompute_every: Annotated[int, MayChange()] = Field(default=1, gt=0)
    """Recompute only in every k-th block; 1 is all of them."""

    recompute_keep: Annotated[tuple[Literal["attention", "matmul", "collective"], ...], MayChange()] = (
        "attention",
        "matmul",
        "collective",
    )
    """`selective`: operators whose results are kept."""

    compile: Annotated[OrAuto[bool], MayChange()] = AUTO
    """torch.compile of every block and the loss. `auto` is on for CUDA, and on a CPU for runs long enough to repay it,
    if there is a C++ compiler."""

    attention: Annotated[OrAuto[Literal["sdpa", "blocked", "varlen", "flash_attn"]], MayChange()] = AUTO
    """Attention kernels: PyTorch's SDPA (everywhere), `blocked` matrix products (fastest on a compiled CPU), PyTorch's
    variable-length flash kernels, or the flash-attn package (both CUDA). `auto` is the fastest one available."""

    profile: Annotated[ProfileConfig | None, MayChange()] = None
    """Profile steps with torch.profiler on rank 0: `{from: STEP, steps: N}`; none is off. Writes a Chrome trace and a
    table of operators to `profile/` in the run directory, and shows the table in the report. The losses do not change.
    Every operator call of these steps is held in host memory until the last one; writing them then takes seconds. Steps
    whose operators are very short are slower while profiled, and so are their tokens/s in metrics.jsonl."""


class EvalConfig(Settings):
    """Validation on held-out documents during the run."""

    every: int = Field(default=250, gt=0)
    """Steps between validations. The first one is before step 1, the last one after the last step."""

    batches: int = Field(default=20, gt=0)
    """Batches of `train.batch_size` sequences to validate on, the same ones each time. They are divided among the
    sources in proportion to their held-out text, with at least 8 sequences each, or all that are held out. A source
    takes at least one microbatch on every data rank, so many sources make validation longer."""
