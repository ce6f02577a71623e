"""The records of a run: types of the lines in `metrics.jsonl` and `events.jsonl`.

A number that is not finite is written as null, which every JSON reader accepts, and read back as NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, computed_field


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _null_to_nan(value: object) -> object:
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(_null_to_nan)]


class RunRecord(BaseModel):
    """One line of a record file. Unknown keys are ignored: a newer version may have written them."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")

    def line(self) -> str:
        """Return the record as one line of JSON, with its newline. Fields that are None are left out."""
        return self.model_dump_json(exclude_none=True) + "\n"


class RoutingStatistics(BaseModel):
    """How one step sent its tokens to experts, over the global batch. Tuples have an entry for each of `layers`.

    The load counts what the router chose, also what an expert then dropped.
    """

    model_config = RunRecord.model_config

    layers: tuple[int, ...]
    """Numbers of the layers with experts."""
    load_max: tuple[Number, ...]
    """Load of the fullest expert over the mean: 1 is even, experts / top_k the most."""
    dead: tuple[int, ...]
    """Experts that no token chose."""
    entropy: tuple[Number, ...]
    """Mean entropy of the router's scores, as a fraction of log(experts): 1 if they are equal, 0 if one expert has
    all."""
    dropped: tuple[Number, ...] | None = None
    """Fraction of the assignments that exceeded a capacity; None without one."""
    aux_loss: tuple[Number, ...] | None = None
    """Auxiliary loss without its weight: 1 if load or scores are even, below 1 if busy experts have low scores.
    None when it is off."""
    router_z_loss: tuple[Number, ...] | None = None
    """Mean log(Z)^2 of the router's logits, without its weight; None when it is off."""


class StepRecord(RunRecord):
    """One optimizer step, in `metrics.jsonl`."""

    step: int
    """Steps done, including this one."""
    samples: int
    """Sequences consumed since the start of the run."""
    tokens: int
    """Tokens consumed since the start of the run."""
    loss: Number
    """Mean cross-entropy of this step's tokens, in nats."""
    z_loss: Number | None = None
    """Mean log(Z)^2 times its weight; None when z-loss is off."""
    aux_loss: Number | None = None
    """What the auxiliary losses of all layers added to the training loss; None when they are off."""
    router_z_loss: Number | None = None
    """What the z-losses of all routers added to the training loss; None when they are off."""
    lr: Number
    grad_norm: Number
    """Global norm before clipping."""
    tokens_per_s: Number
    step_s: Number
    """Seconds this step took, without validation and saving."""
    mfu: Number | None = None
    """Fraction of the devices' peak FLOP/s; None when the peak is unknown."""
    time: float
    """Unix time at the end of the step."""
    attempt: int
    """1 for the first start, plus one for each resume."""
    routing: RoutingStatistics | None = None
    """None without experts."""


class SourceLoss(RunRecord):
    """Validation loss of one data source, and which experts it uses."""

    loss: Number
    """Mean cross-entropy in nats."""
    tokens: int
    """Tokens predicted."""
    expert_counts: dict[int, tuple[int, ...]] | None = None
    """For each layer with experts, how often each expert was chosen; None without experts."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return _exp(self.loss)


class ValidationRecord(RunRecord):
    """One validation after `step` steps, in `metrics.jsonl`."""

    step: int
    val_loss: Number
    """Mean cross-entropy in nats over all predicted tokens of all sources."""
    val_tokens: int
    """Tokens predicted."""
    by_source: dict[str, SourceLoss] = {}
    """Loss of each source; their mean, weighted by tokens, is `val_loss`. Empty in files of older versions."""
    time: float

    @computed_field  # type: ignore[prop-decorator]  # mypy does not support decorated properties (python/mypy#14461)
    @property
    def val_perplexity(self) -> float:
        """exp(val_loss)."""
        return _exp(self.val_loss)


class Event(RunRecord):
    """Something that happened, in `events.jsonl`.

    Kinds: start, resume, settings, save, skip_checkpoint, skip_data, notice, stop, finish, sample, output_lost,
    logger_failed, profile, profile_failed.
    """

    time: float
    """Unix time."""
    step: int | None = None
    """Steps done when it happened; None when no step is known yet."""
    kind: str
    text: str
    """One sentence for people; for a sample, the text that the model generated."""
    prompt: str | None = None
    """sample: the prompt."""
    parameters: int | None = None
    """start, resume: trainable parameters of the model."""
    active_parameters: int | None = None
    """start, resume: those that a token uses, fewer than `parameters` with experts."""
    device: str | None = None
    """start, resume: the device that the run uses."""
    profile: str | None = None
    """profile: path of the `ProfileSummary`, relative to the run directory."""
    mfu_statement: str | None = None
    """start, resume: what the MFU counts and divides by, or why there is none."""


@dataclass(frozen=True)
class Metrics:
    """Content of a `metrics.jsonl`, sorted by step. Of several records of a step, the last one written counts."""

    steps: list[StepRecord]
    validations: list[ValidationRecord]
