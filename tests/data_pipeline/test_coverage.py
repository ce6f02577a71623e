"""Text that a tokenizer cannot represent is counted and reported, or refused: nothing vanishes silently."""

import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizer_configs import (
    BERT,
    BYTES,
    COMPLETE,
    DOCUMENTS,
    FALLBACK,
    LETTERS,
    LOSSY,
    WITH_UNKNOWN_TOKEN,
    Config,
    bpe,
    byte_level_without,
    load,
    prepared_with,
    tokenizer_of,
    without,
)

from data_pipeline.errors import DataError
from data_pipeline.inspect import describe_data
from data_pipeline.tokenizing.coverage import analyze_coverage
from data_pipeline.tokenizing.encoder import GigaEncoder, ReferenceEncoder, select_encoder
from data_pipeline.tokenizing.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from data_pipeline.tokenizing.tokenizer_formats import SPLIT_PATTERN, byte_level
from data_pipeline.tokenizing.unknown_text import UnknownTextCounter


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


@pytest.mark.parametrize("name", [*LOSSY, *WITH_UNKNOWN_TOKEN, *COMPLETE])
def test_an_old_file_without_a_model_type_has_the_same_coverage(tmp_path: Path, name: str) -> None:
    config = (LOSSY | WITH_UNKNOWN_TOKEN | COMPLETE)[name]
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

    prepared_with(tmp_path, WITH_UNKNOWN_TOKEN["wordlevel"])
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


def test_the_setting_does_not_change_the_fingerprint_of_the_data(tmp_path: Path) -> None:
    first = prepared_with(tmp_path, COMPLETE["bytes"])
    again = prepared_with(tmp_path, COMPLETE["bytes"], allow_lossy_tokenizer=True)
    assert again.splits == first.splits
    assert any("prepared already" in note for note in again.notes)


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
