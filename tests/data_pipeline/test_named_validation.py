"""Held-out text: named in data.validation or selected by a fraction, and warnings if there is too little of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attempts import contents

from data_pipeline.errors import DataError
from data_pipeline.held_out import format_held_out_counts, held_out_warnings
from data_pipeline.inspect import describe_data
from data_pipeline.prepare import StageProgress, prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.manifest import MANIFEST, Recipe, SourceManifest, SplitManifest
from data_pipeline.storage.prepared import PreparedData, open_prepared
from data_pipeline.storage.shards import open_split
from data_pipeline.storage.verify import verify

SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "ri", "so", "tu")
SETTINGS: dict[str, Any] = {"vocab_size": 300, "tokenizer_sample_mb": 0.1, "shard_tokens": 4000, "workers": 1}
EXACT, NEAR = "exact_duplicate_of_held_out: exam", "near_duplicate_of_held_out: exam"


def random_texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join("".join(rng.choice(SYLLABLES, 3)) for _ in range(rng.integers(60, 120))) for _ in range(count)]


def write_source(folder: Path, name: str, texts: list[str]) -> SourceConfig:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(name=name, kind="jsonl", paths=(str(file),))


def documents(prepared: PreparedData, split: str) -> dict[str, list[str]]:
    """Return the decoded texts of each source of a split."""
    found = {}
    for shards in open_split(prepared.path / split).sources:
        spans = (shards.document_span(i) for i in range(shards.n_documents))
        found[shards.source.name] = [
            prepared.tokenizer.decode(shards.tokens(start, stop - 1).tolist()) for start, stop in spans
        ]
    return found


def near(text: str) -> str:
    """Return the text with another last word."""
    return " ".join((*text.split()[:-1], "other"))


@pytest.fixture
def web_and_exam(tmp_path: Path) -> tuple[SourceConfig, SourceConfig]:
    """A source of 40 texts, and an exam that five of them repeat.

    Two repeat it exactly, two except for case and spaces, one nearly. Two others repeat each other.
    """
    own, exam = random_texts(35, 0), random_texts(6, 1)
    repeats = [exam[0], exam[1], exam[2].upper(), exam[3].replace(" ", "\n  "), near(exam[4])]
    return write_source(tmp_path, "web", [*own[:20], *repeats, *own[20:], own[0]]), write_source(
        tmp_path, "exam", [*exam, exam[5]]
    )


def test_training_text_that_repeats_named_held_out_text_is_dropped_and_counted(
    tmp_path: Path, web_and_exam: tuple[SourceConfig, SourceConfig]
) -> None:
    web, exam = web_and_exam
    prepared = prepare(tmp_path / "data", PrepareConfig(sources=(web,), validation=(exam,), **SETTINGS))
    train, validation = prepared.splits["train"].sources, prepared.splits["validation"].sources
    assert [source.name for source in train] == ["web"]
    assert [source.name for source in validation] == ["exam"]
    assert (train[0].read, train[0].documents, train[0].dropped) == (41, 36, {EXACT: 4, NEAR: 1})
    assert (validation[0].read, validation[0].documents, validation[0].dropped) == (7, 7, {})
    own, held_out = documents(prepared, "train")["web"], documents(prepared, "validation")["exam"]
    assert sorted(held_out) == sorted([*random_texts(6, 1), random_texts(6, 1)[5]])
    # Duplicates within a side stay, because dedup is off.
    assert sorted(own) == sorted([*random_texts(35, 0), random_texts(35, 0)[0]])
    assert (
        "compared with 7 held-out documents of data.validation: 4 training documents dropped as exact duplicates, 1 as "
        "near-duplicates (half of those of Jaccard similarity 0.68 are found, and more of closer ones)"
    ) in prepared.notes
    assert verify(tmp_path / "data").problems == ()
    web_there = describe_data(tmp_path / "data").sources[0]
    assert web_there.drops == {"exact duplicate of held-out text": 4, "near duplicate of held-out text": 1}
    assert [(entry.kept_in, entry.exact, entry.near) for entry in web_there.duplicates] == [("exam", 4, 1)]


def test_repeated_text_is_kept_if_no_held_out_text_is_named(
    tmp_path: Path, web_and_exam: tuple[SourceConfig, SourceConfig]
) -> None:
    """Negative control."""
    prepared = prepare(tmp_path / "data", PrepareConfig(sources=web_and_exam[:1], validation_fraction=0, **SETTINGS))
    exam = random_texts(6, 1)
    assert {exam[0], exam[1], exam[2].upper(), near(exam[4])} <= set(documents(prepared, "train")["web"])


def test_deduplication_still_runs_within_each_side_and_the_held_out_reason_comes_first(
    tmp_path: Path, web_and_exam: tuple[SourceConfig, SourceConfig]
) -> None:
    web, exam = web_and_exam
    more = write_source(tmp_path, "more", [random_texts(6, 1)[0], random_texts(35, 0)[3], near(random_texts(35, 0)[4])])
    config = PrepareConfig(sources=(web, more), validation=(exam,), dedup={"exact": True, "minhash": True}, **SETTINGS)
    splits = prepare(tmp_path / "data", config).splits
    assert splits["train"].sources[0].dropped == {EXACT: 4, NEAR: 1, "exact_duplicate: web": 1}
    assert splits["train"].sources[1].dropped == {EXACT: 1, "exact_duplicate: web": 1, "near_duplicate: web": 1}
    assert splits["validation"].sources[0].dropped == {"exact_duplicate: exam": 1}


def test_a_fraction_is_held_out_beside_named_text_only_if_it_is_set(
    tmp_path: Path, web_and_exam: tuple[SourceConfig, SourceConfig]
) -> None:
    web, exam = web_and_exam
    assert PrepareConfig(sources=(web,)).validation_fraction == 0.005
    assert PrepareConfig(sources=(web,), validation=(exam,)).validation_fraction == 0
    with_fraction = prepare(
        tmp_path / "asked", PrepareConfig(sources=(web,), validation=(exam,), validation_fraction=0.2, **SETTINGS)
    )
    plain = prepare(tmp_path / "plain", PrepareConfig(sources=(web,), validation_fraction=0.2, **SETTINGS))
    assert [source.name for source in with_fraction.splits["validation"].sources] == ["web", "exam"]
    drawn, drawn_alone = documents(with_fraction, "validation")["web"], documents(plain, "validation")["web"]
    exam_texts = {"".join(text.lower().split()) for text in random_texts(6, 1)} | {
        "".join(near(random_texts(6, 1)[4]).split())
    }
    assert drawn
    assert sorted(drawn) == sorted(text for text in drawn_alone if "".join(text.lower().split()) not in exam_texts)


def test_filters_apply_to_held_out_text_and_what_they_drop_of_it_is_not_compared(
    tmp_path: Path, web_and_exam: tuple[SourceConfig, SourceConfig]
) -> None:
    web, exam = web_and_exam
    settings: dict[str, Any] = SETTINGS | {"filters": {"length": {"max_characters": 1}}}
    own = exam.model_copy(update={"filters": ("length",)})
    with pytest.raises(
        DataError,
        match=r"data\.validation holds no text to keep \(documents read: 7 length: too long\); name other text",
    ):
        prepare(tmp_path / "none", PrepareConfig(sources=(web,), validation=(own,), **settings))
    short = write_source(tmp_path, "short", ["x"])
    splits = prepare(tmp_path / "data", PrepareConfig(sources=(web,), validation=(own, short), **settings)).splits
    assert splits["train"].sources[0].dropped == {}
    assert [(source.name, source.documents, source.dropped) for source in splits["validation"].sources] == [
        ("exam", 0, {"length: too long": 7}),
        ("short", 1, {}),
    ]


def test_the_bytes_depend_neither_on_workers_nor_on_interruptions(
    tmp_path: Path, web_and_exam: tuple[SourceConfig, SourceConfig]
) -> None:
    def config(workers: int) -> PrepareConfig:
        return PrepareConfig(
            sources=web_and_exam[:1],
            validation=web_and_exam[1:],
            **(SETTINGS | {"workers": workers, "shard_tokens": 1000}),
        )

    prepare(tmp_path / "one", config(1))
    prepare(tmp_path / "two", config(2))
    seen: set[str] = set()
    for _ in range(8):  # once in each stage

        def stop(progress: StageProgress) -> None:
            if progress.stage not in seen:
                seen.add(progress.stage)
                raise KeyboardInterrupt

        try:
            prepare(tmp_path / "stopped", config(1), progress=stop)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "stopped" / "train").exists()
    assert len(seen) >= 4
    one = contents(tmp_path / "one")
    assert len([name for name in one if name.endswith(".bin")]) > 4
    assert contents(tmp_path / "two") == contents(tmp_path / "stopped") == one


def test_prepared_data_remembers_its_held_out_text(
    tmp_path: Path, web_and_exam: tuple[SourceConfig, SourceConfig]
) -> None:
    web, exam = web_and_exam
    settings = SETTINGS | {"validation_fraction": 0.1}
    prepare(tmp_path / "data", PrepareConfig(sources=(web,), validation=(exam,), **settings))
    assert (
        "is prepared already"
        in prepare(tmp_path / "data", PrepareConfig(sources=(web,), validation=(exam,), **settings)).notes[0]
    )
    with pytest.raises(DataError, match=r"data\.validation\.0\.name was exam and is None"):
        prepare(tmp_path / "data", PrepareConfig(sources=(web,), **settings))
    Path(exam.paths[0]).write_text('{"text": "another exam"}\n')
    with pytest.raises(DataError, match=r"what data\.validation\.0 holds was 1 files, \d+ bytes"):
        prepare(tmp_path / "data", PrepareConfig(sources=(web,), validation=(exam,), **settings))
    own = prepare(tmp_path / "plain", PrepareConfig(sources=(web,), **settings))
    text = (tmp_path / "plain" / "train" / MANIFEST).read_text()
    later = (
        '"validation": ',
        '"external": ',
        '"allow_lossy_tokenizer": ',
        '"unknown_tokens": ',
        '"lost_characters": ',
        '"passed_over": ',
    )
    assert [word for word in later if word in text] == []  # older versions wrote the same
    assert open_prepared(tmp_path / "plain").splits["train"].recipe.settings.validation == ()
    assert (
        own.splits["train"].fingerprint()
        == SplitManifest.model_validate_json((tmp_path / "plain/train" / MANIFEST).read_bytes()).fingerprint()
    )


def test_a_source_name_must_be_unique(tmp_path: Path, web_and_exam: tuple[SourceConfig, SourceConfig]) -> None:
    twice = web_and_exam[1].model_copy(update={"name": "web"})
    with pytest.raises(
        DataError, match=r"data\.validation\.0 and data\.sources\.0 are both called web; give each a `name`"
    ):
        prepare(tmp_path / "data", PrepareConfig(sources=web_and_exam[:1], validation=(twice,), **SETTINGS))
    nowhere = SourceConfig(name="nowhere", kind="text")
    with pytest.raises(DataError, match=r"data\.validation: nowhere of kind text has no paths"):
        prepare(tmp_path / "data", PrepareConfig(sources=web_and_exam[:1], validation=(nowhere,), **SETTINGS))


def test_errors_of_held_out_sources_name_their_setting(
    tmp_path: Path, web_and_exam: tuple[SourceConfig, SourceConfig]
) -> None:
    web, exam = web_and_exam

    def failure(**settings: Any) -> str:
        with pytest.raises(DataError) as error:
            prepare(
                tmp_path / "data", PrepareConfig(**({"sources": (web,), "validation": (exam,)} | SETTINGS | settings))
            )
        return str(error.value)

    gone = str(tmp_path / "gone")
    for kind in ("text", "jsonl", "olmo"):
        source = SourceConfig.model_validate({"name": "gone", "kind": kind, "paths": [gone]})
        assert failure(validation=(source,)) == f"data.validation: {gone} does not exist; correct `paths`"
        assert failure(sources=(source,)) == f"data.sources: {gone} does not exist; correct `paths`"
    source = SourceConfig(name="gone", kind="hf", paths=(gone,))
    assert failure(validation=(source,)).startswith(f"data.validation: cannot open dataset {gone} ")
    assert failure(sources=(source,)).startswith(f"data.sources: cannot open dataset {gone} ")


def test_tokenized_sources_can_be_held_out_in_place(
    tmp_path: Path, web_and_exam: tuple[SourceConfig, SourceConfig]
) -> None:
    web, exam = web_and_exam
    existing = prepare(tmp_path / "there", PrepareConfig(sources=(exam,), validation_fraction=0.5, **SETTINGS))
    assert existing.splits["validation"].documents
    for kind, paths, n_documents in (
        ("prepared", (str(existing.path),), 7),
        ("megatron", tuple(map(str, (existing.path / "train").glob("*.bin"))), existing.splits["train"].documents),
    ):
        tokens = SourceConfig(name="exam", kind=kind, paths=paths)
        config = PrepareConfig(
            sources=(web,), validation=(tokens,), tokenizer=existing.path / "tokenizer.json", **SETTINGS
        )
        prepared = prepare(tmp_path / kind, config)
        assert [(source.name, source.documents) for source in prepared.splits["validation"].sources] == [
            ("exam", n_documents)
        ]
        assert [(source.name, source.documents) for source in prepared.splits["train"].sources] == [("web", 41)]
        assert "not compared: exam holds tokens, not text" in prepared.notes
        assert verify(tmp_path / kind).problems == ()


# Text that is drawn, and how much is enough


def test_every_source_of_several_documents_holds_out_at_least_one(
    tmp_path: Path, make_corpus: Callable[..., Path], prepare_at: Callable[..., PreparedData]
) -> None:
    folders = [
        make_corpus(tmp_path / name, count, seed)
        for seed, (name, count) in enumerate((("many", 30), ("few", 3), ("one", 1)))
    ]
    sources = [SourceConfig(kind="text", paths=(str(folder),)) for folder in folders]
    prepared = prepare_at(tmp_path / "data", tmp_path, sources=sources, validation_fraction=1e-9)
    assert [(source.name, source.documents) for source in prepared.splits["validation"].sources] == [
        ("many", 1),
        ("few", 1),
        ("one", 0),
    ]
    alone = prepare_at(
        tmp_path / "alone", tmp_path, sources=sources[:1], validation_fraction=1e-9, tokenizer=prepared.path
    )
    assert documents(alone, "validation")["many"] == documents(prepared, "validation")["many"]
    assert verify(prepared.path).problems == ()


def splits_of(
    held_out: dict[str, tuple[int, int]], training: dict[str, tuple[int, int]], **settings: Any
) -> dict[str, SplitManifest]:
    """Make manifests, given (documents, tokens) by source."""
    recipe = Recipe(settings=PrepareConfig(**settings), trained_tokenizer=False, listings=(), lists="", made_with={})

    def manifest(split: str, counts: dict[str, tuple[int, int]]) -> SplitManifest:
        sources = tuple(
            SourceManifest(
                name=name, documents=documents, tokens=tokens, text_bytes=0, dtype="uint16", ends_with_eot=True,
                dropped={}, repaired={}, marked={}, shards=(),
            )
            for name, (documents, tokens) in counts.items()
        )  # fmt: skip
        return SplitManifest(
            split=split, splits=(), vocab_size=300, eot_id=0, tokenizer="", recipe=recipe, sources=sources
        )

    return {"train": manifest("train", training)} | (
        {"validation": manifest("validation", held_out)} if held_out else {}
    )


def test_warnings_about_too_little_held_out_text_have_numbers_and_a_remedy() -> None:
    held_out = {"web": (40, 8 * 2048), "code": (1, 312), "book": (1, 90_000), "note": (0, 0)}
    training = {"web": (4000, 1_600_000), "code": (199, 700_000), "book": (2, 150_000), "note": (1, 300)}
    splits = splits_of(held_out, training)
    assert (
        format_held_out_counts(splits, 2048) == "held out, in sequences of 2,048 tokens: web 8, code 1, book 44, note 0"
    )
    assert held_out_warnings(splits, 2048) == [
        "code: only 1 document with 312 tokens is held out (1 sequence of data.seq_len=2048): its validation loss says "
        "little; prepare it with data.validation_fraction=0.047, or name held-out text in data.validation",
        "book: only 1 document with 90,000 tokens is held out (44 sequences of data.seq_len=2048): its validation loss "
        "says little; it is small (3 documents, 240,000 tokens): add text, or name held-out text in data.validation",
        "note: no document is held out: there is no validation loss of it; "
        "it is small (1 document, 300 tokens): add text, or name held-out text in data.validation",
    ]
    assert len(held_out_warnings(splits, 2340)) == 3  # more than 7 sequences of web: 8, of which the last is padded
    assert len(held_out_warnings(splits, 2341)) == 4
    assert len(held_out_warnings(splits, 32)) == 3


def test_no_warning_if_nothing_is_to_be_held_out_unless_text_is_named() -> None:
    training = {"web": (4000, 1_600_000)}
    assert held_out_warnings(splits_of({}, training, validation_fraction=0), 2048) == []
    assert len(held_out_warnings(splits_of({}, training), 2048)) == 1  # negative control: the default fraction of 0.005
    sources = ({"name": "web", "kind": "text", "paths": ("a",)},)
    named = splits_of(
        {"exam": (3, 900)}, training, sources=sources, validation=({"name": "exam", "kind": "text", "paths": ("b",)},)
    )
    assert held_out_warnings(named, 2048) == [
        "exam: only 3 documents with 900 tokens are held out (1 sequence of data.seq_len=2048): its validation loss "
        "says little; name more text in data.validation.0"
    ]
    prepared = splits_of({}, training, sources=({"name": "web", "kind": "prepared", "paths": ("a",)},))
    assert held_out_warnings(prepared, 2048)[0].endswith(
        "prepare that data with a larger data.validation_fraction, or name held-out text in data.validation"
    )
