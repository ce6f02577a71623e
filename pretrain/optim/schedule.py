"""Learning rate and batch size as pure functions of the step. No torch and no state: resuming needs only the step.

Steps count from 1. Step `s` is the s-th update, and the last one is step `train.steps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pretrain.config import OptimConfig, TrainConfig
from pretrain.errors import UserError

WSD_DECAY = 0.2
"""`auto` length of the final decay of `wsd`, as a fraction of the run. Longer decays gain little (arXiv:2405.18392)."""

_DECAY: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
"""{shape: function from the progress of the decay in [0, 1] to what is left of the peak, from 1 to 0}."""


def learning_rate(step: int, train: TrainConfig, optim: OptimConfig) -> float:
    """Learning rate of `step`. Raises as `lr_scale`."""
    return lr_scale(step, train.steps, optim) * optim.lr


def lr_scale(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of `step`, as a multiple in [0, 1] of the peak.

    The warm-up rises from 1/warmup at step 1 to 1 at step `warmup`. The last step of a decay has `min_lr_ratio`.
    `inverse_sqrt` is sqrt(warmup / step) (arXiv:1706.03762, equation 3), but at least `min_lr_ratio`. `constant` stays
    at the peak. `config.decay` must be resolved.

    Raises:
        ValueError: the step is outside of the run.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step {step} is outside the run of {total_steps} steps")
    if step <= config.warmup:
        return step / config.warmup
    if config.schedule == "inverse_sqrt":
        return max(config.min_lr_ratio, math.sqrt(max(config.warmup, 1) / step))
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        shape, length = config.decay_shape, wsd_decay_steps(total_steps, config)
    else:
        shape, length = config.schedule, total_steps - config.warmup
    done = step - (total_steps - length)
    if done <= 0:
        return 1.0
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * _DECAY[shape](done / length)


def wsd_decay_steps(total_steps: int, config: OptimConfig) -> int:
    """Steps of the final decay of `wsd`: `decay` of the run, rounded, and at least one unless `decay` is 0."""
    return max(1, round(config.decay * total_steps)) if config.decay else 0


def batch_size_at(step: int, train: TrainConfig) -> int:
    """Sequences in the global batch of `step`.

    `batch_ramp_start` at step 1, `batch_size` from step `batch_ramp_steps` + 1 on, and in between it grows linearly,
    rounded down.
    """
    ramped = step - 1
    if ramped >= train.batch_ramp_steps:
        return train.batch_size
    return train.batch_ramp_start + (train.batch_size - train.batch_ramp_start) * ramped // train.batch_ramp_steps


def samples_before(step: int, train: TrainConfig) -> int:
    """Sequences that all steps before `step` consume: the first sample of `step`. Exact, in O(log(ramp)) time."""
    steps = step - 1
    if not train.batch_ramp_steps:
        return steps * train.batch_size
    ramped = min(steps, train.batch_ramp_steps)
    grown = _sum_of_floors(ramped, train.batch_size - train.batch_ramp_start, train.batch_ramp_steps)
    return ramped * train.batch_ramp_start + grown + (steps - ramped) * train.batch_size


def _sum_of_floors(terms: int, slope: int, divisor: int) -> int:
    """Sum of floor(slope * i / divisor) for i in [0, terms), all non-negative integers.

    This counts the lattice points under a line. The integer part of the slope has a closed form. For the rest the axes
    change roles, as in Euclid's algorithm (Graham, Knuth, Patashnik, Concrete Mathematics, section 3.5).
    """
    total, offset = 0, 0
    while terms:
        total += (slope // divisor) * (terms * (terms - 1) // 2) + (offset // divisor) * terms
        slope, offset = slope % divisor, offset % divisor
        terms, offset = divmod(slope * terms + offset, divisor)
        slope, divisor = divisor, slope
    return total


def check(optim: OptimConfig, train: TrainConfig) -> None:
    """Check that the schedules can follow the resolved settings.

    Raises:
        UserError: in one line, with the setting to change.
    """
    steps = train.steps
    if optim.warmup >= steps and optim.warmup > 0:
        raise UserError(
            f"optim.warmup={optim.warmup} is not below train.steps={steps}: no step would be left to train at the "
            f"peak; try optim.warmup={steps // 10}"
        )
    if optim.schedule == "wsd":
        _check_decay(optim, steps)
    if train.batch_ramp_steps > steps:
        raise UserError(
            f"train.batch_ramp_steps={train.batch_ramp_steps} is longer than train.steps={steps}: the batch would "
            f"never reach train.batch_size={train.batch_size}; use at most {steps}"
        )
    if train.batch_ramp_steps and train.batch_ramp_start > train.batch_size:
        raise UserError(
            f"train.batch_ramp_start={train.batch_ramp_start} is above train.batch_size={train.batch_size}: the ramp "
            f"grows the batch; start at {train.batch_size} or less"
        )


def _check_decay(optim: OptimConfig, steps: int) -> None:
    decay = wsd_decay_steps(steps, optim)
    if optim.warmup + decay > steps:
        raise UserError(
            f"optim.warmup={optim.warmup} and optim.decay={optim.decay} ({decay} steps) together are longer than "
            f"train.steps={steps}; shorten one of them, such as optim.warmup={steps - decay}"
        )
