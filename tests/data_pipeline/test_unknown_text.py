"""Unknown tokens and lost characters are counted in every document."""

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_configs import (
    COMPLETE,
    DOCUMENTS,
    LETTERS,
    LOSSY,
    WITH_UNKNOWN_TOKEN,
    bpe,
    byte_level_without,
    load,
    prepared_with,
    tokenizer_of,
)

from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.manifest import MANIFEST, load_manifest
from data_pipeline.tokenizing.coverage import LOST_CHARACTERS, NO_TOKENS, UNKNOWN_TOKENS
from data_pipeline.tokenizing.encoder import ReferenceEncoder
from data_pipeline.tokenizing.tokenizer import END_OF_TEXT
from data_pipeline.tokenizing.unknown_text import UnknownTextCounter


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("bpe", (5, 31, 6, 3)),
        ("bpe fused", (5, 29, 4, 3)),
        ("unigram", (5, 29, 4, 3)),
        ("wordlevel", (5, 15, 7, 4)),
        ("wordpiece", (5, 26, 6, 3)),
    ],
)
def test_unknown_tokens_and_their_documents_are_counted(tmp_path: Path, name: str, counts: tuple[int, ...]) -> None:
    source = prepared_with(tmp_path, WITH_UNKNOWN_TOKEN[name]).splits["train"].sources[0]
    documents, tokens, unknown, holding = counts
    assert (source.documents, source.tokens, source.unknown_tokens) == (documents, tokens, unknown)
    assert (source.marked, source.dropped, source.lost_characters) == ({UNKNOWN_TOKENS: holding}, {}, 0)


@pytest.mark.parametrize(
    ("name", "documents", "tokens", "dropped", "holding", "lost"),
    [
        ("characters", 4, 24, {NO_TOKENS: 1}, 2, 4),
        ("byte fallback of 253", 4, 24, {NO_TOKENS: 1}, 2, 4),
        ("253 bytes", 5, 37, {}, 3, 4),  # 漢 keeps two bytes, 字 all, and each é one
    ],
)
def test_lost_characters_are_counted_if_the_user_allows_a_lossy_tokenizer(
    tmp_path: Path, name: str, documents: int, tokens: int, dropped: dict[str, int], holding: int, lost: int
) -> None:
    prepared = prepared_with(tmp_path, LOSSY[name], allow_lossy_tokenizer=True)
    source = prepared.splits["train"].sources[0]
    assert (source.documents, source.tokens, source.dropped) == (documents, tokens, dropped)
    assert (source.marked, source.lost_characters, source.unknown_tokens) == ({LOST_CHARACTERS: holding}, lost, 0)
    assert source.read == len(DOCUMENTS)
    assert (
        prepared.notes[0]
        == "the tokenizer has neither an unknown token nor all bytes: characters that it does not know vanish"
    )
    rejects = [
        zstandard.ZstdDecompressor().stream_reader(f.read_bytes()).read() for f in (tmp_path / "data").glob("rejects/*")
    ]
    rows = [json.loads(line) for raw in rejects for line in raw.splitlines()]
    assert [(row["text"], row["reason"]) for row in rows] == [("漢字", NO_TOKENS)] * len(dropped)


@pytest.mark.parametrize("name", COMPLETE)
def test_a_tokenizer_of_all_bytes_loses_nothing_and_encodes_once(tmp_path: Path, name: str) -> None:
    prepared = prepared_with(tmp_path, COMPLETE[name])
    source = prepared.splits["train"].sources[0]
    assert (source.documents, source.marked, source.unknown_tokens, source.lost_characters) == (5, {}, 0, 0)
    counter = UnknownTextCounter(prepared.tokenizer)
    losses = counter.count(["漢"], np.array([1, 1], np.uint32), np.array([0, 2]))  # so ids of 1 are not compared
    assert (losses.unknown.tolist(), losses.lost.tolist(), counter._unk_tokenizer) == ([0], [0], None)


def test_a_corpus_of_only_unknown_characters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hold no text to keep \(documents read: 1 empty, 2 encodes to nothing\)"):
        prepared_with(tmp_path, LOSSY["characters"], ["漢字", "", "é"], allow_lossy_tokenizer=True)


def test_documents_that_encode_to_nothing_for_other_reasons_are_dropped(tmp_path: Path) -> None:
    config = tokenizer_of(
        WITH_UNKNOWN_TOKEN["bpe"]["model"], normalizer={"type": "Replace", "pattern": {"Regex": "[x-z]"}, "content": ""}
    )
    prepared = prepared_with(tmp_path, config, ["xyz", "axyz", "abc"])
    source = prepared.splits["train"].sources[0]
    assert (source.documents, source.tokens, source.dropped, source.marked) == (2, 6, {NO_TOKENS: 1}, {})
    assert prepared.notes[0] == (
        "the tokenizer changes text before it encodes it: Replace '[x-z]' by ''. Tokens decode to the changed text"
    )


CHARACTERS = st.text(alphabet="abc éè漢\u0301eE\n\U00040000")


