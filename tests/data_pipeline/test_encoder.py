import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tokenizing import encoder
from data_pipeline.tokenizing.encoder import (
    HARD_STRINGS,
    GigaEncoder,
    ReferenceEncoder,
    hard_strings_for,
    select_encoder,
)
from data_pipeline.tokenizing.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer

TEXTS = [f"def step_{i}(loss, rate):\n    return loss * {i} - rate\n" for i in range(300)]
WRITTEN_OUT = st.sampled_from([END_OF_TEXT, "<|", "|>", "endoftext", "<tool>", " ", "\n"])
MIXED = st.lists(WRITTEN_OUT | st.text(), max_size=8).map("".join)


class PanicException(BaseException):
    """Like a panic in Rust code, which in Python is not an Exception."""


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Make each test load gigatoken anew."""
    encoder._checked_giga.cache_clear()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def with_tokens(path: Path, tokenizer: Tokenizer, *tokens: tuple[str, bool]) -> Tokenizer:
    """Return the tokenizer with further added tokens, (content, special), which are not in its model's vocabulary."""
    config = json.loads(tokenizer.to_json())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    config["added_tokens"] += [
        {"id": 400 + i, "content": name, "special": special, **flags} for i, (name, special) in enumerate(tokens)
    ]
    (path / "more.json").write_text(json.dumps(config))
    return load_tokenizer(path / "more.json")


def rows(encoded: tuple[Any, Any]) -> list[list[int]]:
    ids, offsets = encoded
    assert (ids.dtype, offsets.dtype, offsets[0], offsets[-1]) == (np.uint32, np.int64, 0, len(ids))
    return [ids[start:stop].tolist() for start, stop in pairwise(offsets)]


