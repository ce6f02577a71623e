"""What a run will read, told before it begins: of each source how much, how often and how much of it again. Reads no token."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.reading.loader import Loader
from data_pipeline.reading.mixture import Mixture

MANY_EPOCHS = 4
"""Up to this many, repeated text is almost as good as new text (arXiv:2305.16264)."""


@dataclass(frozen=True)
class SourceUsage:
    """What a stretch of the run reads of one source."""

    name: str
    sequences: int
    """Of `data.seq_len` tokens, padding included."""
    tokens: int
    """Without padding; of a round that is not finished, the same share as of the sequences."""
    epochs: float
    """How often the source is read."""
    repeats: int
    """Tokens that were read before, in this stretch or an earlier one."""


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
    """What a run reads."""

    seq_len: int
    packing: str
    run: RunSegment
    stages: tuple[RunSegment, ...]
    """The same by stages of the mixture that the run gets to."""

    @property
    def padding(self) -> float:
        """Share of the run's positions that hold no token."""
        return 1 - self.run.tokens / (self.run.stop * self.seq_len)

    def title(self, stage: RunSegment) -> str:
        """Which part of the run a stage is."""
        low, high = (f"{100 * sample / self.run.stop:.4g}%" for sample in (stage.start, stage.stop))
        return f"{low} to {high} of the run"

    @property
    def heavily_repeated(self) -> tuple[SourceUsage, ...]:
        """The sources that are read more than MANY_EPOCHS times."""
        return tuple(source for source in self.run.sources if source.epochs > MANY_EPOCHS)


def forecast_reading(loader: Loader, samples: int) -> Forecast:
    """What the first `samples` samples, at least one, read."""
    mixture, parts = loader.mixture, loader.window // loader.seq_len
    starts = [start for stage in mixture.stages if (start := stage.start * parts) < samples]
    stages = tuple(
        _stretch(loader, mixture, start, stop) for start, stop in zip(starts, [*starts[1:], samples], strict=True)
    )
    return Forecast(loader.seq_len, loader.packing, _stretch(loader, mixture, 0, samples), stages)


def format_repeat_warning(source: SourceUsage) -> str:
    """What to say of a source that is read often."""
    return (
        f"{source.name} is read {source.epochs:,.1f} times: beyond {MANY_EPOCHS} epochs, repeated text teaches less and less "
        f"(arXiv:2305.16264); lower its weight, shorten the run, or add text"
    )


def _stretch(loader: Loader, mixture: Mixture, start: int, stop: int) -> RunSegment:
    parts = loader.window // loader.seq_len
    readings = []
    for shards, size, *counts in zip(
        loader.sources, mixture.sizes, _counts(mixture, parts, start), _counts(mixture, parts, stop), strict=True
    ):
        before, after = (count / max(1, size * parts) for count in counts)
        tokens = [round(rounds * shards.n_tokens) for rounds in (before, after)]
        again = [max(0, read - shards.n_tokens) for read in tokens]
        readings.append(
            SourceUsage(
                shards.source.name, counts[1] - counts[0], tokens[1] - tokens[0], after - before, again[1] - again[0]
            )
        )
    return RunSegment(start, stop, tuple(readings))


def _counts(mixture: Mixture, parts: int, samples: int) -> list[int]:
    """How many of the first samples come from each source. Those of a window, `parts` of them, are of one source."""
    windows, rest = divmod(samples, parts)
    these, with_next = mixture.counts(windows), mixture.counts(windows + 1)
    return [parts * a + rest * (b - a) for a, b in zip(these, with_next, strict=True)]
