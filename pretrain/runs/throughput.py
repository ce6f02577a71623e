"""Tokens per second and MFU of a run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pretrain.estimate.hardware import Accelerator


@dataclass(frozen=True)
class StepThroughput:
    """Throughput of one step."""

    step_s: float
    tokens_per_s: float
    mfu: float | None
    """Model FLOP/s over peak FLOP/s; None if the peak is unknown."""


@dataclass(frozen=True)
class AverageThroughput:
    """Throughput over the recent steps, and the remaining time at this rate."""

    tokens_per_s: float
    mfu: float | None
    seconds_left: float


class ThroughputMeter:
    """Times the steps. Time inside `paused()` (validation, saving) counts for no step.

    The first step of an attempt includes compilation and warm-up. It is reported, but excluded from the average
    throughput.
    """

    def __init__(
        self,
        *,
        total_tokens: int,
        tokens_done: int = 0,
        peak_flops: float | None,
        window: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start timing the first step.

        Args:
            total_tokens: tokens of the whole run.
            tokens_done: tokens consumed before this attempt.
            peak_flops: of all devices together, in FLOP/s; None reports no MFU.
            window: steps in the average.
            clock: returns seconds.
        """
        self._tokens_left = total_tokens - tokens_done
        self._peak_flops = peak_flops
        self._clock = clock
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=window)
        self._is_warm = False
        self._step_start = clock()

    def step(self, tokens: int, flops_per_token: float) -> StepThroughput:
        """End the current step and start the next.

        Args:
            tokens: tokens that the step consumed.
            flops_per_token: forward and backward, at the step's sequence length, counted as `mfu_statement` says.
        """
        now = self._clock()
        seconds, self._step_start = now - self._step_start, now
        self._tokens_left -= tokens
        if self._is_warm:
            self._recent.append((tokens, tokens * flops_per_token, seconds))
        self._is_warm = True
        rate = tokens / seconds
        return StepThroughput(seconds, rate, self._mfu(rate * flops_per_token))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block's time from the current step."""
        start = self._clock()
        try:
            yield
        finally:
            self._step_start += self._clock() - start

    def average(self) -> AverageThroughput | None:
        """Return the average over the recent steps; None until the second step has ended."""
        if not self._recent:
            return None
        tokens, flops, seconds = (sum(column) for column in zip(*self._recent, strict=True))
        rate = tokens / seconds
        return AverageThroughput(rate, self._mfu(flops / seconds), max(0, self._tokens_left) / rate)

    def _mfu(self, flops_per_s: float) -> float | None:
        return None if self._peak_flops is None else flops_per_s / self._peak_flops


def mfu_statement(flops_per_token: float, device_name: str, accelerator: Accelerator | None, devices: int = 1) -> str:
    """Return one sentence: what MFU counts and what it divides by, or why there is no MFU.

    `devices` is their number.
    """
    if accelerator is None:
        return f"No MFU: the peak of {device_name} at this precision is not known for certain"
    times = f"{devices} x " if devices > 1 else ""
    peak = f"{times}{accelerator.bf16_flops / 1e12:,.0f} TFLOP/s ({accelerator.label}, dense bf16)"
    return (
        f"MFU counts {flops_per_token / 1e9:.3g} GFLOP a token (6 N_matmul + causal attention, forward and backward, "
        f"no recomputation) against {peak}"
    )
