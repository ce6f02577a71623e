import json
import random
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.text.sources import Document
from data_pipeline.tokenizing.tokenizer import (
    END_OF_TEXT,
    MAX_PIECE,
    Tokenizer,
    _train_bpe,
    _untrained_tokenizer,
    count_long_pieces,
    load_tokenizer,
    sample_texts,
    train_tokenizer,
)
from data_pipeline.tokenizing.tokenizer_formats import SPLIT_PATTERN, byte_level, make_tokenizer_config

TEXTS = [f"def step_{i}(loss, rate):\n    return loss * {i} - rate\n" for i in range(300)]


def document(name: str, text: str) -> Document:
    return Document(name, text, "web", {}, len(text.encode()), False, 0)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_tokenizer(TEXTS, 400, tmp_path / "tokenizer.json")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of each kind."""
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp(request.param) / "tokenizer.json", request.param)


WRITTEN_OUT = st.sampled_from([END_OF_TEXT, "<|", "|>", "endoftext", "<0x41>", "<unk>", " ", "\n"])
MIXED = st.lists(WRITTEN_OUT | st.text(), max_size=8).map("".join)


@settings(deadline=None)
@given(text=MIXED)
def test_any_text_decodes_to_itself_without_the_end_token(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eot_id not in ids


def test_unigram_is_the_same_at_every_training_whatever_the_order(tmp_path: Path) -> None:
    one = train_tokenizer(TEXTS, 300, tmp_path / "one.json", "unigram")
    two = train_tokenizer(random.Random(0).sample(TEXTS, len(TEXTS)), 300, tmp_path / "two.json", "unigram")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert one.fingerprint == two.fingerprint
    assert train_tokenizer(TEXTS[:150], 300, tmp_path / "three.json", "unigram").fingerprint != one.fingerprint
    model = json.loads(one.to_json())["model"]
    assert (model["type"], len(model["vocab"]), one.vocab_size, one.eot_id) == ("Unigram", 300, 300, 0)
    assert {name for name, _ in model["vocab"]} > set(
        json.loads(train_tokenizer([], 257, tmp_path / "b.json").to_json())["model"]["vocab"]
    )


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_of_only_bytes_can_be_trained(tmp_path: Path, kind: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 257, tmp_path / "bytes.json", kind)
    assert (tokenizer.vocab_size, len(tokenizer.encode("ü漢"))) == (257, 5)
    assert train_tokenizer(["ab"], 5000, tmp_path / "small.json", kind).vocab_size < 270


def test_unigram_names_the_package_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"tokenizer_kind=unigram: pip install 'pretrain\[tokenizers\]'"):
        train_tokenizer(TEXTS, 400, tmp_path / "tokenizer.json", "unigram")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["plain", "ünï¢ödé 漢字 🎉", "\x00\x01 tabs\t\r\n  mixed \n\n", " ", "1234567890", END_OF_TEXT]
)
def test_every_text_decodes_to_itself(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_spelled_out_end_token_is_encoded_as_text(tokenizer: Tokenizer) -> None:
    text = f"before {END_OF_TEXT} after"
    assert tokenizer.eot_id not in tokenizer.encode(text)
    tokenizer.backend.encode_special_tokens = False  # control: by default the library encodes it as the end token
    assert tokenizer.eot_id in tokenizer.encode(text)


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    one, two = (train_tokenizer(iter(TEXTS), 400, tmp_path / name / "tokenizer.json") for name in ("one", "two"))
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()
    assert one.fingerprint == two.fingerprint
    assert one.vocab_size == 400
    assert train_tokenizer(TEXTS[:150], 400, tmp_path / "three.json").fingerprint != one.fingerprint
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["tokenizer.json"]


RUNS = {
    "DNA": "".join(random.Random(0).choices("ACGT", k=5000)),
    "Chinese": "".join(chr(0x4E00 + random.Random(0).randrange(300)) for _ in range(1500)),
    "dashes": "-_" * 600,
    "white space": " \t" * 700,
}


@pytest.mark.parametrize("name", RUNS)
def test_the_trainer_gets_no_piece_longer_than_max_piece(name: str) -> None:
    text = f"some words {RUNS[name]} and more"
    pieces = [text[start:stop] for _, (start, stop) in _untrained_tokenizer().pre_tokenizer.pre_tokenize_str(text)]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == MAX_PIECE
    control = tokenizers.Tokenizer.from_str(
        json.dumps(
            make_tokenizer_config(
                {}, {"type": "BPE", "vocab": {}, "merges": []}, pre_tokenizer=byte_level(SPLIT_PATTERN)
            )
        )
    )
    assert max(stop - start for _, (start, stop) in control.pre_tokenizer.pre_tokenize_str(text)) >= len(RUNS[name])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_split_for_training_are_reported_and_encode_as_any_text(tmp_path: Path, kind: str) -> None:
    made = train_tokenizer([*TEXTS, *RUNS.values(), "x" * MAX_PIECE], 500, tmp_path / "t.json", kind)
    assert made.notes == (
        "split for training the tokenizer, and only there: 4 unbroken runs of more than 512 characters",
    )
    assert made.decode(made.encode(RUNS["DNA"])) == RUNS["DNA"]
    assert "FixedLength" not in made.to_json()
    model = json.loads(made.to_json())["model"]["vocab"]
    assert any(
        len(piece) > 3 and set(piece) <= set("ACGT")
        for piece in (model if kind == "bpe" else [piece for piece, _ in model])
    )
    assert train_tokenizer(TEXTS, 500, tmp_path / "u.json", kind).notes == ()


def test_splitting_long_pieces_does_not_change_the_tokenizer_of_ordinary_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*TEXTS, "=" * MAX_PIECE, " " * MAX_PIECE, "https://" + "a/b1" * 400]
    one = train_tokenizer(texts, 400, tmp_path / "one.json")
    assert one.notes == ()
    monkeypatch.setattr("data_pipeline.tokenizing.tokenizer.MAX_PIECE", None)
    uncut = _train_bpe(texts, 400)
    assert json.loads((tmp_path / "one.json").read_text())["model"] == uncut
    longer = [*texts, RUNS["DNA"]]  # control: with a long run the tokenizer differs
    monkeypatch.undo()
    split = _train_bpe(longer, 400)
    monkeypatch.setattr("data_pipeline.tokenizing.tokenizer.MAX_PIECE", None)
    assert _train_bpe(longer, 400) != split


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("a" * 512, 0),
        ("a" * 513, 1),
        ("a" * 513 + "1" + "b" * 600, 2),
        ("漢" * 513, 1),
        ("漢" * 200 + "。" + "漢" * 400, 0),
    ],
)
def test_long_pieces_are_counted(text: str, count: int) -> None:
    assert count_long_pieces(text) == count_long_pieces(f"x {text}\ny") == count


def test_a_file_and_its_folder_load_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert (
        load_tokenizer(tmp_path).fingerprint
        == load_tokenizer(tmp_path / "tokenizer.json").fingerprint
        == tokenizer.fingerprint
    )


def test_the_json_of_a_tokenizer_loads_as_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "again.json").write_text(tokenizer.to_json(), encoding="utf-8")
    again = load_tokenizer(tmp_path / "again.json")
    assert (again.fingerprint, again.to_json()) == (tokenizer.fingerprint, tokenizer.to_json())
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def edited(path: Path, **changes: object) -> Path:
    """Write a copy of the tokenizer in `path` with other top-level entries."""
    (path / "edited.json").write_text(json.dumps(json.loads((path / "tokenizer.json").read_text()) | changes))
    return path / "edited.json"


@pytest.mark.parametrize("name", ["<|end_of_text|>", "</s>", "<eos>"])
def test_the_end_token_of_other_families_is_found(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    raw = (tmp_path / "tokenizer.json").read_text(encoding="utf-8").replace(END_OF_TEXT, name)
    (tmp_path / "other.json").write_text(raw, encoding="utf-8")
    other = load_tokenizer(tmp_path / "other.json")
    assert (other.decode([other.eot_id]), other.eot_id) == (name, 0)


def test_truncation_and_padding_of_a_foreign_file_are_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    other = load_tokenizer(edited(tmp_path, truncation=truncation))
    assert other.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert len(other.encode(TEXTS[0])) > 5


def test_a_file_that_is_not_a_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no end-of-text token among its special tokens \(none\); it must be one of <\|endoftext\|>"
    ):
        load_tokenizer(edited(tmp_path, added_tokens=[]))
    for broken in (
        '{"model": 3}',
        "[]",
        "{",
        '{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}',
        "\xff",
    ):
        (tmp_path / "broken.json").write_text(broken, encoding="latin-1")
        with pytest.raises(DataError, match=r"broken\.json is not a tokenizer\.json"):
            load_tokenizer(tmp_path / "broken.json")
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_sample_is_uniform_in_any_order_and_fills_its_size() -> None:
    documents = [document(str(i), f"{i:04d}" * 25) for i in range(1000)]
    sample = sample_texts(documents, 20_000)
    assert len(sample) == 200
    assert sorted(sample) == sorted(sample_texts(documents[::-1], 20_000))
    quarters = [sum(1 for text in sample if int(text[:4]) // 250 == quarter) for quarter in range(4)]
    assert all(30 <= count <= 70 for count in quarters), quarters
    assert len(sample_texts(documents, 1e9)) == 1000


def test_a_document_longer_than_the_sample_is_truncated() -> None:
    assert sample_texts([document("long", "ü" * 1000)], 101) == ["ü" * 50]
