from collections import Counter
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.reading.mixture import BLOCK, Mixture, build_mixture, counts, interleaved, pattern_sources
from data_pipeline.settings import MixtureConfig, MixtureStage

WEIGHTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=9).map(tuple).filter(any)
NAMES = ("web", "code", "books")
BIG = {"web": 3_000_000_000, "code": 3_999_999_937, "books": 41}


def stream(mixture: Mixture, stop: int, start: int = 0) -> list[tuple[int, int]]:
    """Return (source, sequence) for samples [start, stop)."""
    samples: list[tuple[int, int]] = []
    while start < stop:
        block = mixture.block(start)
        low = start - block.first
        samples += zip(block.sources[low:].tolist(), block.sequences[low:].tolist(), strict=True)
        start = block.stop
    return samples[: len(samples) - (start - stop)]


def sized(weights: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(NAMES, weights, strict=True))


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, n=st.integers(0, 10**12), size=st.integers(1, 300))
def test_counts_are_near_their_shares_grow_in_single_steps_and_are_exact_after_a_cycle(
    weights: tuple[int, ...], n: int, size: int
) -> None:
    cycle, depth = sum(weights), ceil(log2(len(weights))) if len(weights) > 1 else 0
    before = counts(weights, n)
    assert sum(before) == n
    for count, weight in zip(before, weights, strict=True):
        # In exact integers: count is within depth / 2 of n * weight / cycle.
        assert abs(count * cycle - n * weight) * 2 <= depth * cycle
    seen = np.array(before)
    for i, source in enumerate(pattern_sources(weights, n, size).tolist()):
        seen[source] += 1
        assert seen.tolist() == counts(weights, n + i + 1)
    assert counts(weights, n + 7 * cycle) == [count + 7 * weight for count, weight in zip(before, weights, strict=True)]


def test_numbers_beyond_64_bits_do_not_wrap() -> None:
    weights = (3_000_000_000, 3_999_999_937, 41)
    n = 10**14 + 12_345  # n * weight is 4e23
    found = np.bincount(pattern_sources(weights, n, BLOCK), minlength=3).tolist()
    assert found == [b - a for a, b in zip(counts(weights, n), counts(weights, n + BLOCK), strict=True)]
    mixture = build_mixture(MixtureConfig(), BIG, 0, None)
    block = mixture.block(10**14)
    assert block.first <= 10**14 < block.stop
    assert (block.sequences < np.array(list(BIG.values()))[block.sources]).all()


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Mixture, int]:
    """A mixture of 1 to 3 small sources with stages, and a number of samples past the last stage."""
    names = NAMES[: draw(st.integers(1, 3))]
    weight = st.sampled_from([0, 0.25, 0.5, 1, 1.7, 3])
    table = st.fixed_dictionaries(dict.fromkeys(names, weight)).filter(lambda weights: any(weights.values()))
    starts = sorted(draw(st.lists(st.integers(0, 12_000), max_size=2)))
    config = MixtureConfig(
        by=draw(st.sampled_from(["epochs", "tokens"])),
        weights=draw(st.one_of(st.just({}), table)),
        stages=tuple(MixtureStage(start=start, weights=draw(table)) for start in starts),
    )
    sizes = {name: draw(st.integers(20, 3000)) for name in names}
    return build_mixture(config, sizes, draw(st.integers(0, 2**64 - 1)), None), max([0, *starts]) + draw(
        st.integers(1, 6000)
    )


@settings(max_examples=40, deadline=None)
@given(drawn=mixtures())
def test_every_epoch_of_a_source_visits_each_sequence_once_across_blocks_and_stages(
    drawn: tuple[Mixture, int],
) -> None:
    mixture, samples = drawn
    read = stream(mixture, samples)
    for source, size in enumerate(mixture.sizes):
        sequences = [sequence for s, sequence in read if s == source]
        assert mixture.counts(samples)[source] == len(sequences)
        for start in range(0, len(sequences), size):
            part = sequences[start : start + size]
            assert len(set(part)) == len(part)
            assert len(part) < size or sorted(part) == list(range(size))
    middle = samples // 2
    assert stream(mixture, samples, middle) == read[middle:]
    assert mixture.counts(middle) == [
        sum(s == source for s, _ in read[:middle]) for source in range(len(mixture.sizes))
    ]


@settings(max_examples=40, deadline=None)
@given(
    weights=st.tuples(*[st.integers(0, 3)] * 3), sizes=st.tuples(*[st.integers(1, 4000)] * 3), seed=st.integers(0, 1000)
)
def test_after_a_cycle_each_source_was_read_exactly_its_weight_times(
    weights: tuple[int, ...], sizes: tuple[int, ...], seed: int
) -> None:
    assume(any(weights))
    mixture = build_mixture(MixtureConfig(weights=sized(weights)), dict(zip(NAMES, sizes, strict=True)), seed, None)
    cycle = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
    times = Counter(stream(mixture, cycle))
    assert times == {(s, i): weights[s] for s in range(3) for i in range(sizes[s]) if weights[s]}
    assert mixture.epochs(cycle) == sized(weights)
    everything = build_mixture(MixtureConfig(), dict(zip(NAMES, sizes, strict=True)), seed, None)
    assert everything.epochs(sum(sizes)) == sized((1, 1, 1))


