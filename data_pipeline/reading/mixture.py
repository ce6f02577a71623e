"""Which source each sample of a run comes from, and which of that source's sequences it is: a pure function, in O(1) memory.

Sources share the samples in proportion to integer weights. A binary tree over the sources splits them: of the first n samples that
reach a node of weights left and right, round(n * left / (left + right)) go left and the rest go right. So how many samples of each
source are among the first n has a closed form, grows by single steps, is never further from its exact share than half the depth of the
tree, and is exact after each cycle of as many samples as the sum of the weights.

That pattern is regular; to read it in random order, blocks of BLOCK samples (the last of a cycle is shorter) are each permuted with a
key of their own. Within a source samples count up 0, 1, 2, ... whatever the permutation: the k-th round through the source visits each
of its sequences exactly once, in an order of its own, and goes on where it was when a stage changes the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.hashing import splitmix64
from data_pipeline.reading.order import permutation_key, permute
from data_pipeline.settings import MixtureConfig

BLOCK = 4096
"""Samples that are permuted together."""

_SHARES = 10**6
_LARGEST_CYCLE = 1 << 49  # times 2 * BLOCK still fits an int64


@dataclass(frozen=True)
class ResolvedStage:
    """Weights from some sample on."""

    start: int
    weights: tuple[int, ...]
    """Samples of each source in a cycle."""


@dataclass(frozen=True)
class SampleBlock:
    """Consecutive samples."""

    first: int
    sources: NDArray[np.int64]
    """Number of each sample's source."""
    sequences: NDArray[np.int64]
    """Which of the source's sequences it is."""

    @property
    def stop(self) -> int:
        """One past the last sample."""
        return self.first + len(self.sources)


