import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.inspect import describe
from data_pipeline.loader import Loader
from data_pipeline.settings import SourceConfig
from data_pipeline.shards import ShardSet
from data_pipeline.tokenize import Prepared, Progress, build_tokenizer
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.verify import verify

Prepare = Callable[..., Prepared]
MakeCorpus = Callable[..., Path]


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def documents_of(path: Path, split: str) -> list[str]:
    shards, tokenizer = ShardSet.open(path / split), load_tokenizer(path)
    spans = [shards.document_span(i) for i in range(shards.n_documents)]
    assert all(int(shards.tokens(stop - 1, stop)[0]) == tokenizer.eot_id for _, stop in spans)
    return [tokenizer.decode(shards.tokens(start, stop - 1).tolist()) for start, stop in spans]


def test_every_document_is_in_one_split_word_for_word(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    (corpus / "literal.txt").write_text("the literal <|endoftext|> is text\n")
    prepared = prepare_at(tmp_path / "data", corpus)
    train, validation = documents_of(tmp_path / "data", "train"), documents_of(tmp_path / "data", "validation")
    assert sorted(train + validation) == sorted(file.read_text() for file in corpus.rglob("*.txt"))
    assert train == [file.read_text() for file in sorted(corpus.rglob("*.txt")) if file.read_text() in set(train)]
    assert 1 <= len(validation) <= 15
    assert prepared.splits["train"].text_bytes == sum(len(text.encode()) for text in train)
    assert len(prepared.splits["train"].shards) > 1
    assert verify(tmp_path / "data").problems == ()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    for name in ("one", "two"):
        prepare_at(tmp_path / name, corpus)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {"tokenizer.json", "train/manifest.json", "validation/manifest.json"} < set(contents(tmp_path / "one"))


def test_whether_a_document_is_held_out_depends_on_its_id_alone(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    prepare_at(tmp_path / "one", corpus)
    held_out = documents_of(tmp_path / "one", "validation")
    for file in sorted(corpus.rglob("*.txt"))[:20]:
        if file.read_text() not in held_out:
            file.unlink()
    prepare_at(tmp_path / "two", corpus)
    assert documents_of(tmp_path / "two", "validation") == held_out


def test_empty_and_repaired_documents_are_counted(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    (corpus / "empty.txt").write_text("")
    (corpus / "blank.txt").write_text(" \n\t\n")
    (corpus / "latin.txt").write_bytes("café".encode("latin-1"))
    splits = prepare_at(tmp_path / "data", corpus, validation_fraction=0.0).splits
    assert list(splits) == ["train"]
    assert (splits["train"].documents, splits["train"].dropped, splits["train"].repaired) == (61, {"empty": 2}, {"invalid Unicode": 1})


def test_preparing_again_changes_nothing(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    first = prepare_at(tmp_path / "data", corpus)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*")}
    again = prepare_at(tmp_path / "data", corpus)
    assert (first.already, again.already) == (False, True)
    assert again.splits == first.splits
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*")} == times


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 310}, r"data\.vocab_size was 300 and is 310"),
        ({"validation_fraction": 0.2}, r"data\.validation_fraction was 0\.1 and is 0\.2"),
        (
            {"shard_tokens": 10, "tokenizer_sample_mb": 2.0},
            r"data\.shard_tokens was 1000 and is 10; data\.tokenizer_sample_mb was 1\.0 and",
        ),
        ({"sources": "exclude"}, r"data\.sources\.0\.exclude was \(\) and is \('a',\); what data\.sources\.0 holds was 60 files"),
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


def test_a_file_that_grew_is_noticed(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    prepare_at(tmp_path / "data", corpus)
    (corpus / "a" / "001.txt").write_text("longer " * 500)
    with pytest.raises(DataError, match=r"what data\.sources\.0 holds was 60 files, \d+ bytes"):
        prepare_at(tmp_path / "data", corpus)


def test_a_tokenizer_that_is_there_is_used(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    sources = [SourceConfig(kind="text", paths=(str(corpus),))]
    made = build_tokenizer(tmp_path / "tok" / "tokenizer.json", sources=sources, vocab_size=280, tokenizer_sample_mb=1.0)
    prepared = prepare_at(tmp_path / "given", corpus, tokenizer=tmp_path / "tok")
    assert prepared.tokenizer.fingerprint == made.fingerprint == load_tokenizer(tmp_path / "given").fingerprint
    assert prepare_at(tmp_path / "given", corpus, tokenizer=tmp_path / "tok" / "tokenizer.json").already
    shutil.copytree(tmp_path / "tok", tmp_path / "own")
    assert prepare_at(tmp_path / "own", corpus).tokenizer.fingerprint == made.fingerprint
    prepare_at(tmp_path / "trained", corpus)
    with pytest.raises(DataError, match=rf"data\.tokenizer was \w+ and is {made.fingerprint}"):
        prepare_at(tmp_path / "trained", corpus, tokenizer=tmp_path / "tok")
    with pytest.raises(DataError, match="is there already"):
        build_tokenizer(tmp_path / "tok" / "tokenizer.json", sources=sources, vocab_size=280, tokenizer_sample_mb=1.0)


def test_a_tiny_corpus_still_holds_one_document_out(tmp_path: Path, prepare_at: Prepare, make_corpus: MakeCorpus) -> None:
    folder = make_corpus(tmp_path / "corpus", documents=3)
    splits = prepare_at(tmp_path / "data", folder, validation_fraction=0.001).splits
    assert (splits["train"].documents, splits["validation"].documents) == (2, 1)
    with pytest.raises(DataError, match=r"a single document.*data\.validation_fraction=0"):
        prepare_at(tmp_path / "one", make_corpus(tmp_path / "single", documents=1))
    assert prepare_at(tmp_path / "one", tmp_path / "single", validation_fraction=0.0).splits["train"].documents == 1


def corrupt_parquet(folder: Path) -> SourceConfig:
    pq.write_table(pa.table({"text": ["some text"] * 100}), folder / "bad.parquet")
    (folder / "bad.parquet").write_bytes((folder / "bad.parquet").read_bytes()[:-20])
    return SourceConfig(kind="parquet", paths=(str(folder),))


def empty_files(folder: Path) -> SourceConfig:
    (folder / "x.txt").write_text("")
    return SourceConfig(kind="text", paths=(str(folder),))


def late_breakage(folder: Path) -> SourceConfig:
    lines = [json.dumps({"text": f"line {i}"}) for i in range(200)]
    (folder / "x.jsonl").write_text("\n".join([*lines, "{broken"]))
    return SourceConfig(kind="jsonl", paths=(str(folder),))


@pytest.mark.parametrize("with_tokenizer", [False, True])
@pytest.mark.parametrize(
    ("source", "message"),
    [(empty_files, "hold no text"), (corrupt_parquet, r"bad\.parquet"), (late_breakage, r"x\.jsonl:201: broken JSON")],
)
def test_bad_input_leaves_nothing_behind(
    tmp_path: Path,
    prepare_at: Prepare,
    make_corpus: MakeCorpus,
    source: Callable[[Path], SourceConfig],
    message: str,
    with_tokenizer: bool,
) -> None:
    (tmp_path / "bad").mkdir()
    tokenizer = None
    if with_tokenizer:
        tokenizer = prepare_at(tmp_path / "good", make_corpus(tmp_path / "corpus")).path
    with pytest.raises(DataError, match=message):
        prepare_at(tmp_path / "data", tmp_path, sources=[source(tmp_path / "bad")], tokenizer=tokenizer)
    assert not (tmp_path / "data").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipeline import prepared, tokenize
from data_pipeline.settings import SourceConfig

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

where = sys.argv[3]
if where == "before the first rename": tokenize.commit = die
if where == "between the renames": prepared.sync_folder = lambda folder: die() if folder.name == "data" else None
progress = die if where == "while reading" else lambda _: None
tokenize.prepare(path=Path(sys.argv[1]), sources=[SourceConfig(kind="text", paths=(sys.argv[2],))], tokenizer=None, vocab_size=300,
                 tokenizer_sample_mb=1.0, validation_fraction=0.1, shard_tokens=1000, progress=progress)
"""


@pytest.mark.parametrize("where", ["while reading", "before the first rename", "between the renames"])
def test_a_killed_preparation_looks_like_none_and_the_next_one_is_whole(
    tmp_path: Path, corpus: Path, prepare_at: Prepare, where: str
) -> None:
    data = tmp_path / "data"
    done = subprocess.run([sys.executable, "-c", KILLED, str(data), str(corpus), where], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert any(data.iterdir())  # it did leave something
    with pytest.raises(DataError, match="holds no prepared data"):
        Loader(data / "train", 16, 0)
    prepare_at(data, corpus)
    prepare_at(tmp_path / "fresh", corpus)
    assert contents(data) == contents(tmp_path / "fresh")
    assert sorted(file.name for file in data.iterdir()) == ["tokenizer.json", "train", "validation"]
    assert verify(data).problems == ()


def test_two_preparations_of_one_path_do_not_mix(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / ".prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being prepared by another process"):
            prepare_at(tmp_path / "data", corpus)
    assert not prepare_at(tmp_path / "data", corpus).already


def test_what_another_process_committed_before_the_lock_was_taken_is_kept(
    tmp_path: Path, corpus: Path, prepare_at: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, flock = tmp_path / "data", fcntl.flock

    def late(lock: TextIO, how: int) -> None:  # the other one does all its work after we looked for a manifest, and before our lock
        monkeypatch.setattr(fcntl, "flock", flock)
        lock_file = data / ".prepare.lock"
        kept = lock_file.rename(data / "ours")
        prepare_at(data, corpus)
        kept.rename(lock_file)
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(DataError, match="was prepared by another process meanwhile; run the command again"):
        prepare_at(data, corpus)
    assert verify(data).problems == ()
    assert prepare_at(data, corpus).already


def test_a_lock_file_that_its_owner_deleted_locks_nothing(
    tmp_path: Path, corpus: Path, prepare_at: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_file, flock = tmp_path / "data" / ".prepare.lock", fcntl.flock

    def late(lock: TextIO, how: int) -> None:  # between our open and our lock the owner deletes the file and ends
        lock_file.unlink()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(DataError, match="is being prepared by another process"):
        prepare_at(tmp_path / "data", corpus)
    monkeypatch.undo()
    assert not prepare_at(tmp_path / "data", corpus).already


def test_a_tokenizer_is_on_the_disk_before_it_is_renamed(
    tmp_path: Path, corpus: Path, prepare_at: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    renamed: list[bool] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def spy_replace(file: Path, target: Path) -> Path:
        renamed.append(file.stat().st_ino in synced)
        return replace(file, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    trained = prepare_at(tmp_path / "trained", corpus).path  # renamed when trained and when committed
    prepare_at(tmp_path / "given", corpus, tokenizer=trained)  # copied, then committed
    assert renamed == [True] * 3


def test_no_sources_are_told_by_both_commands(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    with pytest.raises(DataError, match=r"data\.sources is empty; name the text"):
        prepare_at(tmp_path / "data", corpus, sources=[])
    with pytest.raises(DataError, match=r"data\.sources is empty; name the text"):
        build_tokenizer(tmp_path / "tokenizer.json", sources=[], vocab_size=300, tokenizer_sample_mb=1.0)


def test_what_is_not_ours_is_not_deleted(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "thesis.txt").write_text("three years")
    with pytest.raises(DataError, match="train is in the way"):
        prepare_at(tmp_path / "data", corpus)
    assert contents(tmp_path / "data") == {"train/thesis.txt": b"three years"}


def test_progress_ends_at_the_totals(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    seen: list[Progress] = []
    splits = prepare_at(tmp_path / "data", corpus, progress=seen.append).splits
    assert [p.stage for p in seen] == ["reading a sample", "training the tokenizer", "tokenizing"]
    size = sum(file.stat().st_size for file in corpus.rglob("*.txt"))
    last = seen[-1]
    assert (last.documents, last.tokens, last.read, last.total) == (60, sum(m.tokens for m in splits.values()), size, size)


def flip(file: Path, byte: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 1
    file.write_bytes(raw)


def test_verify_reports_everything_that_is_wrong(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    data = prepare_at(tmp_path / "data", corpus).path
    report = verify(data)
    assert report.problems == ()
    assert report.bytes_read == sum(file.stat().st_size for file in data.rglob("shard-*"))
    assert report.shards == len(list(data.rglob("*.bin")))
    flip(data / "train" / "shard-00000.bin", 5)
    flip(data / "train" / "shard-00001.idx", 50)
    (data / "validation" / "shard-00000.bin").unlink()
    tokenizer = json.loads((data / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (data / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = "\n".join(verify(data).problems)
    for expected in (
        "train/shard-00000.bin: block 0 of 1",
        "shard-00001.idx: does not match",
        "validation/shard-00000.bin",
        "tokenizer.json",
    ):
        assert expected in found
    with pytest.raises(DataError, match="holds no prepared data"):
        verify(tmp_path / "nowhere")


def test_describe_counts_and_reads_back(tmp_path: Path, corpus: Path, prepare_at: Prepare) -> None:
    data = prepare_at(tmp_path / "data", corpus).path
    description = describe(data, samples=4)
    assert [split.name for split in description.splits] == ["train", "validation"]
    train = description.splits[0]
    assert sum(bin.documents for bin in train.lengths) == train.manifest.documents
    assert sum(bin.tokens for bin in train.lengths) == train.manifest.tokens
    assert train.bytes_per_token == train.manifest.text_bytes / train.manifest.tokens
    texts = documents_of(data, "train")
    for sample in train.samples:
        whole = texts[sample.index] + "<|endoftext|>"
        assert whole.startswith(sample.head)
        assert whole.endswith(sample.tail or sample.head)
    assert [sample.index for sample in train.samples] == [i * len(texts) // 4 for i in range(4)]
