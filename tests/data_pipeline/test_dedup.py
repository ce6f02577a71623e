import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.cleaning.dedup import DuplicateCodes, find_duplicates, write_signatures
from data_pipeline.cleaning.minhash import MinHasher, detection_probability, text_hash
from data_pipeline.errors import DataError
from data_pipeline.settings import DedupConfig

Hashes = NDArray[np.uint64]


def write(folder: Path, columns: Hashes, bounds: Sequence[int]) -> list[Path]:
    """Write signature files of documents, [documents, 1 + bands], split at `bounds`. Zeros are not compared."""
    folder.mkdir(exist_ok=True)
    files = []
    for number, part in enumerate(np.split(columns, bounds)):
        files.append(folder / f"{number:03d}.signatures")
        write_signatures(files[-1], part[:, 0], part[:, 1:], np.ones(len(part), np.bool_))
    return files


def settings(bands: int, memory_mb: float = 1000, exact: bool = True) -> DedupConfig:
    return DedupConfig(exact=exact, minhash=True, bands=bands, memory_mb=memory_mb)


def oracle(columns: Hashes, sources: Sequence[str]) -> list[str | None]:
    """Find duplicates with one dictionary for each column: the first such document gives the reason, exact before
    near.
    """
    seen: list[dict[int, int]] = [{} for _ in columns[0]]
    reasons: list[str | None] = []
    for number, row in enumerate(columns.tolist()):
        earlier = [table.setdefault(value, number) if value else number for table, value in zip(seen, row, strict=True)]
        if earlier[0] < number:
            reasons.append(f"exact_duplicate: {sources[earlier[0]]}")
        else:
            first = min(earlier[1:])
            reasons.append(f"near_duplicate: {sources[first]}" if first < number else None)
    return reasons


def reasons_of(found: DuplicateCodes) -> list[str | None]:
    return [found.reasons[code] for codes in found.codes for code in codes.tolist()]