@dataclass(frozen=True)
class Mixture:
    """An endless stream of samples. Equal mixtures are equal streams."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Sequences of each source; a source of none has weight 0."""
    stages: tuple[ResolvedStage, ...]
    """The first begins at 0; starts rise."""
    seed: int | None
    """None permutes nothing: sources take turns, each in its own order."""

    def block(self, sample: int) -> SampleBlock:
        """The samples around `sample`: those of its block, up to where the next stage begins."""
        t = max(t for t, stage in enumerate(self.stages) if stage.start <= sample)
        stage = self.stages[t]
        first, sources = self._pattern(stage, sample - stage.start)
        if t + 1 < len(self.stages):
            sources = sources[: self.stages[t + 1].start - stage.start - first]
        before = np.array([a + b for a, b in zip(self._at_stages[t], counts(stage.weights, first), strict=True)])
        grouped = np.argsort(sources, kind="stable")
        ends = np.cumsum(np.bincount(sources, minlength=len(self.sizes)))
        sequences = np.empty(len(sources), np.int64)
        for source, places in enumerate(np.split(grouped, ends[:-1])):
            if places.size:
                sequences[places] = self._sequences(source, before[source] + np.arange(places.size))
        return SampleBlock(stage.start + first, sources, sequences)

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each source."""
        t = max(t for t, stage in enumerate(self.stages) if stage.start <= samples)
        return [a + b for a, b in zip(self._at_stages[t], self._in_stage(self.stages[t], samples), strict=True)]

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples read each source."""
        return {
            name: n / max(size, 1) for name, n, size in zip(self.names, self.counts(samples), self.sizes, strict=True)
        }

    def order_fingerprint(self, samples: int) -> str:
        """Hash of all that decides the first `samples` samples: equal pasts are equal samples. Later stages are no part of it."""
        stages = [(stage.start, stage.weights) for stage in self.stages if stage.start < samples]
        return xxhash.xxh3_128_hexdigest(json.dumps([self.seed, self.names, self.sizes, stages]).encode())

    @cached_property
    def _at_stages(self) -> list[list[int]]:
        """What `counts` is at the start of each stage."""
        found = [[0] * len(self.sizes)]
        for stage, later in pairwise(self.stages):
            found.append([a + b for a, b in zip(found[-1], self._in_stage(stage, later.start), strict=True)])
        return found

    def _in_stage(self, stage: ResolvedStage, stop: int) -> list[int]:
        """Samples [stage.start, stop) by source: whole blocks in closed form, the rest by looking."""
        first, sources = self._pattern(stage, stop - stage.start)
        rest = np.bincount(sources[: stop - stage.start - first], minlength=len(self.sizes)).tolist()
        return [a + b for a, b in zip(counts(stage.weights, first), rest, strict=True)]

    def _pattern(self, stage: ResolvedStage, sample: int) -> tuple[int, NDArray[np.int64]]:
        """(first sample of the block around `sample`, sources of the samples of that block); samples count from the stage's start."""
        cycle = sum(stage.weights)
        cycles, place = divmod(sample, cycle)
        first = cycles * cycle + place // BLOCK * BLOCK
        size = min(BLOCK, cycle - place // BLOCK * BLOCK)
        sources = pattern_sources(stage.weights, first, size)
        if self.seed is not None:
            sources = sources[permute(np.arange(size), size, permutation_key(self.seed, stage.start + first))]
        return first, sources

    def _sequences(self, source: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which sequence of its source the n-th sample of that source is, for rising n."""
        size = self.sizes[source]
        epochs, places = np.divmod(numbers, size)
        if self.seed is None:
            return places
        keys = splitmix64(np.uint64(permutation_key(self.seed, self.names[source])) ^ epochs.astype(np.uint64))
        return permute(places, size, keys)


def counts(weights: tuple[int, ...], n: int) -> list[int]:
    """How many of the first `n` samples of the regular pattern come from each source. Weights must not all be 0 unless n is."""
    if len(weights) == 1:
        return [n]
    half = len(weights) // 2
    left, total = sum(weights[:half]), sum(weights)
    to_left = (2 * n * left + total) // (2 * total) if n else 0
    return counts(weights[:half], to_left) + counts(weights[half:], n - to_left)


def pattern_sources(weights: tuple[int, ...], first: int, size: int) -> NDArray[np.int64]:
    """The source of each of the `size` (at most BLOCK) samples of the regular pattern from `first` on."""
    sources = np.zeros(size, np.int64)

    def split(low: int, high: int, before: int, here: NDArray[np.int64]) -> None:
        """The samples at `here` reach the node of sources [low, high), where `before` came before them."""
        if high - low == 1:
            sources[here] = low
        elif here.size:
            half = low + (high - low) // 2
            left, total = sum(weights[low:half]), sum(weights[low:high])
            went_left, rest = divmod(2 * before * left + total, 2 * total)
            goes_left = np.diff((rest + 2 * left * np.arange(here.size + 1)) // (2 * total)) > 0
            split(low, half, went_left, here[goes_left])
            split(half, high, before - went_left, here[~goes_left])

    split(0, len(weights), first, np.arange(size))
    return sources


def interleaved(sizes: Mapping[str, int]) -> Mixture:
    """Every sequence of every source once and in order, the sources interleaved in proportion: a validation reads what comes first."""
    return Mixture(tuple(sizes), tuple(sizes.values()), (ResolvedStage(0, tuple(sizes.values())),), None)


def build_mixture(
    config: MixtureConfig, sizes: Mapping[str, int], seed: int, total: int | None, unit: int = 1
) -> Mixture:
    """The mixture that the settings mean for sources of these sizes.

    Args:
        config: its stages count in samples of `data.seq_len` tokens.
        sizes: sequences by source.
        seed: of the order.
        total: samples of `data.seq_len` tokens that the run reads; None is not known.
        unit: samples of `data.seq_len` tokens in one of the mixture; a stage begins at the next whole one.

    Raises:
        DataError: weights or stages that cannot be meant, or a source would be read more than max_epochs times.
    """
    stages = [ResolvedStage(0, _weights(config, config.weights, sizes, "data.mixture.weights"))]
    for i, stage in enumerate(config.stages):
        setting = f"data.mixture.stages.{i}"
        start = -(-resolve_start_sample(stage.start, total, setting) // unit)
        if start < stages[-1].start:
            raise DataError(
                f"{setting}.from={stage.start} lies before the stage in front of it; put the stages in order"
            )
        if start == stages[-1].start:
            stages.pop()  # it had no sample
        stages.append(ResolvedStage(start, _weights(config, stage.weights, sizes, f"{setting}.weights")))
    mixture = Mixture(tuple(sizes), tuple(sizes.values()), tuple(stages), seed)
    if config.max_epochs is not None and total is not None:
        for name, epochs in mixture.epochs(-(-total // unit)).items():
            if epochs > config.max_epochs:
                raise DataError(
                    f"the run would read {name} {epochs:.4g} times, more than data.mixture.max_epochs={config.max_epochs:g}; "
                    f"lower its weight in data.mixture.weights, shorten the run, or raise the limit"
                )
    return mixture


def _weights(
    config: MixtureConfig, weights: Mapping[str, float], sizes: Mapping[str, int], setting: str
) -> tuple[int, ...]:
    """Samples of each source in a cycle."""
    for name, weight in weights.items():
        if name not in sizes:
            raise DataError(f"{setting} names {name}, which the data does not hold; its sources are {', '.join(sizes)}")
        if weight > 0 and not sizes[name]:
            raise DataError(f"{setting}.{name}={weight:g}, but {name} holds no tokens; set 0 or leave it out")
    if weights and config.by == "temperature":
        raise DataError(
            f"{setting} is set, but data.mixture.by=temperature takes no weights; remove them, or use by=tokens or by=epochs"
        )
    if weights and not any(weights.values()):
        raise DataError(f"{setting} gives every source 0; give one of {', '.join(sizes)} a positive weight")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # 0.1 is a tenth
    if config.by == "epochs" or (config.by == "tokens" and not weights):
        parts, scale = (
            [exact.get(name, Fraction(0 if weights else 1)) * size for name, size in sizes.items()],
            Fraction(1),
        )
    else:
        if config.by == "tokens":
            parts = [exact.get(name, Fraction(0)) for name in sizes]
        else:
            parts = [Fraction(size ** (1 / config.temperature)) for size in sizes.values()]
        scale = _SHARES / sum(parts, Fraction(0))
    cycle = tuple(max(1, round(part * scale)) if part else 0 for part in parts)
    if sum(cycle) > _LARGEST_CYCLE:
        raise DataError(
            f"{setting} asks for {sum(cycle):.3g} sequences in an epoch of everything; divide all weights by a number"
        )
    return cycle


def resolve_start_sample(start: str | int, total: int | None, setting: str) -> int:
    """The sample at which a stage begins."""
    text = str(start)
    try:
        share = Fraction(text.removesuffix("%")) / 100 if text.endswith("%") else None
        number = 0 if share is not None else int(text)
    except (ValueError, ZeroDivisionError):
        raise DataError(f"{setting}.from={start} is neither a share such as 80% nor a number of sequences") from None
    if number < 0 or (share is not None and not 0 <= share <= 1):
        raise DataError(f"{setting}.from={start} lies outside the run; use 0% to 100%, or a number of sequences")
    if share is None:
        return number
    if total is None:
        raise DataError(
            f"{setting}.from={start} is a share of the run, whose length is not known here; give a number of sequences"
        )
    return -(-share.numerator * total // share.denominator)
