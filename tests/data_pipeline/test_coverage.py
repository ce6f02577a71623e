"""Text that a tokenizer cannot represent is counted and reported, or refused: nothing vanishes silently."""

import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.inspect import describe_data
from data_pipeline.prepare import prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.manifest import MANIFEST, load_manifest
from data_pipeline.storage.prepared import PreparedData
from data_pipeline.tokenizing.coverage import LOST_CHARACTERS, NO_TOKENS, UNKNOWN_TOKENS, analyze_coverage
from data_pipeline.tokenizing.encoder import GigaEncoder, ReferenceEncoder, select_encoder
from data_pipeline.tokenizing.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer
from data_pipeline.tokenizing.tokenizer_formats import SPLIT_PATTERN, byte_characters, byte_level, make_tokenizer_config
from data_pipeline.tokenizing.unknown_text import UnknownTextCounter

DOCUMENTS = ["abc abc", "ab 漢字 c", "漢字", "é abc é", "cab"]
LETTERS = {name: number for number, name in enumerate([END_OF_TEXT, *"abc "])}
FALLBACK = {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
BYTES = {END_OF_TEXT: 0} | {name: byte + 1 for byte, name in byte_characters().items()}
BERT = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": True,
}
Config = dict[str, Any]  # Any: JSON


def bpe(vocab: dict[str, int], **settings: object) -> Config:
    affixes = {"unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "type": "BPE",
        "dropout": None,
        "fuse_unk": False,
        "byte_fallback": False,
        **affixes,
        "vocab": vocab,
        "merges": [],
        **settings,
    }


def tokenizer_of(model: Config, **stages: object) -> Config:
    return make_tokenizer_config({END_OF_TEXT: 0}, model, **stages)


def without(vocab: dict[str, int], *names: str) -> dict[str, int]:
    return {name: number for name, number in vocab.items() if name not in names}


def byte_level_without(*missing: int) -> Config:
    """A byte-level BPE that lacks some bytes."""
    names = byte_characters()
    return tokenizer_of(
        bpe(without(BYTES, *(names[byte] for byte in missing))), pre_tokenizer=byte_level(SPLIT_PATTERN)
    )


LOSSY: dict[str, Config] = {
    "characters": tokenizer_of(bpe(LETTERS)),
    "byte fallback of 253": tokenizer_of(
        bpe(LETTERS | without(FALLBACK, "<0xE6>", "<0xE5>", "<0xC3>"), byte_fallback=True)
    ),
    "253 bytes": byte_level_without(0xE6, 0xA9, 0xC0),
}
UNKNOWING: dict[str, Config] = {
    "bpe": tokenizer_of(bpe(LETTERS | {"<unk>": 5}, unk_token="<unk>")),
    "bpe fused": tokenizer_of(bpe(LETTERS | {"<unk>": 5}, unk_token="<unk>", fuse_unk=True)),
    "unigram": tokenizer_of(
        {"type": "Unigram", "unk_id": 5, "byte_fallback": False, "vocab": [[c, -1.0] for c in [*LETTERS, "<unk>"]]}
    ),
    "wordlevel": tokenizer_of(
        {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {END_OF_TEXT: 0, "abc": 1, "[UNK]": 2}},
        pre_tokenizer={"type": "Whitespace"},
    ),
    "wordpiece": tokenizer_of(
        {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {END_OF_TEXT: 0, "[UNK]": 1, "a": 2, "##b": 3, "##c": 4, "c": 5, "##a": 6},
        },
        normalizer=BERT,
        pre_tokenizer={"type": "BertPreTokenizer"},
    ),
}
COMPLETE: dict[str, Config] = {
    "bytes": byte_level_without(),
    "byte fallback": tokenizer_of(bpe(LETTERS | FALLBACK, byte_fallback=True)),
    "bytes with suffix, unknown is the end": tokenizer_of(
        bpe(
            BYTES | {f"{name}</w>": 257 + i for i, name in enumerate(BYTES)},
            end_of_word_suffix="</w>",
            unk_token=END_OF_TEXT,
        ),
        pre_tokenizer=byte_level(SPLIT_PATTERN),
    ),
    "unigram fallback": tokenizer_of(
        {
            "type": "Unigram",
            "unk_id": 1,
            "byte_fallback": True,
            "vocab": [[c, -1.0] for c in [END_OF_TEXT, "<unk>", "a", *FALLBACK]],
        }
    ),
}


