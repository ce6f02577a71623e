import unicodedata
from collections.abc import Iterable

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline import hashing
from data_pipeline.cleaning.minhash import NO_WORDS, MinHasher, detection_probability, similarity_threshold, text_hash
from data_pipeline.hashing import hash_ngrams, splitmix64, word_batches

TEXT = st.text(
    st.one_of(
        st.characters(), st.sampled_from("aAbZ019_-. \n\u00e9\u00c9\u03a3\u4e2d\u6587\u0e01\U0001f600\U00020000")
    ),
    max_size=40,
)


def words(text: str) -> list[str]:
    """Split a text into words, one character at a time."""
    found, before = [], False
    for character in text:
        letter = unicodedata.category(character)[0] in "LMN" and ord(character) < 0x40000
        alone = any(first <= ord(character) <= last for first, last in hashing._NO_SPACES)
        if letter and before and not alone:
            found[-1] += character.lower()[0]
        elif letter:
            found.append(character.lower()[0])
        before = letter and not alone
    return found


def hashes_of(texts: list[str]) -> list[list[int]]:
    """Return the word hashes of each text."""
    out: list[list[int]] = [[] for _ in texts]
    for first, hashed, counts in word_batches(texts, 0):
        for i, part in enumerate(np.split(hashed, counts.cumsum()[:-1])):
            out[first + i] += part.tolist()
    return out


def sets_of_similarity(
    jaccard: float, size: int, pairs: int, rng: np.random.Generator
) -> tuple[list[str], list[str], float]:
    """Return pairs of texts of `size` different words, and their Jaccard similarity, the nearest one to `jaccard`."""
    shared = round(2 * size * jaccard / (1 + jaccard))
    drawn = splitmix64(np.arange(pairs * (2 * size - shared), dtype=np.uint64) + np.uint64(rng.integers(2**60)))
    rows = [[f"{number:x}" for number in row] for row in drawn.reshape(pairs, -1).tolist()]
    first, second = [" ".join(row[:size]) for row in rows], [" ".join(row[size - shared :]) for row in rows]
    return first, second, shared / (2 * size - shared)


def curve(
    min_hasher: MinHasher, points: Iterable[float], size: int = 60, pairs: int = 1500
) -> list[tuple[float, float, float]]:
    """Return (similarity, fraction of pairs with an equal band, difference from theory in standard errors)."""
    rng, rows = np.random.default_rng(0), []
    for point in points:
        first, second, jaccard = sets_of_similarity(point, size, pairs, rng)
        found = float((min_hasher.hash_bands(first) == min_hasher.hash_bands(second)).any(1).mean())
        expected = detection_probability(jaccard, min_hasher.bands, min_hasher.rows)
        error = max((expected * (1 - expected) / pairs) ** 0.5, 1 / pairs)
        rows.append((jaccard, found, (found - expected) / error))
    return rows


def make_functions_equal(min_hasher: MinHasher) -> MinHasher:
    """Negative control: make all hash functions equal."""
    min_hasher._factors[:] = min_hasher._factors[0, 0]
    return min_hasher


def test_splitmix64_gives_its_published_sequence() -> None:
    state = np.array([0, hashing.GOLDEN_GAMMA, 2 * hashing.GOLDEN_GAMMA % 2**64], np.uint64)
    assert splitmix64(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert state[0] == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, max_size=8))
