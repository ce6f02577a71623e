import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.reading import order
from data_pipeline.reading.order import permutation_key, permute


def permutation(n: int, key: int) -> NDArray[np.int64]:
    return permute(np.arange(n), n, key)


def chi_square(counts: NDArray[np.int64]) -> float:
    """Return by how many standard deviations counts differ from uniform ones."""
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum() - (counts.size - 1)) / (2 * (counts.size - 1)) ** 0.5


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permutation(n, permutation_key(seed, epoch))), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 65_536, 65_537, 100_003])
def test_it_is_a_permutation_at_and_around_powers_of_two(n: int) -> None:
    assert np.array_equal(np.sort(permutation(n, permutation_key(1, 2))), np.arange(n))


def test_one_sample_alone_is_permuted_as_among_others() -> None:
    n, key = 12_345, permutation_key(3, 4)
    together = permutation(n, key)
    for index in (0, 1, 6_000, n - 1):
        assert permute(np.array([index]), n, key)[0] == together[index]


def test_a_key_for_each_sample_is_the_permutation_of_that_key() -> None:
    n, index = 1000, np.arange(500, 600)
    keys = np.array([permutation_key(7, "web", epoch) for epoch in range(100)], np.uint64)
    alone = [int(permute(index[i : i + 1], n, int(key))[0]) for i, key in enumerate(keys)]
    assert permute(index, n, keys).tolist() == alone
    assert (
        len({permutation_key(7, *parts) for parts in ((), (0,), (0, 0), ("web",), ("web", 0), ("code", 0), ("web", 1))})
        == 7
    )


def test_a_trillion_samples_need_no_memory() -> None:
    n = 10**12 + 39
    out = permute(np.arange(n - 1000, n), n, permutation_key(0, 0))
    assert np.unique(out).size == 1000
    assert out.min() >= 0
    assert out.max() < n


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_small_orders_are_uniform_over_seeds(n: int) -> None:
    keys = np.array([permutation_key(seed, 0) for seed in range(1500)], np.uint64)
    draws = permute(np.tile(np.arange(n), 1500), n, np.repeat(keys, n)).reshape(1500, n)
    for position in (0, n - 1):
        assert abs(chi_square(np.bincount(draws[:, position], minlength=n))) < 5
    pairs = draws[:, 0] * n + draws[:, 1]
    counts = np.bincount(pairs, minlength=n * n)[[a * n + b for a in range(n) for b in range(n) if a != b]]
    assert chi_square(counts) < 6


def test_neighbours_are_separated_and_epochs_are_unrelated() -> None:
    n = 50_000
    first, second = permutation(n, permutation_key(7, 0)), permutation(n, permutation_key(7, 1))
    for sequence in (first - np.arange(n), np.diff(first), first - second):
        assert abs(chi_square(np.bincount(sequence % n * 64 // n, minlength=64))) < 5
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / n**0.5
    assert (first == second).sum() < 10


def test_the_statistics_detect_too_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "ROUNDS", 1)
    n = 50_000
    steps = np.diff(permutation(n, permutation_key(7, 0)))
    assert abs(chi_square(np.bincount(steps % n * 64 // n, minlength=64))) > 100


def test_the_order_never_changes() -> None:
    assert permutation(10, permutation_key(1234, 0)).tolist() == [4, 8, 6, 9, 7, 5, 0, 3, 1, 2]


def test_an_index_out_of_range_is_refused() -> None:
    for index in (-1, 10):
        with pytest.raises(ValueError, match=r"\[0, 10\)"):
            permute(np.array([index]), 10, 1)
