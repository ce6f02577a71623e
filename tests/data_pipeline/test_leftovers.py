"""Results of an earlier attempt are used if they are complete and have the same key, and made again otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attempts import Text, contents, finished, interrupt, looks_prepared, prepare_here, write_text

from data_pipeline.errors import DataError
from data_pipeline.prepare import PrepareStage, StageProgress
from data_pipeline.storage.prepared import PreparedData


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return write_text(tmp_path_factory.mktemp("short"), 100)


CHANGES: dict[str, dict[str, Any]] = {
    "tokenizer": {"vocab_size": 310},
    "shards": {"shard_tokens": 1500},
    "hold-out": {"validation_fraction": 0.3},
    "filter": {"filters": {"apply": ["length"], "length": {"min_characters": 500}}},
    "filters of the source": {"filters": {"apply": [], "length": {"min_characters": 40}}},
    "shingles": {"dedup": {"exact": True, "minhash": True, "ngram": 2}},
    "no comparison": {"dedup": {"exact": False, "minhash": False}},
    "rejects": {"keep_rejects": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_leftovers_of_an_attempt_with_other_settings_are_not_used(tmp_path: Path, short: Text, change: str) -> None:
    """One folder holds results of three attempts."""
    interrupt(tmp_path / "data", short.jsonl, "tokenizing")
    interrupt(tmp_path / "data", short.jsonl, "tokenizing", **CHANGES[change])
    interrupt(tmp_path / "data", short.jsonl, "cleaning")
    prepare_here(tmp_path / "data", short.jsonl, **CHANGES[change])
    prepare_here(tmp_path / "fresh", short.jsonl, **CHANGES[change])
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh") != short.prepared


def test_signatures_of_other_settings_are_not_used(tmp_path: Path, short: Text) -> None:
    """As after a kill between writing a chunk's signatures and its verdicts: old verdicts beside new signatures."""
    interrupt(tmp_path / "data", short.jsonl, "tokenizing")
    interrupt(tmp_path / "other", short.jsonl, "tokenizing", **CHANGES["filter"])
    for folder in ("data", "other"):
        assert len(finished(tmp_path / folder, "judged")) == short.chunks
    for file in (tmp_path / "other" / ".prepare.tmp" / "judged").glob("*.signatures"):
        file.rename(tmp_path / "data" / ".prepare.tmp" / "judged" / file.name)
    prepare_here(tmp_path / "data", short.jsonl)
    assert contents(tmp_path / "data") == short.prepared


def test_a_chunk_is_tokenized_again_if_only_its_verdicts_differ(tmp_path: Path, short: Text) -> None:
    (tmp_path / "tokenizer.json").write_bytes(short.prepared["tokenizer.json"])
    settings = {"tokenizer": tmp_path / "tokenizer.json"}
    interrupt(tmp_path / "data", short.jsonl, "tokenizing", **settings, **CHANGES["no comparison"])
    assert len(finished(tmp_path / "data")) > short.chunks / 3
    prepare_here(tmp_path / "data", short.jsonl, **settings)
    prepare_here(tmp_path / "fresh", short.jsonl, **settings)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    "change", [{"shard_tokens": 4000}, {"filters": {}, "dedup": {}}, {"keep_rejects": False}], ids=str
)
def test_rejects_of_an_earlier_attempt_are_not_kept(tmp_path: Path, short: Text, change: dict[str, Any]) -> None:
    interrupt(tmp_path / "data", short.jsonl, "tokenizing", keep_rejects=True)
    assert len(list((tmp_path / "data" / ".prepare.tmp" / "rejects").iterdir())) > short.chunks / 3
    settings = {"keep_rejects": True} | change
    prepare_here(tmp_path / "data", short.jsonl, **settings)
    prepare_here(tmp_path / "fresh", short.jsonl, **settings)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_a_chunk_whose_rejects_are_missing_is_tokenized_again(tmp_path: Path, short: Text) -> None:
    interrupt(tmp_path / "data", short.jsonl, "tokenizing", keep_rejects=True)
    for file in (tmp_path / "data" / ".prepare.tmp" / "rejects").iterdir():
        file.unlink()
    for folder in ("data", "fresh"):
        prepare_here(tmp_path / folder, short.jsonl, keep_rejects=True)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("what", ["another", "damaged"])
