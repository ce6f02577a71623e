"""Settings of the mixture: how much of each source a run reads.

Imports only pydantic, like `data_pipeline.settings`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.settings_base import Settings

Weight = Annotated[float, Field(ge=0, le=1e30)]
"""The weight of a source, relative to those of the others."""


class MixtureStage(Settings):
    """Mixture weights that apply from some point of the run on."""

    start: str | int = Field(alias="from")
    """Where the stage begins: a percentage of the run such as `80%`, or a number of sequences of data.seq_len
    tokens."""

    weights: dict[str, Weight]
    """As in data.mixture.weights."""


class MixtureConfig(Settings):
    """How much of each source a run reads."""

    by: Literal["tokens", "epochs", "temperature"] = "epochs"
    """Meaning of the weights. `tokens`: fractions of the tokens. `epochs`: how often a source is read while a source of
    weight 1 is read once. `temperature` uses no weights: fractions are proportional to size^(1/temperature)."""

    weights: dict[str, Weight] = Field(default={})
    """Weight by source name. Sources that are not listed get 0. Empty reads every source once an epoch."""

    temperature: float = Field(default=1.0, ge=1)
    """`temperature`: 1 samples in proportion to size; large values sample uniformly (arXiv:1901.07291)."""

    max_epochs: float | None = Field(default=None, gt=0)
    """Refuse a run that would read a source more often than this; `none` only reports how often. Up to 4 epochs are
    almost as good as new text (arXiv:2305.16264)."""

    stages: tuple[MixtureStage, ...] = ()
    """Later weights. Appending a stage does not change the data order before it."""