def test_sources_of_one_or_two_sequences_are_read_repeatedly() -> None:
    read = stream(
        build_mixture(MixtureConfig(by="tokens", weights=sized((1, 1, 0))), {"web": 1, "code": 2, "books": 5}, 0, None),
        2 * BLOCK,
    )
    web, code = ([sequence for s, sequence in read if s == source] for source in (0, 1))
    assert web == [0] * BLOCK
    pairs = Counter(zip(code[::2], code[1::2], strict=True))
    assert set(pairs) == {(0, 1), (1, 0)}
    assert abs(pairs[0, 1] - BLOCK / 4) < 5 * (BLOCK / 8) ** 0.5  # each epoch has its own order


def test_counts_are_exact_at_every_block_and_the_order_inside_is_random() -> None:
    mixture = build_mixture(
        MixtureConfig(by="tokens", weights=sized((0.5, 0.3, 0.2))), dict.fromkeys(NAMES, 10**6), 1, None
    )
    other = build_mixture(
        MixtureConfig(by="tokens", weights=sized((0.5, 0.3, 0.2))), dict.fromkeys(NAMES, 10**6), 2, None
    )
    for k in range(1, 20):
        assert mixture.counts(k * BLOCK) == counts((500_000, 300_000, 200_000), k * BLOCK)
    block, next_block = mixture.block(0).sources, mixture.block(BLOCK).sources
    assert not np.array_equal(block, next_block)
    assert not np.array_equal(block, other.block(0).sources)
    expected = np.outer(*[np.bincount(block)] * 2) / BLOCK  # expected pairs of neighbours if they are independent
    pairs = np.bincount(block[:-1] * 3 + block[1:], minlength=9).reshape(3, 3)
    assert ((pairs - expected) ** 2 / expected).sum() < 25
    regular = interleaved({"web": 500_000, "code": 300_000, "books": 200_000}).block(0).sources
    pairs = np.bincount(regular[:-1] * 3 + regular[1:], minlength=9).reshape(3, 3)
    assert ((pairs - expected) ** 2 / expected).sum() > 500


def test_interleaved_sources_are_each_in_order_and_evenly_spread() -> None:
    read = stream(interleaved({"web": 300, "code": 150, "books": 50}), 500)
    for source, size in enumerate((300, 150, 50)):
        assert [sequence for s, sequence in read if s == source] == list(range(size))
    for start in range(0, 500, 10):
        part = Counter(s for s, _ in read[start : start + 10])
        assert max(abs(part[0] - 6), abs(part[1] - 3), abs(part[2] - 1)) <= 1


def test_an_appended_stage_keeps_earlier_samples_and_continues_the_sources() -> None:
    sizes = {"web": 9000, "code": 3000, "books": 500}
    start = 3 * BLOCK + 1234  # inside a block
    config = MixtureConfig(by="tokens", weights=sized((0.7, 0.2, 0.1)))
    plain = build_mixture(config, sizes, 5, None)
    staged = build_mixture(
        config.model_copy(update={"stages": (MixtureStage(start=start, weights={"books": 1}),)}), sizes, 5, None
    )
    again = build_mixture(
        config.model_copy(update={"stages": (MixtureStage(start=start, weights=config.weights),)}), sizes, 5, None
    )
    assert stream(staged, start) == stream(plain, start) == stream(again, start)
    after = stream(staged, start + 600, start)
    assert {source for source, _ in after} == {2}
    books = [sequence for source, sequence in stream(plain, start) if source == 2][-(plain.counts(start)[2] % 500) :]
    assert sorted(books + [sequence for _, sequence in after][: 500 - len(books)]) == list(range(500))
    # The blocks of a stage begin at its start.
    assert stream(plain, start + 600, start) != stream(again, start + 600, start)


def test_weights_are_resolved_to_samples_in_a_cycle() -> None:
    sizes = {"web": 4000, "code": 1000, "books": 10}

    def cycle(**config: object) -> tuple[int, ...]:
        return build_mixture(MixtureConfig.model_validate(config), sizes, 0, None).stages[0].weights

    assert cycle() == cycle(by="tokens") == (4000, 1000, 10)
    assert cycle(weights={"web": 1, "books": 2.5}) == (4000, 0, 25)
    assert cycle(weights={"web": 0.1, "code": 1e-9}) == (400, 1, 0)  # a source with a weight is read
    assert cycle(by="tokens", weights={"web": 3, "code": 1}) == (750_000, 250_000, 0)
    assert cycle(by="tokens", weights={"web": 0.1, "code": 0.2, "books": 0.7}) == (100_000, 200_000, 700_000)
    assert cycle(by="temperature") == (798_403, 199_601, 1996)
    assert cycle(by="temperature", temperature=2) == (645_161, 322_581, 32_258)  # 20 : 10 : 1
    assert max(cycle(by="temperature", temperature=1e9)) - min(cycle(by="temperature", temperature=1e9)) <= 1


