"""What a run will read of each source: tokens, epochs and repeats. Computed before the run, without reading tokens."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.reading.loader import Loader
from data_pipeline.reading.mixture import Mixture

MANY_EPOCHS = 4
"""Up to this many epochs, repeated text is almost as good as new text (arXiv:2305.16264)."""


@dataclass(frozen=True)
class SourceUsage:
    """What a segment of a run reads of one source."""

    name: str
    sequences: int
    """Sequences of `data.seq_len` tokens, padding included."""
    tokens: int
    """Tokens without padding. An unfinished epoch counts in proportion to its sequences."""
    epochs: float
    """How often the source is read."""
    repeats: int
    """Tokens that were read before, in this segment or an earlier one."""


@dataclass(frozen=True)
class RunSegment:
    """Samples [start, stop) of a run."""

    start: int
    stop: int
    sources: tuple[SourceUsage, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all sources, without padding."""
        return sum(source.tokens for source in self.sources)

    @property
    def repeats(self) -> int:
        """Repeated tokens of all sources."""
        return sum(source.repeats for source in self.sources)


@dataclass(frozen=True)
class Forecast:
    """What a run will read."""

    seq_len: int
    packing: str
    run: RunSegment
    """The whole run."""
    stages: tuple[RunSegment, ...]
    """The stages of the mixture that the run reaches."""

    @property
    def padding(self) -> float:
        """Fraction of the run's positions that are padding."""
        return 1 - self.run.tokens / (self.run.stop * self.seq_len)

    def title(self, stage: RunSegment) -> str:
        """Return which part of the run a stage is, in percent."""
        low, high = (f"{100 * sample / self.run.stop:.4g}%" for sample in (stage.start, stage.stop))
        return f"{low} to {high} of the run"

    @property
    def heavily_repeated(self) -> tuple[SourceUsage, ...]:
        """The sources that the run reads more than MANY_EPOCHS times."""
        return tuple(source for source in self.run.sources if source.epochs > MANY_EPOCHS)


def forecast_reading(loader: Loader, samples: int) -> Forecast:
    """Forecast what the first `samples` samples read. `samples` is at least 1."""
    mixture, samples_per_window = loader.mixture, loader.window // loader.seq_len
    starts = [start for stage in mixture.stages if (start := stage.start * samples_per_window) < samples]
    stages = tuple(
        _segment(loader, mixture, start, stop) for start, stop in zip(starts, [*starts[1:], samples], strict=True)
    )
    return Forecast(loader.seq_len, loader.packing, _segment(loader, mixture, 0, samples), stages)


def format_repeat_warning(source: SourceUsage) -> str:
    """Return a warning about a source that is read more than MANY_EPOCHS times."""
    return (
        f"{source.name} is read {source.epochs:,.1f} times: beyond {MANY_EPOCHS} epochs, repeated text teaches less "
        "and less (arXiv:2305.16264); lower its weight, shorten the run, or add text"
    )


def _segment(loader: Loader, mixture: Mixture, start: int, stop: int) -> RunSegment:
    """Compute what samples [start, stop) read: the first `stop` samples less the first `start` samples."""
    samples_per_window = loader.window // loader.seq_len
    counts_at = [_count_by_source(mixture, samples_per_window, samples) for samples in (start, stop)]
    usages = []
    for shards, size, *counts in zip(loader.sources, mixture.sizes, *counts_at, strict=True):
        epochs = [count / max(1, size * samples_per_window) for count in counts]
        tokens = [round(epoch * shards.n_tokens) for epoch in epochs]
        repeats = [max(0, count - shards.n_tokens) for count in tokens]
        usages.append(
            SourceUsage(
                name=shards.source.name,
                sequences=counts[1] - counts[0],
                tokens=tokens[1] - tokens[0],
                epochs=epochs[1] - epochs[0],
                repeats=repeats[1] - repeats[0],
            )
        )
    return RunSegment(start, stop, tuple(usages))


def _count_by_source(mixture: Mixture, samples_per_window: int, samples: int) -> list[int]:
    """Count how many of the first samples come from each source. All samples of a window come from the same source."""
    windows, rest = divmod(samples, samples_per_window)
    counts, counts_after_next = mixture.counts(windows), mixture.counts(windows + 1)
    return [samples_per_window * a + rest * (b - a) for a, b in zip(counts, counts_after_next, strict=True)]