def random_columns(documents: int, bands: int, seed: int = 0, common: float = 0.02) -> Hashes:
    """Return random hashes. Some repeat, one repeats very often, and some are 0."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(1, 2**64, 3 * documents, np.uint64)
    columns: Hashes = pool[rng.integers(0, len(pool), (documents, 1 + bands))]
    chance = rng.random(columns.shape)
    columns[chance < common] = pool[0]
    columns[chance > 0.95] = 0
    return columns


def test_many_ranges_few_ranges_and_a_dictionary_agree(tmp_path: Path) -> None:
    columns, bounds, n_ranges = random_columns(40_000, bands=3), [0, 13_000, 13_001, 30_000], 7
    edges = [max(1, min(2**64 - 1, (i << 64) // n_ranges + off)) for i in range(n_ranges + 1) for off in (-1, 0, 1)]
    columns[[*range(len(edges)), *range(-len(edges), 0)], 1] = np.array(edges * 2, np.uint64)
    sources = ["empty", "web", "web", "code", "code"]
    files = write(tmp_path, columns, bounds)
    names = np.repeat(sources, np.diff([0, *bounds, 40_000])).tolist()
    expected = oracle(columns, names)
    shares: list[float] = []
    for memory_mb in (0.01, 1000.0):
        found = find_duplicates(files, sources, settings(3, memory_mb), shares.append)
        assert [len(codes) for codes in found.codes] == [0, 13_000, 1, 16_999, 10_000]
        assert reasons_of(found) == expected
    assert len(set(expected)) == 5
    assert all(expected[-len(edges) :])
    assert shares.count(1.0) == 2
    assert len(shares) == 4 * n_ranges + 4
    assert shares[: 4 * n_ranges] == sorted(shares[: 4 * n_ranges])


def test_half_of_all_documents_may_be_the_same(tmp_path: Path) -> None:
    columns = random_columns(60_000, bands=1, common=0.5)
    found = find_duplicates(write(tmp_path, columns, [7000, 50_000]), ["a", "a", "b"], settings(1, 0.01))
    assert reasons_of(found) == oracle(columns, ["a"] * 50_000 + ["b"] * 10_000)


def test_the_split_into_files_does_not_matter(tmp_path: Path) -> None:
    columns = random_columns(5000, bands=2)
    one = find_duplicates(write(tmp_path / "one", columns, []), ["a"], settings(2))
    many = find_duplicates(write(tmp_path / "many", columns, range(100, 5000, 100)), ["a"] * 50, settings(2))
    assert reasons_of(one) == reasons_of(many)


@pytest.mark.parametrize("common", [0.0, 0.9])
def test_two_million_signatures_are_compared_within_the_memory(tmp_path: Path, common: float) -> None:
    documents, memory_mb = 2_000_000, 16
    columns = random_columns(documents, bands=1, common=common)
    files = write(tmp_path, columns, range(200_000, documents, 200_000))
    dropped = sum(len(np.unique(codes)) > 1 for codes in find_duplicates(files, ["a"] * 10, settings(1, 1000)).codes)

    def peak(memory_mb: float) -> float:
        tracemalloc.start()
        find_duplicates(files, ["a"] * 10, settings(1, memory_mb))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return (most - documents) / 1e6

    assert dropped == 10
    assert peak(memory_mb) < memory_mb
    assert peak(200) > 2 * memory_mb


def test_the_first_is_kept_and_a_dropped_one_still_counts(tmp_path: Path) -> None:
    columns = np.array(
        [[1, 11, 21], [2, 11, 22], [3, 12, 22], [3, 13, 23], [4, 14, 24], [0, 0, 0], [0, 0, 0]], np.uint64
    )
    found = find_duplicates(write(tmp_path, columns, [1]), ["a", "b"], settings(2))
    assert reasons_of(found) == [None, "near_duplicate: a", "near_duplicate: b", "exact_duplicate: b", None, None, None]


def test_exact_goes_before_near_and_either_can_be_off(tmp_path: Path) -> None:
    columns = np.array([[1, 11], [2, 12], [1, 11], [3, 12]], np.uint64)
    files = write(tmp_path, columns, [])
    for exact, minhash, expected in (
        (True, True, ["exact_duplicate: a", "near_duplicate: a"]),
        (True, False, ["exact_duplicate: a", None]),
        (False, True, ["near_duplicate: a", "near_duplicate: a"]),
        (False, False, [None, None]),
    ):
        found = find_duplicates(files, ["a"], DedupConfig(exact=exact, minhash=minhash, bands=1))
        assert reasons_of(found) == [None, None, *expected]


def test_nothing_has_no_duplicates(tmp_path: Path) -> None:
    assert find_duplicates([], [], settings(2)).codes == ()
    files = write(tmp_path, random_columns(1, bands=2)[:0], [0, 0])
    assert [len(codes) for codes in find_duplicates(files, ["a"] * 3, settings(2)).codes] == [0, 0, 0]


def test_documents_that_filters_dropped_are_not_compared(tmp_path: Path) -> None:
    hashes, file = np.array([5, 5, 5], np.uint64), tmp_path / "a.signatures"
    write_signatures(file, hashes, hashes[:, None], np.array([False, True, True]))
    assert reasons_of(find_duplicates([file], ["a"], settings(1))) == [None, None, "exact_duplicate: a"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.signatures"]


def test_two_hundred_sources_are_distinguished(tmp_path: Path) -> None:
    columns = np.repeat(np.arange(1, 201, dtype=np.uint64), 2)[:, None] * np.array([1, 1000], np.uint64)
    names = [f"s{i}" for i in range(200)]
    found = find_duplicates(write(tmp_path, columns, range(2, 400, 2)), names, settings(1))
    assert reasons_of(found)[1::2] == [f"exact_duplicate: {name}" for name in names]


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    (file,) = write(tmp_path, random_columns(100, bands=2), [])
    with pytest.raises(DataError, match=r"000\.signatures: has shape \(3, 100\), not 15 rows"):
        find_duplicates([file], ["a"], settings(14))
    intact = file.read_bytes()
    for content, message in (
        (intact[:-8], "has 2520 bytes, not 2528"),
        (intact[:50], "not a signature file"),
        (b"", "not a signature file"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"000\.signatures: {message}.*; remove it and prepare again"):
            find_duplicates([file], ["a"], settings(2))
    file.write_bytes(intact)
    with pytest.raises(ValueError, match="must be consecutive, got a, b, a"):
        find_duplicates([file] * 3, ["a", "b", "a"], settings(2))


PAIRS, DOCUMENTS = 5000, 50_000


@pytest.fixture(scope="module")
def planted() -> tuple[list[str], dict[float, NDArray[np.int64]]]:
    """Return 50,000 documents of 60 to 120 words, and by similarity the indices of planted pairs, [pairs, 2],
    ascending.

    The documents of a pair share as many first words as the similarity requires.
    """
    rng = np.random.default_rng(7)
    vocabulary = np.array(["".join(letters) for letters in rng.choice(list("abcdefghijklmnopqrstuvwxyz"), (20_000, 6))])
    place = rng.permutation(DOCUMENTS)
    texts, pairs, used = [""] * DOCUMENTS, {}, 0
    for jaccard in (0.85, 0.4):
        numbers = np.sort(place[used : used + 2 * PAIRS].reshape(PAIRS, 2), axis=1)
        for first, second in numbers.tolist():
            shingles = int(rng.integers(56, 117))
            shared = round(2 * shingles * jaccard / (1 + jaccard)) + 4
            drawn = vocabulary[rng.integers(0, len(vocabulary), 2 * shingles + 8 - shared)].tolist()
            texts[first] = " ".join(drawn[: shingles + 4])
            texts[second] = " ".join(drawn[:shared] + drawn[shingles + 4 :])
        pairs[jaccard], used = numbers, used + 2 * PAIRS
    for number in place[used:].tolist():
        texts[number] = " ".join(vocabulary[rng.integers(0, len(vocabulary), int(rng.integers(60, 121)))].tolist())
    return texts, pairs


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(*(words[i:] for i in range(5)), strict=False))


def found_fractions(
    folder: Path, texts: list[str], pairs: dict[float, NDArray[np.int64]], bands: int, rows: int
) -> dict[float, float]:
    """Return the fraction of pairs whose second document is dropped, by similarity; under -1 that of documents in no
    pair.
    """
    min_hasher, files = MinHasher(5, bands, rows), []
    for start in range(0, len(texts), 10_000):
        batch = texts[start : start + 10_000]
        files.append(folder / f"{start}.signatures")
        hashes = np.array([text_hash(text) for text in batch], np.uint64)
        write_signatures(files[-1], hashes, min_hasher.hash_bands(batch), np.ones(len(batch), np.bool_))
    config = DedupConfig(exact=True, minhash=True, bands=bands, rows=rows, memory_mb=1)
    dropped = np.concatenate(find_duplicates(files, ["a", "a", "b", "b", "b"], config).codes) > 0
    planted = np.concatenate([numbers.ravel() for numbers in pairs.values()])
    return {jaccard: float(dropped[numbers[:, 1]].mean()) for jaccard, numbers in pairs.items()} | {
        -1: float(np.delete(dropped, planted).mean())
    }


def test_planted_near_duplicates_are_found_and_others_are_not(
    tmp_path: Path, planted: tuple[list[str], dict[float, NDArray[np.int64]]]
) -> None:
    texts, pairs = planted
    assert len(texts) == DOCUMENTS
    for jaccard, numbers in pairs.items():
        both = [(shingles(texts[first]), shingles(texts[second])) for first, second in numbers[:1500].tolist()]
        true = np.array([len(a & b) / len(a | b) for a, b in both])
        assert abs(true.mean() - jaccard) < 0.002
        assert np.abs(true - jaccard).max() < 0.03  # words after the shared ones may be equal by chance
    found = found_fractions(tmp_path, texts, pairs, bands=14, rows=8)
    print(
        f"\nof the pairs at 0.85 found {found[0.85]:.2%}, at 0.4 {found[0.4]:.2%}, of other documents {found[-1]:.2%}"
    )
    assert found[0.85] >= 0.95
    assert found[0.4] <= 0.02
    assert found[-1] == 0
    for jaccard in (0.85, 0.4):
        expected = detection_probability(jaccard, 14, 8)
        assert abs(found[jaccard] - expected) < 4 * (expected * (1 - expected) / PAIRS) ** 0.5 + 0.002


def test_the_planted_pairs_detect_wrong_numbers_of_bands_and_rows(
    tmp_path: Path, planted: tuple[list[str], dict[float, NDArray[np.int64]]]
) -> None:
    assert found_fractions(tmp_path, *planted, bands=14, rows=4)[0.4] > 0.1
    assert found_fractions(tmp_path, *planted, bands=4, rows=8)[0.85] < 0.8