def test_stages_begin_at_a_share_or_a_number_of_samples_and_at_whole_windows() -> None:
    sizes = dict.fromkeys(NAMES, 100)

    def starts(*froms: str | int, total: int | None = 1001, unit: int = 1) -> list[int]:
        config = MixtureConfig(stages=tuple(MixtureStage(start=start, weights={"web": 1}) for start in froms))
        return [stage.start for stage in build_mixture(config, sizes, 0, total, unit).stages]

    assert starts("80%", 900, "99.5%") == [0, 801, 900, 996]
    assert starts(50, "100", total=None) == [0, 50, 100]
    assert starts("50%", 600, unit=4) == [0, 126, 150]
    assert starts(0, 7, 7) == [0, 7]  # a stage without samples is dropped


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"weights": {"wiki": 1}},
            r"data\.mixture\.weights names wiki, but the data does not hold it; its sources are web, code, books, none",
        ),
        ({"weights": {"web": 0}}, r"data\.mixture\.weights gives every source 0; give one of"),
        ({"weights": {"none": 2}}, r"data\.mixture\.weights\.none=2, but none holds no tokens"),
        ({"weights": {"web": 1e15}}, r"makes a cycle of 1e\+17 sequences"),
        ({"by": "temperature", "weights": {"web": 1}}, r"data\.mixture\.by=temperature takes no weights"),
        ({"stages": [{"from": "50%", "weights": {"wiki": 1}}]}, r"data\.mixture\.stages\.0\.weights names wiki"),
        (
            {"stages": [{"from": 9, "weights": {}}, {"from": 8, "weights": {}}]},
            r"data\.mixture\.stages\.1\.from=8 lies before the previous stage",
        ),
        ({"stages": [{"from": "half", "weights": {}}]}, r"data\.mixture\.stages\.0\.from=half is neither"),
        ({"stages": [{"from": "101%", "weights": {}}]}, r"data\.mixture\.stages\.0\.from=101% lies outside"),
        ({"stages": [{"from": -1, "weights": {}}]}, r"data\.mixture\.stages\.0\.from=-1 lies outside"),
        (
            {"max_epochs": 4, "weights": {"web": 1, "code": 9}},
            r"the run would read code 9 times, more than data\.mixture\.max_epochs=4; "
            r"lower its weight in data\.mixture\.weights, shorten",
        ),
    ],
)
def test_invalid_mixtures_are_refused_with_a_remedy(config: dict[str, object], message: str) -> None:
    sizes = {"web": 100, "code": 100, "books": 100, "none": 0}
    with pytest.raises(DataError, match=message):
        build_mixture(MixtureConfig.model_validate(config), sizes, 0, 1000)


def test_a_share_of_a_run_of_unknown_length_is_refused_and_its_epochs_are_not_limited() -> None:
    config = MixtureConfig(max_epochs=4, weights={"web": 1, "code": 9})
    sizes = dict.fromkeys(NAMES, 100)
    assert build_mixture(config, sizes, 0, 100).epochs(100)["code"] < 1
    assert build_mixture(config, sizes, 0, None).epochs(1000)["code"] == 9
    with pytest.raises(DataError, match=r"from=80% is a share of the run, whose length is not known"):
        build_mixture(MixtureConfig(stages=(MixtureStage(start="80%", weights={}),)), sizes, 0, None)


def test_equal_order_fingerprints_mean_equal_samples() -> None:
    sizes = dict.fromkeys(NAMES, 500)

    def make(seed: int = 0, sizes: dict[str, int] = sizes, **config: object) -> Mixture:
        return build_mixture(MixtureConfig.model_validate(config), sizes, seed, 1000)

    plain, later = make(), make(stages=[{"from": "30%", "weights": {"web": 1}}])
    assert plain.order_fingerprint(300) == later.order_fingerprint(300)
    assert stream(plain, 300) == stream(later, 300)
    assert plain.order_fingerprint(301) != later.order_fingerprint(301)
    assert stream(plain, 400) != stream(later, 400)
    same = make(weights=dict.fromkeys(NAMES, 1))  # the default weights, given explicitly
    assert plain.order_fingerprint(300) == same.order_fingerprint(300)
    others = [
        make(1),
        make(sizes=dict.fromkeys(NAMES, 600)),
        make(weights={"web": 1}),
        make(by="tokens", weights=dict.fromkeys(NAMES, 1)),
    ]
    assert len({plain.order_fingerprint(300), *(other.order_fingerprint(300) for other in others)}) == 5
    for other in others:
        assert stream(other, 300) != stream(plain, 300)