def test_a_trained_tokenizer_is_reused_only_if_its_key_matches(tmp_path: Path, short: Text, what: str) -> None:
    """An attempt with other settings was killed between writing its tokenizer and the tokenizer's key."""
    interrupt(tmp_path / "data", short.jsonl, "tokenizing")
    interrupt(tmp_path / "other", short.jsonl, "tokenizing", vocab_size=310)
    file, other = (tmp_path / name / ".prepare.tmp" / "tokenizer.json" for name in ("data", "other"))
    assert file.read_bytes() == short.prepared["tokenizer.json"] != other.read_bytes()
    file.write_bytes(other.read_bytes() if what == "another" else file.read_bytes()[:-100])
    prepare_here(tmp_path / "data", short.jsonl)
    assert contents(tmp_path / "data") == short.prepared


def test_notes_on_the_training_of_a_tokenizer_survive_an_interruption(
    tmp_path: Path, prepare_at: Callable[..., PreparedData], corpus: Path
) -> None:
    (corpus / "dna.txt").write_text("ACGT" * 500)
    note = "split for training the tokenizer, and only there: 1 unbroken run of more than 512 characters"

    def stop(progress: StageProgress) -> None:
        if progress.stage == "tokenizing" and any((tmp_path / "data" / ".prepare.tmp" / "train").glob("*.bin")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_at(tmp_path / "data", corpus, progress=stop, shard_tokens=100)
    again: set[str] = set()
    made = prepare_at(tmp_path / "data", corpus, progress=lambda progress: again.add(progress.stage), shard_tokens=100)
    assert "training the tokenizer" not in again
    assert note in made.notes


def test_a_tokenizer_that_was_added_between_attempts_replaces_the_trained_one(tmp_path: Path, short: Text) -> None:
    interrupt(tmp_path / "data", short.jsonl, "tokenizing", vocab_size=310)
    (tmp_path / "fresh").mkdir()
    for folder in ("data", "fresh"):
        (tmp_path / folder / "tokenizer.json").write_bytes(short.prepared["tokenizer.json"])
        prepare_here(tmp_path / folder, short.jsonl, vocab_size=310)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")
    assert contents(tmp_path / "data")["tokenizer.json"] == short.prepared["tokenizer.json"]


@pytest.mark.parametrize(
    "pattern",
    ["judged/*.verdicts", "judged/*.signatures", "judged/*.compared", "done/*.result", "train/*.bin", "train/*.idx"],
)
def test_a_damaged_file_of_an_earlier_attempt_is_made_again(tmp_path: Path, short: Text, pattern: str) -> None:
    interrupt(tmp_path / "data", short.jsonl, "tokenizing")
    files = sorted((tmp_path / "data" / ".prepare.tmp").glob(pattern))
    assert len(files) >= 5
    for number, file in enumerate(files[:4]):
        raw = file.read_bytes()
        middle = len(raw) // 2
        file.write_bytes(
            [raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :], raw[:-3], b"", raw + b"x"][number]
        )
    prepare_here(tmp_path / "data", short.jsonl)
    assert contents(tmp_path / "data") == short.prepared


@pytest.mark.parametrize("stage", ["comparing documents", "reading a sample"])
@pytest.mark.parametrize("change", ["a letter", "a line more", "a line less"])
def test_a_source_that_changed_after_cleaning_is_reported_and_then_cleaned_again(
    tmp_path: Path, short: Text, change: str, stage: PrepareStage
) -> None:
    file, data = tmp_path / "words.jsonl", tmp_path / "data"
    lines = short.jsonl.read_text().splitlines(keepends=True)
    file.write_text("".join(lines))

    def meddle(progress: StageProgress) -> None:
        if progress.stage == stage and progress.read == progress.total:
            middle = len(lines) // 2
            if change == "a letter":  # the same size: only the text differs
                lines[middle] = lines[middle].replace("a", "e", 1)
            else:  # later bytes keep their offsets
                line = lines[middle].removesuffix("\n")
                lines[middle] = (
                    line[:40] + '"}\n{"text": "' + line[53:] + "\n"
                    if change == "a line more"
                    else " " * len(line) + "\n"
                )
            file.write_text("".join(lines))

    with pytest.raises(DataError, match=r"words\.jsonl changed during the preparation .* run the command again"):
        prepare_here(data, file, meddle)
    assert not looks_prepared(data)
    prepare_here(data, file)
    prepare_here(tmp_path / "fresh", file)
    assert contents(data) == contents(tmp_path / "fresh")
