"""The source of each sample of a run, and the sequence of that source: a pure function, in O(1) memory.

Each source gets samples in proportion to its integer weight. A binary tree over the sources assigns them: of the first
n samples that reach a node, round(n * left / (left + right)) go to the left child and the others to the right one,
where left and right are the sums of the weights below the children. So the number of samples of each source among the
first n samples has a closed form. It grows by at most 1 per sample, deviates from its exact share by at most half the
depth of the tree, and is exact after each cycle. A cycle has as many samples as the sum of all weights.

This pattern is regular. For a random order, each block of BLOCK samples (the last block of a cycle is shorter) is
permuted with its own key. Within a source, samples are numbered 0, 1, 2, ... in the order in which they are read. The
k-th epoch of a source visits each of its sequences exactly once, in its own random order. A stage that changes the
weights continues these numbers.
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

_WEIGHT_SUM = 10**6  # what weights given as shares are scaled to
_MAX_CYCLE = 1 << 49  # times 2 * BLOCK still fits an int64


@dataclass(frozen=True)
class ResolvedStage:
    """The weights that hold from a sample on."""

    start: int
    """First sample of the stage."""
    weights: tuple[int, ...]
    """Samples of each source in a cycle."""


@dataclass(frozen=True)
class SampleBlock:
    """A block of consecutive samples."""

    first: int
    """First sample of the block."""
    sources: NDArray[np.int64]
    """Index of the source of each sample."""
    sequences: NDArray[np.int64]
    """Sequence of that source for each sample."""

    @property
    def stop(self) -> int:
        """One past the last sample."""
        return self.first + len(self.sources)


@dataclass(frozen=True)
class Mixture:
    """An endless stream of samples. Equal mixtures give equal streams."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Sequences of each source. A source without sequences has weight 0."""
    stages: tuple[ResolvedStage, ...]
    """In ascending order of their starts. The first one starts at 0."""
    seed: int | None
    """None disables shuffling: the sources are interleaved, each in the order of its shards."""

    def block(self, sample: int) -> SampleBlock:
        """Return the block that holds `sample`. It ends early if the next stage begins inside of it."""
        t = max(t for t, stage in enumerate(self.stages) if stage.start <= sample)
        stage = self.stages[t]
        first, sources = self._pattern(stage, sample - stage.start)
        if t + 1 < len(self.stages):
            sources = sources[: self.stages[t + 1].start - stage.start - first]
        before = np.array([a + b for a, b in zip(self._at_stages[t], counts(stage.weights, first), strict=True)])
        by_source = np.argsort(sources, kind="stable")
        ends = np.cumsum(np.bincount(sources, minlength=len(self.sizes)))
        sequences = np.empty(len(sources), np.int64)
        for source, indices in enumerate(np.split(by_source, ends[:-1])):
            if indices.size:
                sequences[indices] = self._sequences(source, before[source] + np.arange(indices.size))
        return SampleBlock(stage.start + first, sources, sequences)

    def counts(self, samples: int) -> list[int]:
        """Count how many of the first `samples` samples come from each source."""
        t = max(t for t, stage in enumerate(self.stages) if stage.start <= samples)
        return [a + b for a, b in zip(self._at_stages[t], self._in_stage(self.stages[t], samples), strict=True)]

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how often the first `samples` samples read each source."""
        return {
            name: n / max(size, 1) for name, n, size in zip(self.names, self.counts(samples), self.sizes, strict=True)
        }

    def order_fingerprint(self, samples: int) -> str:
        """Hash everything that the first `samples` samples depend on. Stages that begin later are not included."""
        stages = [(stage.start, stage.weights) for stage in self.stages if stage.start < samples]
        return xxhash.xxh3_128_hexdigest(json.dumps([self.seed, self.names, self.sizes, stages]).encode())

    @cached_property
    def _at_stages(self) -> list[list[int]]:
        """The result of `counts` at the start of each stage."""
        found = [[0] * len(self.sizes)]
        for stage, later in pairwise(self.stages):
            found.append([a + b for a, b in zip(found[-1], self._in_stage(stage, later.start), strict=True)])
        return found

    def _in_stage(self, stage: ResolvedStage, stop: int) -> list[int]:
        """Count samples [stage.start, stop) by source: whole blocks in closed form, the last one by generating it."""
        first, sources = self._pattern(stage, stop - stage.start)
        rest = np.bincount(sources[: stop - stage.start - first], minlength=len(self.sizes)).tolist()
        return [a + b for a, b in zip(counts(stage.weights, first), rest, strict=True)]

    def _pattern(self, stage: ResolvedStage, sample: int) -> tuple[int, NDArray[np.int64]]:
        """Return (first sample of the block that holds `sample`, source of each sample of that block).

        Samples are counted from the start of the stage.
        """
        cycle = sum(stage.weights)
        cycles, offset = divmod(sample, cycle)
        first = cycles * cycle + offset // BLOCK * BLOCK
        size = min(BLOCK, cycle - offset // BLOCK * BLOCK)
        sources = pattern_sources(stage.weights, first, size)
        if self.seed is not None:
            sources = sources[permute(np.arange(size), size, permutation_key(self.seed, stage.start + first))]
        return first, sources

    def _sequences(self, source: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequence that the n-th sample of a source reads, for each n of `numbers`."""
        size = self.sizes[source]
        epochs, sequences = np.divmod(numbers, size)
        if self.seed is None:
            return sequences
        keys = splitmix64(np.uint64(permutation_key(self.seed, self.names[source])) ^ epochs.astype(np.uint64))
        return permute(sequences, size, keys)


