"""Forecasts compared with the samples that the loader reads."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.reading.forecast import MANY_EPOCHS, Forecast, forecast_reading, format_repeat_warning
from data_pipeline.reading.loader import Loader
from data_pipeline.settings import MixtureConfig, MixtureStage
from data_pipeline.storage.shards import OpenedSplit

WriteSplit = Callable[..., OpenedSplit]
Draw = Callable[..., list[list[int]]]


@pytest.fixture
def three(write_split: WriteSplit, random_documents: Draw) -> Path:
    """A split of three sources of about 6,000, 3,000 and 600 tokens."""
    sizes = {"web": 200, "code": 100, "books": 20}
    return write_split({name: random_documents(n, 60, seed=n) for name, n in sizes.items()}, shard_tokens=500).folder


def stages(*weights: tuple[str | int, dict[str, float]]) -> MixtureConfig:
    return MixtureConfig(stages=tuple(MixtureStage(start=start, weights=of) for start, of in weights))


def columns(found: Forecast, name: str) -> list[list[float]]:
    """Return one column for the whole run, and for each stage."""
    return [[getattr(source, name) for source in segment.sources] for segment in (found.run, *found.stages)]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_one_epoch_of_everything_is_every_token_once(three: Path, packing: str) -> None:
    loader = Loader(three, seq_len=16, seed=1, packing=packing)  # type: ignore[arg-type]
    found = forecast_reading(loader, loader.n_sequences)
    assert columns(found, "tokens")[0] == [shards.n_tokens for shards in loader.sources]
    assert columns(found, "sequences")[0] == list(loader.mixture.sizes)
    assert columns(found, "epochs")[0] == [1, 1, 1]
    assert found.run.repeats == 0
    assert found.run.tokens == loader.n_tokens
    assert found.padding == pytest.approx(1 - loader.packing_efficiency)
    assert found.padding > 0
    assert found.packing == packing


@pytest.mark.parametrize("window", [16, 64])
@pytest.mark.parametrize("samples", [1, 777, 802, 1500, 2003])
def test_the_forecast_counts_the_sequences_that_the_loader_reads(three: Path, window: int, samples: int) -> None:
    mixture = stages(("40%", {"web": 1, "books": 9}), ("80%", {"code": 1}))
    loader = Loader(three, seq_len=16, seed=1, mixture=mixture, window=window, total_samples=2003)
    parts = window // 16
    read: list[int] = []
    while len(read) * parts < samples:
        block = loader.mixture.block(len(read))
        assert block.first <= len(read)
        read += block.sources[len(read) - block.first :].tolist()
    found = forecast_reading(loader, samples)
    for segment in (found.run, *found.stages):
        counted = Counter(read[sample // parts] for sample in range(segment.start, segment.stop))
        assert [source.sequences for source in segment.sources] == [counted[i] for i in range(3)]
    assert len(found.stages) == (1 if samples <= 802 else 2 if samples < 1603 else 3)
    assert [stage.start for stage in found.stages[1:]] == [found.stages[i].stop for i in range(len(found.stages) - 1)]


def test_stages_add_up_to_the_whole_run(three: Path) -> None:
    mixture = stages(("30%", {"web": 1, "books": 9}), ("60%", {"code": 1}), ("90%", {"books": 1, "code": 1}))
    found = forecast_reading(Loader(three, seq_len=16, seed=1, mixture=mixture, total_samples=5000), 5000)
    for name in ("sequences", "tokens", "repeats"):
        of_run, *parts = columns(found, name)
        assert of_run == [sum(part) for part in zip(*parts, strict=True)]
    assert columns(found, "epochs")[0] == pytest.approx(
        [sum(part) for part in zip(*columns(found, "epochs")[1:], strict=True)]
    )
    assert [found.title(stage) for stage in found.stages] == [
        "0% to 30% of the run",
        "30% to 60% of the run",
        "60% to 90% of the run",
        "90% to 100% of the run",
    ]


def test_repeats_count_what_any_earlier_stage_read(three: Path) -> None:
    loader = Loader(three, seq_len=16, seed=1, mixture=stages(("50%", {"books": 1})), total_samples=1000)
    found = forecast_reading(loader, 1000)
    web, code, books = loader.sources
    first, second = (stage.sources[2] for stage in found.stages)
    assert 0 < first.epochs < 1
    assert first.repeats == 0
    assert first.tokens + second.tokens - books.n_tokens == second.repeats > 0
    assert [source.repeats for source in found.stages[1].sources[:2]] == [0, 0]
    assert found.run.sources[0].tokens < web.n_tokens
    assert found.run.sources[1].tokens < code.n_tokens


@pytest.mark.parametrize(("epochs", "warned"), [(4, []), (4.2, ["books"])])
def test_sources_that_are_read_more_than_four_times_get_a_warning(
    three: Path, epochs: float, warned: list[str]
) -> None:
    assert MANY_EPOCHS == 4
    loader = Loader(three, seq_len=16, seed=1, mixture=MixtureConfig(weights={"web": 1, "code": 0, "books": epochs}))
    cycle = sum(loader.mixture.stages[0].weights)
    found = forecast_reading(loader, cycle)
    assert [source.name for source in found.heavily_repeated] == warned
    assert found.run.sources[1].epochs == 0
    if warned:
        assert format_repeat_warning(found.heavily_repeated[0]).startswith("books is read 4.2 times: beyond 4 epochs, ")


def test_a_forecast_reads_no_tokens(three: Path) -> None:
    loader = Loader(three, seq_len=16, seed=1)
    for file in [*three.glob("*.bin"), *three.glob("*.idx")]:
        file.unlink()
    assert forecast_reading(loader, 10).run.tokens > 0
