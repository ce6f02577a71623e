"""Settings of the mixture: how much of each source a run reads. Pydantic only, as `data_pipeline.settings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.settings_base import Settings

Weight = Annotated[float, Field(ge=0, le=1e30)]
"""Of a source, beside those of the others."""


class MixtureStage(Settings):
    """Other weights from some point of the run on."""

    start: str | int = Field(alias="from")
    """Where it begins: a share of the run such as `80%`, or a number of sequences of data.seq_len tokens."""

    weights: dict[str, Weight]
    """As in data.mixture.weights."""


class MixtureConfig(Settings):
    """How much of each source a run reads."""

    by: Literal["tokens", "epochs", "temperature"] = "epochs"
    """What weights mean: shares of the tokens, or times that a source is read while another of weight 1 is read once. `temperature`
    takes no weights: shares are proportional to size^(1/temperature)."""

    weights: dict[str, Weight] = Field(default={})
    """Weight by source name; unnamed sources get 0. Empty reads everything once an epoch."""

    temperature: float = Field(default=1.0, ge=1)
    """`temperature`: 1 is proportional to size, large values are uniform (arXiv:1901.07291)."""

    max_epochs: float | None = Field(default=None, gt=0)
    """Refuse a run that would read a source more often than this; none only says how often. Up to 4 is almost as good as new text
    (arXiv:2305.16264)."""

    stages: tuple[MixtureStage, ...] = ()
    """Later weights. Appending a stage leaves what was read before as it was."""