def test_words_are_lower_case_runs_of_letters_in_any_script(texts: list[str]) -> None:
    alone = {word: hashes_of([word])[0] for text in texts for word in words(text)}
    assert all(len(hashed) == 1 for hashed in alone.values())
    assert len({hashed[0] for hashed in alone.values()}) == len(alone)
    assert hashes_of(texts) == [[alone[word][0] for word in words(text)] for text in texts]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "of", "The", "\u4e2d\u6587", "-", "\n"]), max_size=60).map(" ".join),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 5),
    st.sampled_from([8, 16, 64, 1 << 17]),
)
def test_a_signature_depends_on_its_text_alone(texts: list[str], ngram: int, batch: int) -> None:
    min_hasher = MinHasher(ngram, bands=3, rows=2)
    alone = np.concatenate([min_hasher.hash_bands([" ".join(words(text))]) for text in texts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "BATCH_CHARACTERS", batch)
        assert np.array_equal(min_hasher.hash_bands(texts), alone)


def test_the_ngrams_of_a_text_of_many_batches_are_those_of_the_text() -> None:
    text = " ".join(map(str, range(200_000)))
    expected = {hash(tuple(range(i, i + 5))) for i in range(199_996)}
    seen = [hash_ngrams(hashed, counts, 5)[0] for _, hashed, counts in word_batches([text], 4)]
    assert len(seen) > 4
    assert len(np.unique(np.concatenate(seen))) == len(expected)


def test_exact_means_equal_ignoring_case_and_white_space() -> None:
    assert text_hash(" The  end\n") == text_hash("the end") == text_hash("THE\u00a0END")
    assert len({text_hash(text) for text in ("a+b", "a-b", "ab", "a b", "")}) == 5


@settings(max_examples=200, deadline=None)
@given(st.text("aB \n\u00a0\u00df-", max_size=60), st.sampled_from([2, 4, 10, 1 << 17]))
def test_a_long_text_has_the_hash_of_its_normal_form(text: str, batch: int) -> None:
    normal = " ".join(text.casefold().split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "BATCH_CHARACTERS", batch)
        assert text_hash(text) == text_hash(normal) == xxhash.xxh3_64_intdigest(normal.encode())


def test_near_means_the_same_words_whatever_separates_them() -> None:
    min_hasher = MinHasher(5, 4, 2)
    plain, fancy, other, sum_, difference = min_hasher.hash_bands(
        ["he said no", "\u201cHe said\u2014\u2018NO\u2019!\u201d", "he said on", "a+b", "a-b"]
    )
    assert np.array_equal(plain, fancy)
    assert not (plain == other).any()
    assert np.array_equal(sum_, difference)


def test_a_short_text_is_one_shingle_and_one_without_words_has_none() -> None:
    min_hasher = MinHasher(5, 4, 2)
    assert (min_hasher.min_hashes(["", "+-*/ \u2026", "one", "one two"]) == NO_WORDS).all((0, 1)).tolist() == [
        True,
        True,
        False,
        False,
    ]
    nothing, signs, one, two = min_hasher.hash_bands(["", "+-*/ \u2026", "one", "one two"])
    assert not nothing.any()
    assert not signs.any()
    assert one.all()
    assert not (one == two).any()


def test_the_signatures_are_what_they_have_always_been() -> None:
    texts = ["the first of all documents", "\u4e2d\u6587 and English"]
    assert MinHasher(2, 2, 3).hash_bands(texts).tolist() == [
        [7927044909928579378, 16678560112165194902],
        [13225486576149511738, 12960482693965880010],
    ]
    assert text_hash(texts[0]) == 7050139128667358936


@pytest.mark.parametrize("size", [10, 100, 1000])
@pytest.mark.parametrize("jaccard", [0.1, 0.5, 0.9])
def test_the_estimated_similarity_is_unbiased(size: int, jaccard: float) -> None:
    min_hasher, pairs = MinHasher(ngram=1, bands=64, rows=8), 20
    first, second, true = sets_of_similarity(jaccard, size, pairs, np.random.default_rng(size))
    functions = min_hasher.bands * min_hasher.rows

    def errors(min_hasher: MinHasher) -> NDArray[np.float64]:
        estimate = (min_hasher.min_hashes(first) == min_hasher.min_hashes(second)).mean((0, 1))
        return np.asarray((estimate - true) / (true * (1 - true) / functions) ** 0.5)

    found = errors(min_hasher)
    assert np.abs(found).max() < 4
    assert abs(found.mean()) < 4 / pairs**0.5
    assert np.abs(errors(make_functions_equal(min_hasher))).max() > 4


def test_pairs_are_found_as_theory_says() -> None:
    rows = curve(MinHasher(1, 14, 8), [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9])
    print(*(f"\nJ={jaccard:.3f} found {found:.4f} {errors:+.1f} standard errors" for jaccard, found, errors in rows))
    assert max(abs(errors) for _, _, errors in rows) < 4
    assert rows[1][1] < 0.02
    assert rows[6][1] > 0.95


def test_one_row_finds_dissimilar_pairs() -> None:
    ((_, found, errors),) = curve(MinHasher(1, 14, 1), [0.4])
    assert found > 0.99
    assert abs(errors) < 4


def test_identical_hash_functions_do_not_give_the_curve() -> None:
    rows = curve(make_functions_equal(MinHasher(1, 14, 8)), [0.4, 0.7])
    assert all(abs(errors) > 10 for _, _, errors in rows)
    assert abs(rows[0][1] - 0.4) < 0.06


def test_the_threshold_finds_half() -> None:
    assert detection_probability(similarity_threshold(14, 8), 14, 8) == pytest.approx(0.5)
    assert similarity_threshold(14, 8) == pytest.approx(0.685, abs=5e-4)