@settings(deadline=None)
@given(texts=st.lists(MIXED, max_size=5))
def test_both_libraries_give_the_ids_of_the_tokenizer_and_never_a_special_one(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    expected = [tokenizer.encode(text) for text in texts]
    assert rows(ReferenceEncoder(tokenizer).encode(texts)) == expected
    assert rows(GigaEncoder(tokenizer).try_encode(texts)) == expected
    assert all(tokenizer.eot_id not in ids for ids in expected)


def test_gigatoken_is_chosen_where_its_ids_are_the_same(tokenizer: Tokenizer) -> None:
    chosen, why = select_encoder(tokenizer, TEXTS)
    assert chosen.name == "gigatoken"
    assert (
        why
        == f"gigatoken: its ids are those of tokenizers on 300 texts of the data and {len(HARD_STRINGS) + 6} hard ones"
    )
    assert select_encoder(tokenizer, TEXTS[:2])[0] is chosen  # loaded once
    assert rows(chosen.encode([])) == []
    assert rows(chosen.encode(["", "a", ""]))[::2] == [[], []]


def test_special_tokens_are_encoded_as_text_and_other_added_tokens_as_tokens(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    more = with_tokens(tmp_path, tokenizer, ("<|im_start|>", True), ("<tool>", False), ("<|im_start|>system", True))
    chosen, _ = select_encoder(more, TEXTS)
    assert chosen.name == "gigatoken"
    texts = ["a<|im_start|>b", "<tool>x<|im_start|>system<tool>", "<|im_start|<tool>", END_OF_TEXT * 2]
    ids = rows(chosen.encode(texts))
    assert ids == [more.encode(text) for text in texts]
    assert [400 in row or 402 in row or more.eot_id in row for row in ids] == [False] * 4
    assert [row.count(401) for row in ids] == [0, 2, 1, 0]


@pytest.mark.parametrize("ordinary", ["|>x", "im_start", "x<|"])
def test_a_token_that_overlaps_a_special_one_gives_the_ids_of_the_reference(
    tokenizer: Tokenizer, tmp_path: Path, ordinary: str
) -> None:
    more = with_tokens(tmp_path, tokenizer, ("<|im_start|>", True), (ordinary, False))
    chosen, _ = select_encoder(more, [])
    texts = ["<|im_start|>x", "x<|im_start|>", "a|>x<|im_start|>im_start"]
    expected = [more.encode(text) for text in texts]
    assert rows(chosen.encode(texts)) == expected
    if chosen.name == "tokenizers":  # control: gigatoken is wrong on some of these
        assert rows(GigaEncoder(more).try_encode(texts)) != expected


def test_hard_strings_hold_the_overlaps_of_special_tokens_with_others() -> None:
    added = [
        {"content": "<|a|>", "special": True},
        {"content": "|>x", "special": False},
        {"content": "y<", "special": False},
    ]
    texts = hard_strings_for({"added_tokens": added})
    assert {"<|a|>", "<|a|>x", "y<|a|>", "<|a|><|a|>"} <= set(texts)
    assert hard_strings_for({"added_tokens": []}) == []


@pytest.mark.parametrize("name", ["<|a{}|>", "a{}a"])
def test_hard_strings_grow_as_the_tokens_do(name: str) -> None:
    """The number of texts grows linearly: each token is combined with one other for each of its suffixes."""
    added = [{"content": name.format(1000 + i), "special": i % 2 == 0} for i in range(2000)]
    texts = hard_strings_for({"added_tokens": added})
    overlapping = len(texts) - 6 * len(added)
    assert overlapping == (2000 if name == "a{}a" else 0)
    assert name.startswith("<") or "a1000a1001a" in texts


@pytest.mark.parametrize(("wrong", "quoted"), [(TEXTS, "'def step_7(loss"), (HARD_STRINGS, "'0 12 123 1234567890")])
def test_a_wrong_id_in_the_data_or_in_a_hard_string_falls_back_and_names_the_text(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, wrong: list[str], quoted: str
) -> None:
    true_encode = GigaEncoder.try_encode

    def off_by_one(self: GigaEncoder, texts: list[str]) -> tuple[Any, Any]:
        ids, offsets = true_encode(self, texts)
        ids = ids.copy()
        ids[offsets[7]] += texts[7] == wrong[7]
        return ids, offsets

    monkeypatch.setattr(GigaEncoder, "try_encode", off_by_one)
    chosen, why = select_encoder(tokenizer, TEXTS)
    assert chosen.name == "tokenizers"
    assert why.startswith("tokenizers: gigatoken gives other ids, first for " + quoted)


def test_a_tokenizer_that_gigatoken_does_not_support_falls_back(tmp_path: Path) -> None:
    unigram = train_tokenizer(TEXTS, 400, tmp_path / "tokenizer.json", "unigram")
    chosen, why = select_encoder(unigram, TEXTS)
    assert (chosen.name, why.split(" (")[0]) == ("tokenizers", "tokenizers: gigatoken cannot load this tokenizer")
    assert rows(chosen.encode(TEXTS)) == unigram.encode_batch(TEXTS)


def test_a_missing_gigatoken_falls_back(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    chosen, why = select_encoder(tokenizer, TEXTS)
    assert chosen.name == "tokenizers"
    assert why.startswith("tokenizers: gigatoken is not installed")


@pytest.mark.parametrize("error", [PanicException("index out of bounds\nat src"), RuntimeError("no"), TypeError()])
def test_a_panic_falls_back_at_any_time(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    giga = GigaEncoder(tokenizer)

    def panic(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(gigatoken.Tokenizer, "encode_batch", panic)
    chosen, why = select_encoder(tokenizer, TEXTS)
    assert chosen.name == "tokenizers"
    detail = str(error).splitlines()[0] if str(error) else type(error).__name__
    assert why == f"tokenizers: gigatoken broke on a text ({detail})"
    assert rows(giga.encode(TEXTS)) == tokenizer.encode_batch(TEXTS)
    assert giga.failures == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_is_not_a_failure_of_gigatoken(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(gigatoken.Tokenizer, "encode_batch", stop)
    with pytest.raises(type(error)):
        select_encoder(tokenizer, TEXTS)


def test_the_library_is_loaded_anew_when_its_memory_has_grown(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    giga = GigaEncoder(tokenizer)
    monkeypatch.setattr(encoder, "_CACHE_BYTES", 8 << 20)
    rng, loaded, backends = np.random.default_rng(0), giga._backend, set[int]()
    for _ in range(12):  # random words: 9 bytes of memory for each byte of text
        words = rng.integers(97, 123, (40_000, 9), dtype=np.uint8)
        words[:, 0] = 32
        text = words.tobytes().decode()
        assert rows(giga.encode([text[:500]])) == [tokenizer.encode(text[:500])]
        giga.encode([text])
        backends.add(id(giga._backend))
    assert giga._backend is not loaded
    assert len(backends) > 1


def test_without_proc_the_text_is_counted(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_resident_bytes", lambda: 0)
    monkeypatch.setattr(encoder, "_CACHE_BYTES", 9 * 10_000)
    giga = GigaEncoder(tokenizer)
    loaded = giga._backend
    giga.encode(["a b " * 1500])
    assert giga._backend is loaded
    giga.encode(["a b " * 1500, "c d " * 1500])
    assert giga._backend is not loaded
