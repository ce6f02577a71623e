"""Settings of the optimizer and the learning rate: the `optim` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.settings import AUTO, OrAuto, Settings
from pretrain.config.resume import MayChangeAhead


class OptimConfig(Settings):
    """Optimizer and learning-rate schedule. Every schedule is a pure function of the step."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw` for all parameters, or `muon` for the matrices inside the blocks and AdamW for the rest."""

    lr: Annotated[float, MayChangeAhead()] = Field(default=3e-4, gt=0, le=1000)
    """Peak learning rate, reached after `warmup`."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    eps: float = Field(default=1e-8, gt=0, le=1)
    """AdamW's epsilon."""

    weight_decay: float = Field(default=0.1, ge=0, le=1000)
    """Decoupled weight decay of the matrices. Norms, biases and embeddings are not decayed."""

    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """`muon`: Nesterov momentum."""

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm if theirs is larger; none does not clip."""

    schedule: Annotated[Literal["cosine", "wsd", "linear", "inverse_sqrt", "constant"], MayChangeAhead()] = "cosine"
    """Shape of the learning rate after the warm-up. `inverse_sqrt`, `constant` and `wsd` before its decay do not
    depend on train.steps, so such a run can be extended later."""

    warmup: Annotated[OrAuto[Annotated[int, Field(ge=0)]], MayChangeAhead()] = AUTO
    """Steps of linear warm-up. `auto` is a tenth of the run, at most 2,000."""

    decay: Annotated[OrAuto[Annotated[float, Field(ge=0, le=1)]], MayChangeAhead()] = AUTO
    """`wsd`: length of the final decay, as a fraction of the run. `auto` is 0.2 (arXiv:2405.18392). Other schedules
    do not read it."""

    decay_shape: Annotated[Literal["linear", "sqrt", "cosine"], MayChangeAhead()] = "linear"
    """`wsd`: shape of the final decay; `sqrt` is 1 - sqrt(progress)."""

    min_lr_ratio: Annotated[float, MayChangeAhead()] = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""
