"""Results of `describe_data` compared with the text that was prepared."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

import data_pipeline.inspect
from data_pipeline.errors import DataError
from data_pipeline.inspect import (
    PACKED_TOKENS,
    DataDescription,
    DecodedText,
    SourceDescription,
    bytes_per_token,
    describe_data,
)
from data_pipeline.prepare import prepare
from data_pipeline.settings import (
    DecontaminateConfig,
    DedupConfig,
    FilterConfig,
    PrepareConfig,
    SourceConfig,
)
from data_pipeline.settings_filters import LengthFilter
from data_pipeline.storage.prepared import PreparedData
from data_pipeline.storage.shards import ShardFile, open_split

WORDS = [
    "shard",
    "token",
    "model",
    "while",
    "return",
    "loss",
    "data",
    "rank",
    "step",
    "mesh",
    "batch",
    "the",
    "of",
    "a",
]
END = "<|endoftext|>"
LITERAL = f"a text that spells {END} and goes on\n"
HOSTILE = "colours \x1b[31m, a bell \x07 and \x9b8m\n"


def jsonl(file: Path, texts: list[str]) -> SourceConfig:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(kind="jsonl", paths=(str(file),))


def texts_of(seed: int, count: int) -> list[str]:
    random = Random(seed)
    return [" ".join(random.choices(WORDS, k=random.randint(30, 300))) + f" {seed} {i}\n" for i in range(count)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Two sources. `web` has 90 good documents, 3 empty ones, 4 short ones, and one of an evaluation set.

    `code` repeats 7 documents of `web`, 5 of them exactly.
    """
    folder = tmp_path_factory.mktemp("inspect")
    web, code = texts_of(1, 90), texts_of(2, 40)
    near = [web[10].replace("1 10\n", "and one more\n"), web[11].replace("1 11\n", "and one more\n")]
    (folder / "evaluation.txt").write_text(code[7])
    settings = PrepareConfig(
        sources=(
            jsonl(folder / "web.jsonl", [*web, "", " ", "\n"]),
            jsonl(folder / "code.jsonl", [*code, *web[:5], *near, *["short"] * 4]),
        ),
        filters=FilterConfig(apply=("length",), length=LengthFilter(min_characters=20)),
        dedup=DedupConfig(exact=True, minhash=True),
        decontaminate=DecontaminateConfig(paths=(str(folder / "evaluation.txt"),), action="mark"),
        vocab_size=300,
        tokenizer_sample_mb=1,
        validation_fraction=0.1,
        shard_tokens=4000,
        workers=1,
    )
    return prepare(folder / "data", settings)


@pytest.fixture(scope="module")
def description(prepared: PreparedData) -> DataDescription:
    return describe_data(prepared.path, samples=4)


def source(description: DataDescription, name: str) -> SourceDescription:
    return next(source for source in description.sources if source.name == name)


def plain(pieces: DecodedText) -> str:
    """Return the text as the tokenizer would decode it."""
    return "".join(END if piece is None else piece for piece in pieces)


def test_every_document_read_is_written_or_dropped_over_all_splits(
    prepared: PreparedData, description: DataDescription
) -> None:
    web, code = source(description, "web"), source(description, "code")
    assert list(description.splits) == ["train", "validation"] == list(web.splits)
    assert (web.read, web.documents, sum(web.drops.values())) == (93, 90, 3)
    assert (code.read, code.documents, sum(code.drops.values())) == (51, 40, 11)
    assert description.documents == 130
    assert (
        description.tokens == web.tokens + code.tokens == sum(manifest.tokens for manifest in prepared.splits.values())
    )


def test_drops_are_sorted_by_frequency(description: DataDescription) -> None:
    assert source(description, "web").drops == {"empty": 3}
    assert list(source(description, "code").drops.items()) == [
        ("exact duplicate", 5),
        ("length: too short", 4),
        ("near duplicate", 2),
    ]
    assert list(source(description, "code").changes.values()) == [1]
    assert next(iter(source(description, "code").changes)).startswith("marked: ")
    assert source(description, "web").changes == {}