def load(folder: Path, config: Config) -> Tokenizer:
    file = folder / "tokenizer-to-load.json"
    file.write_text(json.dumps(config))
    return load_tokenizer(file)


def prepared_with(folder: Path, config: Config, documents: list[str] = DOCUMENTS, **settings: Any) -> PreparedData:
    load(folder, config)
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    defaults: dict[str, Any] = {
        "sources": (SourceConfig(kind="jsonl", paths=(str(folder / "web.jsonl"),)),),
        "tokenizer": folder / "tokenizer-to-load.json",
        "validation_fraction": 0,
        "workers": 1,
    }
    return prepare(folder / "data", PrepareConfig(**(defaults | settings)), keep_rejects=True)


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
    source = prepared_with(tmp_path, UNKNOWING[name]).splits["train"].sources[0]
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


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("characters", ""),
        ("byte fallback of 253", " (3 of the 243 bytes of UTF-8 are missing)"),
        ("253 bytes", " (2 of the 243 bytes of UTF-8 are missing)"),
    ],
)
def test_a_lossy_tokenizer_is_refused_before_anything_is_written(tmp_path: Path, name: str, missing: str) -> None:
    with pytest.raises(DataError) as refused:
        prepared_with(tmp_path, LOSSY[name])
    assert str(refused.value) == (
        f"data.tokenizer={tmp_path}/tokenizer-to-load.json has neither an unknown token nor all bytes{missing}: "
        f"characters that it does not know would vanish; use another data.tokenizer, or set "
        f"data.allow_lossy_tokenizer=true to prepare without them"
    )
    assert not (tmp_path / "data").exists()


def test_the_command_line_refuses_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.cli import main

    with pytest.raises(DataError):
        prepared_with(tmp_path, LOSSY["characters"])
    words = [
        f"data.path={tmp_path}/data",
        f"data.tokenizer={tmp_path}/tokenizer-to-load.json",
        "data.workers=1",
        "data.validation_fraction=0",
    ]
    words.append(f"data.sources=[{{kind: jsonl, paths: ['{tmp_path}/web.jsonl']}}]")
    monkeypatch.setenv("COLUMNS", "200")
    for more, code in (([], 2), (["data.allow_lossy_tokenizer=true"], 0)):
        monkeypatch.setattr("sys.argv", ["pretrain", "data", "prepare", *words, *more])
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == code
        expected = capsys.readouterr()
        if code:
            assert len(expected.err.splitlines()) == 1
            assert "data.allow_lossy_tokenizer=true" in expected.err
            assert not (tmp_path / "data").exists()
        else:
            assert "  web: 1 dropped (encodes to nothing)\n" in expected.out
            assert "  web: 2 marked (lost characters)\n" in expected.out
            assert "  web: 4 characters that the tokenizer does not know are left out, of 2 documents\n" in expected.out


def test_other_models_without_an_unknown_token_are_refused_too(tmp_path: Path) -> None:
    for model in (
        {"type": "Unigram", "unk_id": None, "byte_fallback": False, "vocab": [[name, -1.0] for name in LETTERS]},
        {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {END_OF_TEXT: 0, "abc": 1}},
        bpe(LETTERS, unk_token="<unk>"),  # named, but not in the vocabulary
    ):
        with pytest.raises(
            DataError, match="has neither an unknown token nor all bytes: characters that it does not know would"
        ):
            prepared_with(tmp_path, tokenizer_of(model))
        assert not (tmp_path / "data").exists()


def test_a_corpus_of_only_unknown_characters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hold no text to keep \(documents read: 1 empty, 2 encodes to nothing\)"):
        prepared_with(tmp_path, LOSSY["characters"], ["漢字", "", "é"], allow_lossy_tokenizer=True)


