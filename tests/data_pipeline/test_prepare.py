"""Preparation: texts are kept exactly, results are reproducible, and existing data is reused or refused."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from data_pipeline.corpus import find_corpus
from data_pipeline.errors import DataError
from data_pipeline.inspect import describe_data
from data_pipeline.prepare import StageProgress, build_tokenizer
from data_pipeline.settings import DedupConfig, PrepareConfig, SourceConfig
from data_pipeline.storage.manifest import MANIFEST, SplitManifest, load_manifest
from data_pipeline.storage.prepared import PreparedData, open_prepared
from data_pipeline.storage.shards import ShardSet, open_split
from data_pipeline.storage.verify import verify
from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer

Prepare = Callable[..., PreparedData]
MakeCorpus = Callable[..., Path]


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def texts_of(shards: ShardSet, tokenizer: Tokenizer) -> list[str]:
    spans = [shards.document_span(i) for i in range(shards.n_documents)]
    assert all(int(shards.tokens(stop - 1, stop)[0]) == tokenizer.eot_id for _, stop in spans)
    return [tokenizer.decode(shards.tokens(start, stop - 1).tolist()) for start, stop in spans]


def documents_of(path: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(path)
    return [text for shards in open_split(path / split).sources for text in texts_of(shards, tokenizer)]


def corpus_texts(corpus: Path) -> list[str]:
    return [file.read_text() for file in sorted(corpus.rglob("*.txt"))]


def dropped(manifest: SplitManifest) -> dict[str, int]:
    assert len(manifest.sources) == 1
    return manifest.sources[0].dropped


def was_prepared(prepared: PreparedData) -> bool:
    return any("is prepared already" in note for note in prepared.notes)


def test_every_document_is_in_one_split_word_for_word(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    (corpus / "literal.txt").write_text("the literal <|endoftext|> is text\n")
    prepared = prepare_at(tmp_path / "data", corpus)
    train, validation = documents_of(tmp_path / "data", "train"), documents_of(tmp_path / "data", "validation")
    assert sorted(train + validation) == sorted(corpus_texts(corpus))
    assert 1 <= len(validation) <= 15
    source = prepared.splits["train"].sources[0]
    assert source.text_bytes == sum(len(text.encode()) for text in train)
    assert len(source.shards) > 1
    assert verify(tmp_path / "data").problems == ()


def test_documents_are_shuffled_inside_a_chunk_and_nowhere_else(
    tmp_path: Path, corpus: Path, prepare_at: Prepare
) -> None:
    in_order = corpus_texts(corpus)
    prepare_at(tmp_path / "one", corpus, validation_fraction=0.0, shard_tokens=10**6)
    at_once = documents_of(tmp_path / "one", "train")
    assert sorted(at_once) == sorted(in_order)
    n_unmoved = sum(text == other for text, other in zip(in_order, at_once, strict=True))
    assert n_unmoved <= 6  # of 60; one is expected
    prepared = prepare_at(tmp_path / "many", corpus, validation_fraction=0.0)
    names = [shard.name for shard in prepared.splits["train"].sources[0].shards]
    in_chunks = documents_of(tmp_path / "many", "train")
    assert in_chunks != in_order
    done, start = [], 0
    for name, shard in zip(names, prepared.splits["train"].sources[0].shards, strict=True):
        done.append((name, sorted(in_chunks[start : start + shard.documents])))
        start += shard.documents
    chunks = find_corpus(prepared.splits["train"].recipe.settings).chunks
    assert len(chunks) > 5
    expected = {chunk.name: sorted(Path(part.file.path).read_text() for part in chunk.slices) for chunk in chunks}
    found: dict[str, list[str]] = {}
    for name, texts in done:  # a chunk that does not fit into one shard continues in `<chunk>-1`
        found.setdefault(name[: len(chunks[0].name)], []).extend(texts)
    assert {name: sorted(texts) for name, texts in found.items()} == expected


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    for name in ("one", "two"):
        prepare_at(tmp_path / name, corpus)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {"tokenizer.json", "train/manifest.json", "validation/manifest.json"} < set(contents(tmp_path / "one"))


def test_whether_a_document_is_held_out_depends_on_its_id_alone(
    tmp_path: Path, corpus: Path, prepare_at: Prepare
) -> None:
    prepare_at(tmp_path / "one", corpus)
    held_out = sorted(documents_of(tmp_path / "one", "validation"))
    for file in sorted(corpus.rglob("*.txt"))[:20]:
        if file.read_text() not in held_out:
            file.unlink()
    prepare_at(tmp_path / "two", corpus)
    assert sorted(documents_of(tmp_path / "two", "validation")) == held_out


def test_empty_and_repaired_documents_are_counted(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    (corpus / "empty.txt").write_text("")
    (corpus / "blank.txt").write_text(" \n\t\n")
    (corpus / "latin.txt").write_bytes("café".encode("latin-1"))
    splits = prepare_at(tmp_path / "data", corpus, validation_fraction=0.0).splits
    assert list(splits) == ["train"]
    source = splits["train"].sources[0]
    assert (source.documents, source.dropped, source.repaired) == (61, {"empty": 2}, {"invalid Unicode": 1})


def test_preparing_again_changes_nothing(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    first = prepare_at(tmp_path / "data", corpus)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*")}
    again = prepare_at(tmp_path / "data", corpus)
    assert (was_prepared(first), was_prepared(again)) == (False, True)
    assert again.splits == first.splits
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*")} == times


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 310}, r"data\.vocab_size was 300 and is 310"),
        ({"validation_fraction": 0.2}, r"data\.validation_fraction was 0\.1 and is 0\.2"),
        (
            {"shard_tokens": 10, "tokenizer_sample_mb": 2.0},
            r"data\.tokenizer_sample_mb was 1\.0 and is 2\.0; data\.shard_tokens was 1000 and is 10\.",
        ),
        (
            {"sources": "exclude"},
            r"data\.sources\.0\.exclude was \[\] and is \['a'\]; what data\.sources\.0 holds was 60 files",
        ),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    tmp_path: Path, corpus: Path, prepare_at: Prepare, changes: dict[str, Any], message: str
) -> None:
    prepare_at(tmp_path / "data", corpus)
    before = contents(tmp_path / "data")
    if "sources" in changes:
        changes = {"sources": [SourceConfig(kind="text", paths=(str(corpus),), exclude=("a",))]}
    with pytest.raises(DataError, match=message + r".*Set another data\.path, or delete"):
        prepare_at(tmp_path / "data", corpus, **changes)
    assert contents(tmp_path / "data") == before


def test_a_file_that_grew_is_detected(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    prepare_at(tmp_path / "data", corpus)
    (corpus / "a" / "001.txt").write_text("longer " * 500)
    with pytest.raises(DataError, match=r"what data\.sources\.0 holds was 60 files, \d+ bytes"):
        prepare_at(tmp_path / "data", corpus)


def test_an_existing_tokenizer_is_used(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    config = PrepareConfig(
        sources=(SourceConfig(kind="text", paths=(str(corpus),)),), vocab_size=280, tokenizer_sample_mb=1.0
    )
    made = build_tokenizer(tmp_path / "tok" / "tokenizer.json", config)
    assert [file.name for file in (tmp_path / "tok").iterdir()] == ["tokenizer.json"]
    prepared = prepare_at(tmp_path / "given", corpus, tokenizer=tmp_path / "tok")
    assert prepared.tokenizer.fingerprint == made.fingerprint == load_tokenizer(tmp_path / "given").fingerprint
    assert was_prepared(prepare_at(tmp_path / "given", corpus, tokenizer=tmp_path / "tok" / "tokenizer.json"))
    shutil.copytree(tmp_path / "tok", tmp_path / "own")
    assert prepare_at(tmp_path / "own", corpus).tokenizer.fingerprint == made.fingerprint
    prepare_at(tmp_path / "trained", corpus)
    with pytest.raises(DataError, match=rf"data\.tokenizer was \w+ and is {made.fingerprint}"):
        prepare_at(tmp_path / "trained", corpus, tokenizer=tmp_path / "tok")
    with pytest.raises(DataError, match="is there already"):
        build_tokenizer(tmp_path / "tok" / "tokenizer.json", config)


def test_a_tiny_corpus_still_holds_one_document_out(
    tmp_path: Path, prepare_at: Prepare, make_corpus: MakeCorpus
) -> None:
    folder = make_corpus(tmp_path / "corpus", documents=3)
    splits = prepare_at(tmp_path / "data", folder, validation_fraction=0.001).splits
    assert (splits["train"].documents, splits["validation"].documents) == (2, 1)
    with pytest.raises(DataError, match=r"a single document.*data\.validation_fraction=0"):
        prepare_at(tmp_path / "one", make_corpus(tmp_path / "single", documents=1))
    assert prepare_at(tmp_path / "one", tmp_path / "single", validation_fraction=0.0).splits["train"].documents == 1


@pytest.mark.parametrize("exact", [True, False])
def test_duplicates_are_never_on_both_sides_of_the_split(
    tmp_path: Path, corpus: Path, prepare_at: Prepare, exact: bool
) -> None:
    for file in sorted(corpus.rglob("*.txt")):
        for copy in range(3):
            (file.parent / f"copy-{copy}-{file.name}").write_text(
                file.read_text().upper() if copy else file.read_text()
            )
    prepare_at(tmp_path / "data", corpus, dedup={"exact": exact}, validation_fraction=0.3)
    train, held_out = (
        {text.lower() for text in documents_of(tmp_path / "data", split)} for split in ("train", "validation")
    )
    assert len(train | held_out) == 60
    assert bool(train & held_out) is not exact


def corrupt_parquet(folder: Path) -> SourceConfig:
    pq.write_table(pa.table({"text": ["some text"] * 100}), folder / "bad.parquet")
    (folder / "bad.parquet").write_bytes((folder / "bad.parquet").read_bytes()[:-20])
    return SourceConfig(kind="parquet", paths=(str(folder),))


def empty_files(folder: Path) -> SourceConfig:
    (folder / "x.txt").write_text("")
    return SourceConfig(kind="text", paths=(str(folder),))


def late_breakage(folder: Path) -> SourceConfig:
    lines = [json.dumps({"text": f"line {i}"}) for i in range(100)]
    (folder / "x.jsonl").write_text("\n".join([*lines, "{broken"]))
    return SourceConfig(kind="jsonl", paths=(str(folder),))


@pytest.mark.parametrize("with_tokenizer", [False, True])
@pytest.mark.parametrize(
    ("source", "message"),
    [(empty_files, "hold no text"), (corrupt_parquet, r"bad\.parquet"), (late_breakage, r"x\.jsonl:101: broken JSON")],
)
def test_bad_input_leaves_no_files(
    tmp_path: Path,
    prepare_at: Prepare,
    make_corpus: MakeCorpus,
    source: Callable[[Path], SourceConfig],
    message: str,
    with_tokenizer: bool,
) -> None:
    (tmp_path / "bad").mkdir()
    settings = {}
    if with_tokenizer:
        settings["tokenizer"] = prepare_at(tmp_path / "good", make_corpus(tmp_path / "corpus")).path
    with pytest.raises(DataError, match=message):
        prepare_at(tmp_path / "data", tmp_path, sources=[source(tmp_path / "bad")], **settings)
    assert not (tmp_path / "data").exists()


def test_a_second_preparation_of_the_same_path_is_refused(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / ".prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being prepared by another process"):
            prepare_at(tmp_path / "data", corpus)
    assert not was_prepared(prepare_at(tmp_path / "data", corpus))


def test_data_that_another_process_committed_before_our_lock_is_kept(
    tmp_path: Path, corpus: Path, prepare_at: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, flock = tmp_path / "data", fcntl.flock

    def prepare_elsewhere_first(lock: int, how: int) -> None:
        # Another process prepares the data after we looked for a manifest, and before we have the lock.
        monkeypatch.setattr(fcntl, "flock", flock)
        lock_file = data / ".prepare.lock"
        kept = lock_file.rename(data / "ours")
        prepare_at(data, corpus)
        kept.rename(lock_file)
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", prepare_elsewhere_first)
    with pytest.raises(DataError, match="was prepared by another process meanwhile; run the command again"):
        prepare_at(data, corpus)
    assert verify(data).problems == ()
    assert was_prepared(prepare_at(data, corpus))


def test_a_lock_on_a_deleted_lock_file_does_not_count(
    tmp_path: Path, corpus: Path, prepare_at: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_file, flock = tmp_path / "data" / ".prepare.lock", fcntl.flock

    def delete_first(lock: int, how: int) -> None:  # the owner deletes the file and ends between our open and our lock
        lock_file.unlink()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with pytest.raises(DataError, match="is being prepared by another process"):
        prepare_at(tmp_path / "data", corpus)
    monkeypatch.undo()
    assert not was_prepared(prepare_at(tmp_path / "data", corpus))


def test_everything_is_synced_before_it_is_renamed(
    tmp_path: Path, corpus: Path, prepare_at: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    renamed: dict[str, bool] = {}
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def spy_replace(file: Path, target: Path) -> Path:
        if file.name.endswith("tokenizer.json") or file.is_dir():
            inside = [file] if file.is_file() else [*file.iterdir()]
            renamed[str(target.relative_to(tmp_path))] = all(each.stat().st_ino in synced for each in inside)
        return replace(file, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    trained = prepare_at(tmp_path / "trained", corpus).path  # written under its final name, then committed
    prepare_at(tmp_path / "given", corpus, tokenizer=trained)  # copied, then committed
    committed = ("tokenizer.json", "train", "validation")
    expected = [f"{name}/{file}" for name in ("trained", "given") for file in committed]
    assert renamed == dict.fromkeys(expected, True)


def test_both_commands_refuse_to_run_without_sources(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    with pytest.raises(DataError, match=r"data\.sources is empty; name the text"):
        prepare_at(tmp_path / "data", corpus, sources=[])
    with pytest.raises(DataError, match=r"data\.sources is empty; name the text"):
        build_tokenizer(tmp_path / "tokenizer.json", PrepareConfig())


def test_foreign_files_are_not_deleted(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "thesis.txt").write_text("three years")
    with pytest.raises(DataError, match="train is in the way"):
        prepare_at(tmp_path / "data", corpus)
    assert contents(tmp_path / "data") == {"train/thesis.txt": b"three years"}


def test_prepare_reuses_the_cleaning_of_an_earlier_tokenizer_training(
    tmp_path: Path, corpus: Path, prepare_at: Prepare
) -> None:
    """The result is the same as without training the tokenizer first."""
    source = SourceConfig(kind="text", paths=(str(corpus),))
    settings = {"dedup": DedupConfig(exact=True)}
    all_settings = {
        "sources": (source,),
        "vocab_size": 300,
        "tokenizer_sample_mb": 1.0,
        "validation_fraction": 0.1,
        "shard_tokens": 1000,
        "workers": 1,
    }
    build_tokenizer(tmp_path / "two" / "tokenizer.json", PrepareConfig(**(all_settings | settings)))
    judged = sorted((tmp_path / "two" / ".prepare.tmp" / "judged").glob("*.verdicts"))
    times = [file.stat().st_mtime_ns for file in judged]
    assert len(judged) > 1

    def on_progress(progress: StageProgress) -> None:
        if progress.stage == "tokenizing" and times:
            assert [file.stat().st_mtime_ns for file in judged] == times
            times.clear()

    prepare_at(tmp_path / "two", corpus, progress=on_progress, **settings)
    assert not times
    prepare_at(tmp_path / "one", corpus, **settings)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    # Manifests differ, because they say whether the tokenizer was trained.
    assert all(one[name] == two[name] for name in one if not name.endswith("manifest.json"))
    assert not (tmp_path / "two" / ".prepare.tmp").exists()


def test_files_that_are_passed_over_are_noted_recorded_and_shown(
    tmp_path: Path, corpus: Path, prepare_at: Prepare
) -> None:
    quiet = prepare_at(tmp_path / "quiet", corpus)
    assert quiet.splits["train"].recipe.passed_over == ()
    # The bytes are those of versions without this field.
    assert b"passed_over" not in (tmp_path / "quiet" / "train" / MANIFEST).read_bytes()
    assert not any("passed over" in note for note in quiet.notes)
    for name in ("x.json", "y.TXT", ".DS_Store"):
        (corpus / name).write_text("some text")
    made = prepare_at(tmp_path / "data", corpus)
    others = "2 files (1 .TXT, 1 .json), x.json and y.TXT"
    note = (
        f"corpus: passed over {others}: what does not match *.txt, *.md, *.txt.gz, *.md.gz, *.txt.zst, *.md.zst is not "
        "read; name it in `paths` or set `pattern` to read it, `exclude` to do without this note"
    )
    assert made.notes[0] == note
    assert open_prepared(tmp_path / "data").splits["train"].recipe.passed_over == (others,)
    (entry,) = describe_data(tmp_path / "data", samples=0).recipe["sources"]
    assert entry.value.endswith(f"; passed over: {others}")
    assert prepare_at(tmp_path / "data", corpus).notes[1] == note  # also if the data is prepared already
    config = PrepareConfig(sources=(SourceConfig(kind="text", paths=(str(corpus),)),), vocab_size=300, workers=1)
    assert build_tokenizer(tmp_path / "alone" / "tokenizer.json", config).notes[0] == note
    shards = [
        {file.name: file.read_bytes() for file in (tmp_path / name / "train").glob("*.bin")}
        for name in ("quiet", "data")
    ]
    assert shards[0] == shards[1]
    for split in ("train", "validation"):  # so a run on one can continue with the other
        file = tmp_path / "data" / split / MANIFEST
        assert b"passed_over" in file.read_bytes()
        assert (
            load_manifest(file.parent).fingerprint()
            == made.splits[split].fingerprint()
            == quiet.splits[split].fingerprint()
        )
        assert quiet.splits[split].fingerprint() == xxhash.xxh3_128_hexdigest(
            (tmp_path / "quiet" / split / MANIFEST).read_bytes()
        )
    assert prepare_at(tmp_path / "quiet", corpus).notes[0].endswith("is prepared already, with these very settings")