def test_duplicates_name_both_sources(description: DataDescription) -> None:
    (found,) = source(description, "code").duplicates
    assert (found.source, found.kept_in, found.exact, found.near) == ("code", "web", 5, 2)
    assert source(description, "web").duplicates == ()


def test_lengths_are_those_of_all_documents(prepared: PreparedData, description: DataDescription) -> None:
    for number, found in enumerate(description.sources):
        lengths = np.concatenate(
            [
                part
                for split in prepared.splits
                for part in open_split(prepared.path / split).sources[number].document_lengths()
            ]
        )
        for entry in found.lengths:
            here = lengths[(lengths >= entry.low) & (lengths < 2 * entry.low)]
            assert (entry.documents, entry.tokens) == (len(here), here.sum())
        assert sum(entry.documents for entry in found.lengths) == len(lengths) == found.documents
        assert found.lengths[0].documents > 0
        assert found.lengths[-1].documents > 0


def test_no_more_than_one_index_is_open_at_a_time(prepared: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[ShardFile] = weakref.WeakSet()
    others: list[int] = []

    class Counted(ShardFile):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            others.append(len(alive))
            alive.add(self)

    monkeypatch.setattr(data_pipeline.inspect, "ShardFile", Counted)
    describe_data(prepared.path, samples=0)
    assert len(others) == sum(len(s.shards) for manifest in prepared.splits.values() for s in manifest.sources) > 4
    assert set(others) == {0}


def test_samples_are_whole_documents_with_their_positions(prepared: PreparedData, description: DataDescription) -> None:
    for number, found in enumerate(description.sources):
        shards = open_split(prepared.path / "train").sources[number]
        assert [sample.number for sample in found.samples] == [i * shards.n_documents // 4 for i in range(4)]
        for sample in found.samples:
            assert (sample.start, sample.stop) == shards.document_span(sample.number)
            text = prepared.tokenizer.decode(shards.tokens(sample.start, sample.stop).tolist())
            assert text.startswith(plain(sample.head))
            assert text.endswith(plain(sample.tail or sample.head))
            assert (sample.tail or sample.head)[-1] is None
            assert (sample.tail + sample.head).count(None) == 1


def test_a_packed_sequence_shows_where_documents_meet(prepared: PreparedData, description: DataDescription) -> None:
    for number, found in enumerate(description.sources):
        packed, shards = found.packed, open_split(prepared.path / "train").sources[number]
        assert packed is not None
        assert len(packed.pieces) > 1
        assert sum(piece.count for piece in packed.pieces) + packed.padding == PACKED_TOKENS
        at = packed.start
        for piece in packed.pieces:
            start, stop = shards.document_span(piece.number)
            assert (start + piece.first, piece.length) == (at, stop - start)
            assert plain(piece.text) == prepared.tokenizer.decode(shards.tokens(at, at + piece.count).tolist())
            assert (piece.text[-1] is None) == (piece.first + piece.count == piece.length)
            at += piece.count
        assert packed.pieces[0].first > 0


def few(tmp_path: Path, texts: list[str]) -> PreparedData:
    source = jsonl(tmp_path / "few.jsonl", texts)
    return prepare(tmp_path / "few", PrepareConfig(sources=(source,), vocab_size=300, workers=1, validation_fraction=0))


def test_text_that_looks_like_end_of_text_or_a_control_character_is_shown_as_text(tmp_path: Path) -> None:
    prepared = few(tmp_path, [LITERAL, HOSTILE])
    description = describe_data(prepared.path)
    heads = {sample.head for sample in description.sources[0].samples}
    assert description.end_of_text == END
    assert heads == {(LITERAL, None), ("colours ␛[31m, a bell ␇ and \ufffd8m\n", None)}


def test_a_short_stream_is_padded_in_the_packed_sequence(tmp_path: Path) -> None:
    packed = describe_data(few(tmp_path, ["one\n", "two\n"]).path).sources[0].packed
    assert packed is not None
    assert (packed.start, len(packed.pieces)) == (0, 2)
    assert packed.padding == PACKED_TOKENS - sum(piece.count for piece in packed.pieces) > 0


def test_no_samples_are_read_if_none_are_requested(prepared: PreparedData) -> None:
    for found in describe_data(prepared.path, samples=0).sources:
        assert (found.samples, found.packed) == ((), None)
        assert found.lengths


def test_a_damaged_index_is_reported(tmp_path: Path) -> None:
    path = few(tmp_path, texts_of(3, 5)).path
    (index,) = (path / "train").glob("*.idx")
    raw = bytearray(index.read_bytes())
    raw[40] ^= 1
    index.write_bytes(raw)
    with pytest.raises(DataError, match=rf"{index.name} is damaged: it does not match its checksum"):
        describe_data(path, samples=0)


def test_the_recipe_lists_the_settings_and_marks_what_differs_from_the_defaults(description: DataDescription) -> None:
    recipe = {
        section: {entry.name: (entry.value, entry.changed) for entry in lines}
        for section, lines in description.recipe.items()
    }
    assert list(recipe) == [
        "sources",
        "filters",
        "filters.length",
        "dedup",
        "decontaminate",
        "tokenizer",
        "shards",
        "made with",
    ]
    assert recipe["filters.length"] == {"min_characters": ("20", True), "max_characters": ("none", False)}
    assert recipe["dedup"]["minhash"] == ("yes", True)
    assert recipe["dedup"]["bands"] == ("14", False)
    assert recipe["dedup"]["found"][0].startswith("half of the pairs of Jaccard similarity 0.68,")
    assert recipe["decontaminate"]["action"] == ("mark", True)
    assert recipe["tokenizer"]["vocab_size"] == ("300", True)
    assert recipe["sources"]["web"][0].startswith("jsonl ")
    assert recipe["sources"]["web"][0].endswith(")")


def test_thresholds_of_unused_filters_are_left_out(tmp_path: Path) -> None:
    recipe = describe_data(few(tmp_path, texts_of(3, 5)).path).recipe
    assert [section for section in recipe if section.startswith("filters")] == ["filters"]
    assert recipe["filters"][0].value == "none"
    assert [entry.name for entry in recipe["dedup"]] == ["exact", "minhash"]


def test_tokens_read_in_place_are_shown_with_their_folder(prepared: PreparedData, tmp_path: Path) -> None:
    imported = SourceConfig(kind="prepared", paths=(str(prepared.path),), name="theirs")
    own = jsonl(tmp_path / "own.jsonl", texts_of(4, 30))
    settings = PrepareConfig(
        sources=(imported, own), tokenizer=prepared.path / "tokenizer.json", validation_fraction=0.1, workers=1
    )
    description = describe_data(prepare(tmp_path / "both", settings).path)
    theirs = source(description, "theirs")
    shards = sum(len(s.shards) for manifest in prepared.splits.values() for s in manifest.sources)
    assert theirs.in_place == (shards, str(prepared.path))
    assert source(description, "own").in_place is None
    assert theirs.drops["exact duplicate"] == 5
    assert theirs.duplicates[0].kept_in == "web"


def test_bytes_per_token_counts_sources_with_known_text(
    prepared: PreparedData, write_split: Callable[..., object]
) -> None:
    web, code = prepared.splits["train"].sources
    assert web.text_bytes
    assert code.text_bytes
    assert bytes_per_token([web, code]) == (web.text_bytes + code.text_bytes) / (web.tokens + code.tokens)
    unknown = code.model_copy(update={"text_bytes": None})
    assert bytes_per_token([web, unknown]) == web.text_bytes / web.tokens
    assert bytes_per_token([unknown]) is None