def counts(weights: tuple[int, ...], n: int) -> list[int]:
    """Count the first `n` samples of the regular pattern by source. If all weights are 0, `n` must be 0."""
    if len(weights) == 1:
        return [n]
    half = len(weights) // 2
    left, total = sum(weights[:half]), sum(weights)
    to_left = (2 * n * left + total) // (2 * total) if n else 0
    return counts(weights[:half], to_left) + counts(weights[half:], n - to_left)


def pattern_sources(weights: tuple[int, ...], first: int, size: int) -> NDArray[np.int64]:
    """Return the sources of samples [first, first + size) of the regular pattern. `size` is at most BLOCK."""
    sources = np.zeros(size, np.int64)

    def descend(low: int, high: int, n_before: int, samples: NDArray[np.int64]) -> None:
        """Assign `samples`, which reach the node of sources [low, high) after `n_before` others, to its children."""
        if high - low == 1:
            sources[samples] = low
        elif samples.size:
            half = low + (high - low) // 2
            left, total = sum(weights[low:half]), sum(weights[low:high])
            n_left, rest = divmod(2 * n_before * left + total, 2 * total)
            goes_left = np.diff((rest + 2 * left * np.arange(samples.size + 1)) // (2 * total)) > 0
            descend(low, half, n_left, samples[goes_left])
            descend(half, high, n_before - n_left, samples[~goes_left])

    descend(0, len(weights), first, np.arange(size))
    return sources


def interleaved(sizes: Mapping[str, int]) -> Mixture:
    """Return the mixture that reads every sequence once, unshuffled, with sources interleaved in proportion to their
    sizes.

    A validation reads the first samples of it.
    """
    return Mixture(tuple(sizes), tuple(sizes.values()), (ResolvedStage(0, tuple(sizes.values())),), None)


def build_mixture(
    config: MixtureConfig, sizes: Mapping[str, int], seed: int, total: int | None, unit: int = 1
) -> Mixture:
    """Build the mixture for sources of these sizes.

    Args:
        config: the settings. Their stages count in samples of `data.seq_len` tokens.
        sizes: sequences by source, in windows of `unit` samples.
        seed: seed of the order.
        total: samples of `data.seq_len` tokens that the run reads. None if unknown.
        unit: samples in a window. The mixture counts in windows, and a stage begins at the next whole window.

    Raises:
        DataError: the weights or stages are invalid, or a source would be read more than `max_epochs` times.
    """
    stages = [ResolvedStage(0, _weights(config, config.weights, sizes, "data.mixture.weights"))]
    for i, stage in enumerate(config.stages):
        setting = f"data.mixture.stages.{i}"
        start = -(-resolve_start_sample(stage.start, total, setting) // unit)
        if start < stages[-1].start:
            raise DataError(f"{setting}.from={stage.start} lies before the previous stage; put the stages in order")
        if start == stages[-1].start:
            stages.pop()  # the previous stage is empty
        stages.append(ResolvedStage(start, _weights(config, stage.weights, sizes, f"{setting}.weights")))
    mixture = Mixture(tuple(sizes), tuple(sizes.values()), tuple(stages), seed)
    if config.max_epochs is not None and total is not None:
        for name, epochs in mixture.epochs(-(-total // unit)).items():
            if epochs > config.max_epochs:
                raise DataError(
                    f"the run would read {name} {epochs:.4g} times, more than "
                    f"data.mixture.max_epochs={config.max_epochs:g}; lower its weight in data.mixture.weights, shorten "
                    "the run, or raise the limit"
                )
    return mixture


def _weights(
    config: MixtureConfig, weights: Mapping[str, float], sizes: Mapping[str, int], setting: str
) -> tuple[int, ...]:
    """Return the samples of each source in a cycle."""
    for name, weight in weights.items():
        if name not in sizes:
            raise DataError(
                f"{setting} names {name}, but the data does not hold it; its sources are {', '.join(sizes)}"
            )
        if weight > 0 and not sizes[name]:
            raise DataError(f"{setting}.{name}={weight:g}, but {name} holds no tokens; set 0 or leave it out")
    if weights and config.by == "temperature":
        raise DataError(
            f"{setting} is set, but data.mixture.by=temperature takes no weights; remove them, or use by=tokens or "
            "by=epochs"
        )
    if weights and not any(weights.values()):
        raise DataError(f"{setting} gives every source 0; give one of {', '.join(sizes)} a positive weight")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # 0.1 becomes exactly 1/10
    if config.by == "epochs" or (config.by == "tokens" and not weights):
        parts = [exact.get(name, Fraction(0 if weights else 1)) * size for name, size in sizes.items()]
        scale = Fraction(1)
    else:
        if config.by == "tokens":
            parts = [exact.get(name, Fraction(0)) for name in sizes]
        else:
            parts = [Fraction(size ** (1 / config.temperature)) for size in sizes.values()]
        scale = _WEIGHT_SUM / sum(parts, Fraction(0))
    cycle = tuple(max(1, round(part * scale)) if part else 0 for part in parts)
    if sum(cycle) > _MAX_CYCLE:
        raise DataError(
            f"{setting} makes a cycle of {sum(cycle):.3g} sequences, which is too long; divide all weights by a number"
        )
    return cycle


def resolve_start_sample(start: str | int, total: int | None, setting: str) -> int:
    """Return the sample at which a stage begins.

    Args:
        start: a share of the run such as `80%`, or a number of samples.
        total: samples that the run reads. None if unknown.
        setting: the setting that an error names.

    Raises:
        DataError: `start` is neither, lies outside of the run, or is a share of a run of unknown length.
    """
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