def test_documents_that_encode_to_nothing_for_other_reasons_are_dropped(tmp_path: Path) -> None:
    config = tokenizer_of(
        UNKNOWING["bpe"]["model"], normalizer={"type": "Replace", "pattern": {"Regex": "[x-z]"}, "content": ""}
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
    tokenizer = load(tmp_path_factory.mktemp("unknowing"), UNKNOWING["bpe"])
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


def test_gigatoken_is_not_used_where_a_byte_is_missing(tmp_path: Path) -> None:
    """gigatoken loads such a tokenizer, and its ids are right for every string without the byte."""
    tokenizer = load(tmp_path, tokenizer_of(bpe(LETTERS | without(FALLBACK, "<0xF1>"), byte_fallback=True)))
    chosen, why = select_encoder(tokenizer, DOCUMENTS)
    assert (chosen.name, why) == ("tokenizers", "tokenizers: gigatoken works on bytes, and not every byte has a token")
    giga = GigaEncoder(tokenizer).try_encode(["ab \U00040000", "ab 漢"])  # control
    rows = [giga[0][start:stop].tolist() for start, stop in pairwise(giga[1])]
    assert rows[1] == tokenizer.encode("ab 漢")
    assert rows[0] != tokenizer.encode("ab \U00040000")
    complete = load(tmp_path, COMPLETE["byte fallback"])
    assert select_encoder(complete, DOCUMENTS)[0].name == "gigatoken"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_our_tokenizers_cover_every_text_and_change_none(tmp_path: Path, kind: Any) -> None:
    for texts in (["abc abc abd"], ["漢字"], []):
        coverage = train_tokenizer(texts, 270, tmp_path / "t.json", kind).coverage
        assert (coverage.is_complete, coverage.is_lossy, coverage.text_changes) == (True, False, ())
        assert coverage.describe() == "none: every byte of UTF-8 has a token"


@pytest.mark.parametrize("name", [*LOSSY, *UNKNOWING, *COMPLETE])
def test_an_old_file_without_a_model_type_has_the_same_coverage(tmp_path: Path, name: str) -> None:
    config = (LOSSY | UNKNOWING | COMPLETE)[name]
    expected = load(tmp_path, config).coverage
    inferred = load(
        tmp_path, config | {"model": {key: value for key, value in config["model"].items() if key != "type"}}
    ).coverage
    assert inferred == expected


def stage(kind: str, **settings: object) -> Config:
    return {"type": kind, **settings}


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({}, ()),
        (
            {"normalizer": stage("Sequence", normalizers=[stage("NFKC"), stage("Lowercase"), stage("StripAccents")])},
            ("NFKC", "Lowercase", "StripAccents"),
        ),
        ({"normalizer": stage("Strip", strip_left=True, strip_right=True)}, ("Strip white space (left and right)",)),
        ({"normalizer": stage("Prepend", prepend="▁")}, ("Prepend '▁'",)),
        ({"normalizer": stage("Replace", pattern={"Regex": r"\s+"}, content=" ")}, (r"Replace '\s+' by ' '",)),
        ({"normalizer": BERT}, ("BertNormalizer (clean_text, handle_chinese_chars, strip_accents, lowercase)",)),
        ({"normalizer": BERT | {"lowercase": False, "clean_text": False}}, ("BertNormalizer (handle_chinese_chars)",)),
        ({"pre_tokenizer": stage("WhitespaceSplit")}, ("WhitespaceSplit drops white space",)),
        ({"pre_tokenizer": stage("CharDelimiterSplit", delimiter="-")}, ("CharDelimiterSplit drops '-'",)),
        (
            {"pre_tokenizer": stage("Split", pattern={"String": "x"}, behavior="Removed", invert=False)},
            ("Split drops 'x'",),
        ),
        ({"pre_tokenizer": stage("Split", pattern={"String": "x"}, behavior="Isolated", invert=False)}, ()),
        ({"pre_tokenizer": stage("Punctuation", behavior="Removed")}, ("Punctuation drops punctuation",)),
        (
            {"pre_tokenizer": stage("Metaspace", replacement="▁", prepend_scheme="always", split=True)},
            ("Metaspace spells a space '▁' and puts one in front",),
        ),
        ({"pre_tokenizer": byte_level(SPLIT_PATTERN)}, ()),
        (
            {"pre_tokenizer": stage("ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True)},
            ("ByteLevel puts a space in front",),
        ),
        ({"normalizer": stage("ByteLevel")}, ()),
    ],
)
def test_changes_to_a_text_before_it_is_encoded_are_reported(
    tmp_path: Path, stages: Config, expected: tuple[str, ...]
) -> None:
    assert load(tmp_path, tokenizer_of(bpe(BYTES), **stages)).coverage.text_changes == expected


def test_an_added_token_that_strips_white_space_is_reported_unless_it_is_special(tmp_path: Path) -> None:
    config = tokenizer_of(bpe(BYTES), pre_tokenizer=byte_level(SPLIT_PATTERN))
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    config["added_tokens"] += [
        {"id": 257 + i, "content": name, "special": name == "<s>", **flags} for i, name in enumerate(["<s>", "<t>"])
    ]
    tokenizer = load(tmp_path, config)
    assert tokenizer.coverage.text_changes == ("added token '<t>' takes the white space beside it",)
    assert [tokenizer.encode(text).count(BYTES["Ġ"]) for text in ("a  <s>", "a  <t>")] == [2, 0]


def test_coverage_of_a_sentencepiece_model_has_its_changes_and_its_unknown_token(tmp_path: Path) -> None:
    model = io.BytesIO()
    lines = [f"step {i} of the loss" for i in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "m.model")
    coverage = tokenizer.coverage
    assert (coverage.unknown_token, coverage.unknown_id, coverage.missing_bytes) == ("<unk>", 0, None)
    assert coverage.text_changes[0] == "Precompiled (SentencePiece's table of characters)"
    assert coverage.text_changes[-2:] == ("Prepend '▁'", "Replace ' ' by '▁'")
    texts = ["step 漢", "loss", "漢 漢字"]
    assert UnknownTextCounter(tokenizer).count(texts, *ReferenceEncoder(tokenizer).encode(texts)).unknown.tolist() == [
        1,
        0,
        2,
    ]


def test_inspect_shows_unknown_characters_and_text_changes(tmp_path: Path) -> None:
    from rich.console import Console

    from pretrain.cli.data.description import print_description
    from pretrain.report.data_page import data_page

    prepared_with(tmp_path, UNKNOWING["wordlevel"])
    description = describe_data(tmp_path / "data")
    assert {entry.name: entry.value for entry in description.recipe["tokenizer"]} == {
        "fingerprint": description.tokenizer.fingerprint,
        "vocabulary": "3 ids",
        "unknown characters": "become [UNK]",
        "changes text": "Whitespace drops white space",
        "made": "there before",
    }
    out = io.StringIO()
    print_description(description, None, Console(file=out, width=120))
    sentence = "web: 7 of 15 tokens (46.67%) stand for text that the tokenizer does not know, in 4 documents"
    assert sentence in out.getvalue()
    assert re.search(r"kept, marked: has unknown tokens +4 +80\.00%", out.getvalue())
    page = data_page(description, None)
    assert sentence in page
    assert "marked: has unknown tokens" in page


def test_counts_are_imported_with_existing_tokens(tmp_path: Path) -> None:
    first = prepared_with(tmp_path, UNKNOWING["bpe"])
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


def test_the_setting_does_not_change_the_fingerprint_of_the_data(tmp_path: Path) -> None:
    first = prepared_with(tmp_path, COMPLETE["bytes"])
    again = prepared_with(tmp_path, COMPLETE["bytes"], allow_lossy_tokenizer=True)
    assert again.splits == first.splits
    assert any("prepared already" in note for note in again.notes)


def test_an_old_manifest_without_these_counts_loads(tmp_path: Path) -> None:
    file = prepared_with(tmp_path, UNKNOWING["bpe"]).path / "train" / MANIFEST
    old = json.loads(file.read_text())
    for source in old["sources"]:
        assert source.pop("unknown_tokens") > 0
        assert "lost_characters" not in source  # a count of 0 is not written
    assert "allow_lossy_tokenizer" not in old["recipe"]["settings"]
    file.write_text(json.dumps(old))
    (source,) = load_manifest(file.parent).sources
    assert (source.unknown_tokens, source.lost_characters, source.documents) == (0, 0, 5)


def test_a_bpe_with_dropout_gives_the_same_ids_every_time(tmp_path: Path) -> None:
    config = json.loads(train_tokenizer(["the loss of the model"] * 20, 290, tmp_path / "t.json").to_json())
    expected = load(tmp_path, config).encode("the loss of the model")
    config["model"]["dropout"] = 0.5
    random = load(tmp_path, config)
    assert [random.encode("the loss of the model") for _ in range(20)] == [expected] * 20


def test_bytes_that_never_occur_in_utf8_need_no_token() -> None:
    never = [0xC0, 0xC1, *range(0xF5, 0x100)]
    fallback = [f"<0x{byte:02X}>" for byte in never]
    assert analyze_coverage(byte_level_without(*never)).is_complete
    assert analyze_coverage(tokenizer_of(bpe(LETTERS | without(FALLBACK, *fallback), byte_fallback=True))).is_complete
    for byte in (0xC2, 0xF4):  # the nearest bytes that it needs
        assert analyze_coverage(byte_level_without(*never, byte)).missing_bytes == 1
        one_less = without(FALLBACK, *fallback, f"<0x{byte:02X}>")
        assert analyze_coverage(tokenizer_of(bpe(LETTERS | one_less, byte_fallback=True))).missing_bytes == 1