@settings(deadline=None)
@given(texts=st.lists(CHARACTERS, max_size=4))
def test_lost_characters_are_those_without_an_id(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("lossy")
    for config, is_lost in (
        (LOSSY["characters"], lambda c: c not in "abc "),
        (byte_level_without(0xA9, 0xF1), lambda c: bool(set(c.encode()) & {0xA9, 0xF1})),
    ):
        tokenizer = load(folder, config)
        losses = UnknownTextCounter(tokenizer).count(texts, *ReferenceEncoder(tokenizer).encode(texts))
        assert losses.lost.tolist() == [sum(map(is_lost, text)) for text in texts]
        assert losses.unknown.tolist() == [0] * len(texts)


@settings(deadline=None)
@given(texts=st.lists(CHARACTERS, max_size=4))
def test_unknown_tokens_are_those_of_each_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    tokenizer = load(tmp_path_factory.mktemp("unknowing"), WITH_UNKNOWN_TOKEN["bpe"])
    losses = UnknownTextCounter(tokenizer).count(texts, *ReferenceEncoder(tokenizer).encode(texts))
    assert losses.unknown.tolist() == [sum(c not in "abc " for c in text) for text in texts]


def test_a_loss_that_depends_on_neighbors_is_counted_where_it_happens(tmp_path: Path) -> None:
    # The first composes é and has no token for it; the second has b only at the beginning of words.
    composing = tokenizer_of(bpe({END_OF_TEXT: 0, "e": 1, "\u0301": 2}), normalizer={"type": "NFC"})
    prefixed = tokenizer_of(bpe({END_OF_TEXT: 0, "a": 1, "##a": 2, "b": 3}, continuing_subword_prefix="##"))
    for config, texts, lost in (
        (composing, ["e\u0301", "\u0301e", "ee"], [1, 0, 0]),
        (prefixed, ["ba", "ab", "abba"], [0, 1, 2]),
    ):
        tokenizer = load(tmp_path, config)
        assert (
            UnknownTextCounter(tokenizer).count(texts, *ReferenceEncoder(tokenizer).encode(texts)).lost.tolist() == lost
        )


def test_an_added_token_of_unknown_characters_loses_nothing(tmp_path: Path) -> None:
    config = tokenizer_of(bpe(LETTERS))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    config["added_tokens"] += [{"id": 5, "content": "<é>", "special": False, **flags}]
    tokenizer = load(tmp_path, config)
    texts = ["a<é>b", "<é", "abc"]
    assert UnknownTextCounter(tokenizer).count(texts, *ReferenceEncoder(tokenizer).encode(texts)).lost.tolist() == [
        0,
        2,
        0,
    ]
    control = load(tmp_path, tokenizer_of(bpe(LETTERS)))
    assert UnknownTextCounter(control).count(texts, *ReferenceEncoder(control).encode(texts)).lost.tolist() == [3, 2, 0]


def test_counts_are_imported_with_existing_tokens(tmp_path: Path) -> None:
    first = prepared_with(tmp_path, WITH_UNKNOWN_TOKEN["bpe"])
    config = PrepareConfig(
        sources=(
            SourceConfig(name="taken", kind="prepared", paths=(str(first.path),)),
            SourceConfig(name="read", kind="megatron", paths=(str(next((first.path / "train").glob("*.bin"))),)),
        ),
        tokenizer=first.path / "tokenizer.json",
        validation_fraction=0,
    )
    taken, read = prepare(tmp_path / "second", config).splits["train"].sources
    assert (taken.unknown_tokens, taken.marked) == (6, {UNKNOWN_TOKENS: 3})
    assert (read.unknown_tokens, read.marked, read.tokens) == (6, {UNKNOWN_TOKENS: 3}, 31)


def test_existing_tokens_may_come_from_a_lossy_tokenizer(tmp_path: Path) -> None:
    first = prepared_with(tmp_path, LOSSY["characters"], allow_lossy_tokenizer=True)
    source = SourceConfig(name="taken", kind="prepared", paths=(str(first.path),))
    config = PrepareConfig(sources=(source,), tokenizer=first.path / "tokenizer.json", validation_fraction=0)
    (taken,) = prepare(tmp_path / "second", config).splits["train"].sources
    assert (taken.lost_characters, taken.marked, taken.dropped) == (4, {LOST_CHARACTERS: 2}, {NO_TOKENS: 1})


def test_an_old_manifest_without_these_counts_loads(tmp_path: Path) -> None:
    file = prepared_with(tmp_path, WITH_UNKNOWN_TOKEN["bpe"]).path / "train" / MANIFEST
    old = json.loads(file.read_text())
    for source in old["sources"]:
        assert source.pop("unknown_tokens") > 0
        assert "lost_characters" not in source  # a count of 0 is not written
    assert "allow_lossy_tokenizer" not in old["recipe"]["settings"]
    file.write_text(json.dumps(old))
    (source,) = load_manifest(file.parent).sources
    assert (source.unknown_tokens, source.lost_characters, source.documents) == (0, 0, 5)
