"""Whatever goes wrong while data is prepared, or with prepared data: it is named, nothing wrong is used, and the same command goes on."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_pipeline.errors import DataError
from data_pipeline.loader import Loader
from data_pipeline.manifest import BLOCK_BYTES, DTYPES
from data_pipeline.packing import NO_LABEL
from data_pipeline.prepare import OnProgress, Progress, Stage, prepare
from data_pipeline.prepared import Prepared, open_prepared
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.shards import Split, open_split
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.tokenizer_formats import config_of
from data_pipeline.verify import verify

Prepare = Callable[..., Prepared]
WriteSplit = Callable[..., Split]
RandomDocuments = Callable[..., list[list[int]]]

PATIENCE = 60.0
"""Seconds to wait for something that takes one."""

SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "ri", "so", "tu")


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def write_jsonl(file: Path, documents: int, seed: int = 0) -> None:
    """Documents of 60 to 120 words; every tenth is short, every tenth nearly repeats the one before."""
    rng = np.random.default_rng(seed)
    lines: list[str] = []
    for i in range(documents):
        words = ["".join(rng.choice(SYLLABLES, 3)) for _ in range(int(rng.integers(60, 120)))]
        if i % 10 == 1:
            words = words[:3]
        elif i % 10 == 2:
            words = [*json.loads(lines[-2])["text"].split(), "more"]
        lines.append(json.dumps({"text": " ".join(words)}) + "\n")
    file.write_text("".join(lines))


SETTINGS: dict[str, Any] = {
    "vocab_size": 300,
    "tokenizer_sample_mb": 0.1,
    "validation_fraction": 0.1,
    "shard_tokens": 2000,
    "filters": {"apply": ["length"], "length": {"min_characters": 40}},
    "dedup": {"exact": True, "minhash": True},
}


@dataclass(frozen=True)
class Text:
    """A source, and what a preparation of it gives that nothing happens to."""

    jsonl: Path
    chunks: int
    prepared: dict[str, bytes]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return write_text(tmp_path_factory.mktemp("short"), 100)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Enough to be in the middle of it."""
    return write_text(tmp_path_factory.mktemp("long"), 560)


def write_text(folder: Path, documents: int) -> Text:
    write_jsonl(folder / "words.jsonl", documents)
    prepare_here(folder / "data", folder / "words.jsonl")
    files = contents(folder / "data")
    return Text(folder / "words.jsonl", len({name[:17] for name in files if name.endswith(".bin") and name.startswith("train/")}), files)


def prepare_here(
    path: Path, jsonl: Path, progress: OnProgress = lambda _: None, *, keep_rejects: bool = False, **settings: Any
) -> Prepared:
    """In this process, without workers: the result does not depend on them."""
    source = SourceConfig(kind="jsonl", paths=(str(jsonl),))
    config = PrepareConfig(**(SETTINGS | {"sources": (source,), "workers": 1} | settings))
    return prepare(path, config, keep_rejects=keep_rejects, progress=progress)


@contextlib.contextmanager
def preparing(path: Path, jsonl: Path, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """`pretrain data prepare` with two workers in a process group of its own."""
    sources = [{"kind": "jsonl", "paths": [str(jsonl)]}]
    config = path.parent / "prepare.yaml"
    config.write_text(yaml.safe_dump({"data": SETTINGS | {"path": str(path), "sources": sources, "workers": 2} | settings}))
    command = [sys.executable, "-c", "from pretrain.cli import main; main()", "data", "prepare", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, the lines on both streams as one)."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, " ".join((out + err).split())


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finished(path: Path, pass_: str = "done") -> list[str]:
    """Names of the chunks that a preparation under way has finished."""
    ending = {"done": "result", "judged": "verdicts"}[pass_]
    return [file.stem for file in (path / ".prepare.tmp" / pass_).glob(f"*.{ending}")]


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def looks_prepared(path: Path) -> bool:
    return any((path / name).exists() for name in ("train", "validation", "tokenizer.json", "rejects"))


def flip(file: Path, byte: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 1
    file.write_bytes(raw)


class TestInterruption:
    """The preparation is ended from outside; the same command goes on."""

    @pytest.mark.parametrize("pass_", ["judged", "done"])
    def test_kill_9_leaves_no_process_and_loses_no_finished_chunk(
        self, tmp_path: Path, long: Text, pass_: str
    ) -> None:
        data = tmp_path / "data"
        with preparing(data, long.jsonl) as process:
            wait_until(lambda: len(finished(data, pass_)) >= 5)
            workers = children(process.pid)
            assert len(workers) >= 2
            process.kill()
            process.wait()
            wait_until(lambda: not any(is_alive(pid) for pid in workers))
        done = finished(data, pass_)
        assert 5 <= len(done) < long.chunks  # it was in the middle
        assert not looks_prepared(data)
        with pytest.raises(DataError, match="holds no prepared data"):
            Loader(data / "train", seq_len=16, seed=0)
        work = data / ".prepare.tmp"
        kept = {
            file.relative_to(work): (file.stat().st_ino, file.stat().st_mtime_ns)
            for name in done
            for file in (work.glob(f"judged/{name}.verdicts") if pass_ == "judged" else work.glob(f"train/{name}*"))
        }
        assert len(kept) >= len(done)
        seen: dict[Path, tuple[int, int]] = {}

        def look(progress: Progress) -> None:
            if progress.stage == ("cleaning" if pass_ == "judged" else "tokenizing") and progress.read == progress.total:
                seen.update({name: ((work / name).stat().st_ino, (work / name).stat().st_mtime_ns) for name in kept})

        prepare_here(data, long.jsonl, look)
        assert seen == kept
        assert contents(data) == long.prepared

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 75), (signal.SIGTERM, -signal.SIGTERM)])
    def test_a_signal_ends_it_and_the_same_command_goes_on(
        self, tmp_path: Path, long: Text, number: signal.Signals, code: int
    ) -> None:
        data = tmp_path / "data"
        with preparing(data, long.jsonl) as process:
            wait_until(lambda: len(finished(data)) >= 5)
            workers = children(process.pid)
            if number == signal.SIGINT:  # a terminal sends it to all
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            answer, said = end_of(process)
            wait_until(lambda: not any(is_alive(pid) for pid in workers))
        assert answer == code
        assert "Traceback" not in said
        if number == signal.SIGINT:
            assert "stopped; what is finished is kept, and the same command goes on from there" in said
        assert len(finished(data)) < long.chunks
        assert not looks_prepared(data)
        prepare_here(data, long.jsonl)
        assert contents(data) == long.prepared

    def test_a_killed_worker_is_told(self, tmp_path: Path, long: Text) -> None:
        data = tmp_path / "data"
        with preparing(data, long.jsonl) as process:
            wait_until(lambda: len(finished(data)) >= 5)
            workers = [pid for pid in children(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
            os.kill(workers[0], signal.SIGKILL)
            answer, said = end_of(process)
            assert not any(is_alive(pid) for pid in workers)
        assert answer == 2
        assert re.search(r"error: a worker process died while words-\d{5}.* lower data\.workers or data\.shard_tokens", said)
        assert not looks_prepared(data)
        prepare_here(data, long.jsonl)
        assert contents(data) == long.prepared

    def test_two_processes_do_not_prepare_into_one_folder(self, tmp_path: Path, long: Text) -> None:
        data = tmp_path / "data"
        with preparing(data, long.jsonl) as process:
            wait_until(lambda: len(finished(data, "judged")) >= 1)
            with pytest.raises(DataError, match=rf"data\.path={data} is being prepared by another process; wait for it, or set another"):
                prepare_here(data, long.jsonl)
            assert end_of(process)[0] == 0
        assert contents(data) == long.prepared


RENAMES = """
import os, sys
from pathlib import Path
from data_pipeline.prepare import prepare
from data_pipeline.settings import PrepareConfig

config, replace = PrepareConfig.model_validate_json(sys.argv[2]), Path.replace
for number in range(5):
    data, renames = Path(sys.argv[1]) / str(number), 0
    def dying(file, target):
        global renames
        if target.parent != data:  # not a rename of the commit
            return replace(file, target)
        if renames == number:
            os._exit(9)
        renames += 1
        replace(file, target)
        if renames == 4:
            os._exit(9)
    process = os.fork()
    if not process:
        Path.replace = dying
        prepare(data, config, keep_rejects=True)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(code, *sorted(file.name for file in data.iterdir()))
"""


def test_a_kill_between_the_renames_of_the_commit_looks_like_no_data_until_the_next_attempt(tmp_path: Path, short: Text) -> None:
    source = SourceConfig(kind="jsonl", paths=(str(short.jsonl),))
    config = PrepareConfig(**(SETTINGS | {"sources": (source,), "workers": 1, "shard_tokens": 20_000}))
    command = [sys.executable, "-c", RENAMES, str(tmp_path), config.model_dump_json()]
    answers = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    out = ["tokenizer.json", "rejects", "validation", "train"]
    assert answers == [" ".join(["9", ".prepare.lock", ".prepare.tmp", *sorted(out[:n])]) for n in range(5)]
    prepare(tmp_path / "fresh", config, keep_rejects=True)
    expected = contents(tmp_path / "fresh")
    for number in range(5):
        data = tmp_path / str(number)
        if number < 4:
            with pytest.raises(DataError, match="holds no prepared data"):
                Loader(data / "train", seq_len=16, seed=0)
        before = {file.stat().st_ino for file in data.rglob("*.bin")}
        prepare(data, config, keep_rejects=True)
        assert contents(data) == expected
        assert {file.stat().st_ino for file in data.rglob("*.bin")} == before


def interrupt(path: Path, short.jsonl: Path, stage: Stage, **settings: Any) -> None:
    """A preparation that is stopped in the middle of a stage."""

    def stop(progress: Progress) -> None:
        if progress.stage == stage and progress.read > (progress.total or 0) / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_here(path, short.jsonl, stop, **settings)


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


@pytest.mark.parametrize("stage", ["cleaning", "tokenizing"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_an_attempt_with_other_settings_left_is_not_used(
    tmp_path: Path, short: Text, change: str, stage: Stage
) -> None:
    """There and back: the pieces of three attempts lie in one folder."""
    interrupt(tmp_path / "data", short.jsonl, stage)
    interrupt(tmp_path / "data", short.jsonl, stage, **CHANGES[change])
    if stage == "cleaning":
        prepare_here(tmp_path / "data", short.jsonl, **CHANGES[change])
        prepare_here(tmp_path / "fresh", short.jsonl, **CHANGES[change])
        assert contents(tmp_path / "data") == contents(tmp_path / "fresh") != short.prepared
    else:
        prepare_here(tmp_path / "data", short.jsonl)
        assert contents(tmp_path / "data") == short.prepared


def test_signatures_of_other_settings_are_not_taken_for_ours(tmp_path: Path, short: Text) -> None:
    """As a kill leaves them between the signatures of a chunk and its verdicts: the old verdicts stand beside the new signatures."""
    interrupt(tmp_path / "data", short.jsonl, "tokenizing")
    interrupt(tmp_path / "other", short.jsonl, "tokenizing", dedup={"exact": True, "minhash": True, "ngram": 2})
    for folder in ("data", "other"):
        assert len(finished(tmp_path / folder, "judged")) == short.chunks
    for file in (tmp_path / "other" / ".prepare.tmp" / "judged").glob("*.signatures"):
        file.rename(tmp_path / "data" / ".prepare.tmp" / "judged" / file.name)
    prepare_here(tmp_path / "data", short.jsonl)
    assert contents(tmp_path / "data") == short.prepared


def flipped(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda raw: raw[:-3], lambda raw: b""], ids=["a bit", "cut off", "empty"])
@pytest.mark.parametrize(
    "pattern", ["judged/*.verdicts", "judged/*.signatures", "judged/*.compared", "done/*.result", "train/*.bin", "train/*.idx"]
)
def test_a_damaged_piece_of_an_earlier_attempt_is_made_again(
    tmp_path: Path, short: Text, pattern: str, damage: Callable[[bytes], bytes]
) -> None:
    interrupt(tmp_path / "data", short.jsonl, "tokenizing")
    files = sorted((tmp_path / "data" / ".prepare.tmp").glob(pattern))
    assert len(files) > 20
    for file in files[::3]:
        file.write_bytes(damage(file.read_bytes()))
    prepare_here(tmp_path / "data", short.jsonl)
    assert contents(tmp_path / "data") == short.prepared


@pytest.mark.parametrize("stage", ["comparing documents", "reading a sample"])
@pytest.mark.parametrize("change", ["a letter", "a line more", "a line less"])
def test_a_source_that_changes_after_it_was_cleaned_is_named_and_then_cleaned_again(
    tmp_path: Path, short: Text, change: str, stage: Stage
) -> None:
    file, data = tmp_path / "words.jsonl", tmp_path / "data"
    lines = short.jsonl.read_text().splitlines(keepends=True)
    file.write_text("".join(lines))

    def meddle(progress: Progress) -> None:
        if progress.stage == stage and progress.read == progress.total:
            middle = len(lines) // 2
            if change == "a letter":  # of the same size: nothing but the text tells
                lines[middle] = lines[middle].replace("a", "e", 1)
            else:  # the bytes after it stay where they are
                line = lines[middle].removesuffix("\n")
                lines[middle] = line[:40] + '"}\n{"text": "' + line[53:] + "\n" if change == "a line more" else " " * len(line) + "\n"
            file.write_text("".join(lines))

    with pytest.raises(DataError, match=r"words\.jsonl changed while it was prepared .* run the command again"):
        prepare_here(data, file, meddle)
    assert not looks_prepared(data)
    prepare_here(data, file)
    prepare_here(tmp_path / "fresh", file)
    assert contents(data) == contents(tmp_path / "fresh")


class TestFailure:
    """Something inside does not work."""

    def test_a_document_that_cannot_be_encoded_is_named(self, tmp_path: Path) -> None:
        words = {"<|endoftext|>": 0, "one": 1, "two": 2}
        model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}  # which it does not have
        (tmp_path / "tokenizer.json").write_text(json.dumps(config_of({"<|endoftext|>": 0}, model, pre_tokenizer={"type": "Whitespace"})))
        lines = [json.dumps({"text": "one two " * 100, "id": f"page {i}"}) for i in range(40)]
        lines[31] = json.dumps({"text": "one three two", "id": "page 31"})
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        sources = [{"kind": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "id_field": "id"}]
        settings = {"sources": sources, "tokenizer": str(tmp_path / "tokenizer.json"), "filters": {}, "dedup": {}}
        with preparing(tmp_path / "data", tmp_path, **settings) as process:
            wait_until(lambda: len(children(process.pid)) >= 2 or process.poll() is not None)
            workers = children(process.pid)
            answer, said = end_of(process)
            assert not any(is_alive(pid) for pid in workers)
        assert answer == 2
        assert "error: document page 31 of source x cannot be encoded (WordLevel error: " in said
        assert "Traceback" not in said
        assert not looks_prepared(tmp_path / "data")

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_full_disk_is_told_and_with_room_the_same_command_goes_on(
        self, small_disk: tuple[Path, Callable[[], None]], short: Text, workers: int
    ) -> None:
        disk, make_room = small_disk
        data = disk / "data"
        with pytest.raises(
            DataError, match=rf"data\.path={data} cannot be prepared: .*(No space left|File too large).* run the command again"
        ):
            prepare_here(data, short.jsonl, workers=workers)
        assert not looks_prepared(data)
        assert len(finished(data, "judged")) + len(finished(data)) > 0
        make_room()
        prepare_here(data, short.jsonl)
        assert contents(data) == short.prepared


@pytest.fixture(params=["tmpfs", "limit"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Callable[[], None]]]:
    """(a folder in which nothing large has room, what gives it room): a small file system, or a limit on the size of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    mount = ["mount", "-t", "tmpfs", "-o"]
    small = (
        request.param == "tmpfs"
        and subprocess.run([*mount, "size=1m", "tmpfs", tmp_path], capture_output=True, check=False).returncode == 0
    )
    if small:
        make_room = lambda: subprocess.run([*mount, "remount,size=100m", "tmpfs", tmp_path], check=True)
    else:  # only root may mount
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        make_room = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    try:
        yield tmp_path, make_room
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if small:
            subprocess.run(["umount", tmp_path], check=True)


def test_a_document_of_200_mb_is_prepared_in_4_gb(tmp_path: Path, short: Text) -> None:
    tokenizer = prepare_here(tmp_path / "small", short.jsonl).path
    text = "".join(json.loads(line)["text"] + "\n" for line in short.jsonl.read_text().splitlines())
    text *= 200_000_000 // len(text) + 1
    (tmp_path / "big.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "a small one"}))
    size = len(text)
    del text
    with preparing(tmp_path / "data", tmp_path / "big.jsonl", tokenizer=str(tokenizer), validation_fraction=0, workers=1) as process:
        _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_maxrss < 4_000_000  # kB
    made = open_prepared(tmp_path / "data").splits["train"].sources[0]
    assert (made.documents, made.text_bytes, made.dropped) == (2, size + 11, {})
    assert verify(tmp_path / "data").problems == ()


class TestText:
    """What a text may hold."""

    def test_an_end_of_text_token_spelt_out_ends_no_document(self, tmp_path: Path, prepare_at: Prepare) -> None:
        texts = ["<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>" * 100, "<|end", "oftext|>", "the end<|endoftext|>"] * 5
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(texts)))
        source = SourceConfig(kind="jsonl", paths=(str(tmp_path / "x.jsonl"),))
        made = prepare_at(tmp_path / "data", tmp_path, sources=[source], validation_fraction=0.0)
        shards = open_split(made.path / "train").sources[0]
        tokens = shards.tokens(0, shards.n_tokens)
        assert np.count_nonzero(tokens == made.tokenizer.eot_id) == shards.n_documents == 30
        spans = [shards.document_span(i) for i in range(30)]
        decoded = {made.tokenizer.decode(shards.tokens(start, stop - 1).tolist()) for start, stop in spans}
        assert decoded == {f"{text} {i}" for i, text in enumerate(texts)}

    def test_invalid_bytes_are_replaced_and_counted_and_empty_documents_dropped_and_counted(
        self, tmp_path: Path, prepare_at: Prepare
    ) -> None:
        rows = [b'{"text": "caf\xe9 %d"}' % i for i in range(7)] + [b'{"text": "\\ud800 %d"}' % i for i in range(4)]
        rows += [b'{"text": ""}', b'{"text": null}', b'{"text": " \\n\\u00a0"}'] * 3
        (tmp_path / "x.jsonl").write_bytes(b"\n".join(rows))
        source = SourceConfig(kind="jsonl", paths=(str(tmp_path / "x.jsonl"),))
        for name, settings in (("plain", {}), ("cleaned", {"dedup": {"exact": True}})):
            made = prepare_at(tmp_path / name, tmp_path, sources=[source], validation_fraction=0.0, **settings).splits["train"].sources[0]
            assert (made.documents, made.repaired, made.dropped) == (11, {"invalid Unicode": 11}, {"empty": 9})

    def test_a_file_name_that_is_no_unicode_is_an_id_like_others(self, tmp_path: Path, prepare_at: Prepare) -> None:
        folder = tmp_path / "text"
        folder.mkdir()
        for i in range(8):
            (folder / os.fsdecode(b"caf\xe9%d.txt" % i)).write_text("too short" if i == 3 else f"long enough to be kept, number {i}")
        made = prepare_at(tmp_path / "data", folder, filters={"apply": ["length"], "length": {"min_characters": 20}}, keep_rejects=True)
        assert sum(split.documents for split in made.splits.values()) == 7
        assert len(list((tmp_path / "data" / "rejects").iterdir())) == 1


class TestDamage:
    """Prepared data that is not what it was."""

    @pytest.fixture
    def split(self, write_split: WriteSplit, random_documents: RandomDocuments) -> Split:
        """One shard of three blocks."""
        return write_split({"web": random_documents(6000, 460)}, shard_tokens=10**7)

    def test_a_flipped_bit_is_named_with_its_block(self, split: Split) -> None:
        file = split.folder / "web-00000.bin"
        assert file.stat().st_size > 2 * BLOCK_BYTES
        loader = Loader(split.folder, seq_len=1024, seed=0)
        whole = loader.batch(0, loader.n_sequences)
        flip(file, BLOCK_BYTES + 12345)
        assert verify(split.folder).problems == (f"{file}: block 1 of 3 does not match its checksum",)
        itemsize = DTYPES[split.manifest.sources[0].dtype].itemsize
        touched = {
            j for j in range(loader.n_sequences) if j * 1024 * itemsize < 2 * BLOCK_BYTES and (j + 1) * 1024 * itemsize >= BLOCK_BYTES
        }
        with pytest.raises(DataError, match=rf"{file} is damaged: block 1 of 3 \(1 MiB from byte {BLOCK_BYTES}\)"):
            Loader(split.folder, seq_len=1024, seed=0).batch(0, loader.n_sequences)
        batch = Loader(split.folder, seq_len=1024, seed=0, on_damage="skip").batch(0, loader.n_sequences)
        left_out = (batch.labels == NO_LABEL).all(axis=1)
        assert len(batch.damaged) == np.count_nonzero(left_out) == len(touched) >= 512
        assert all("web-00000.bin is damaged: block 1 of 3" in message for message in batch.damaged)
        assert (batch.input_ids[left_out] == split.manifest.eot_id).all()
        for ours, theirs in ((batch.input_ids, whole.input_ids), (batch.labels, whole.labels), (batch.document_ids, whole.document_ids)):
            assert (ours[~left_out] == theirs[~left_out]).all()

    @pytest.mark.parametrize("ending", ["bin", "idx"])
    def test_a_shard_that_is_cut_off_or_missing_is_named_before_training(self, split: Split, ending: str) -> None:
        file = split.folder / f"web-00000.{ending}"
        Loader(split.folder, seq_len=1024, seed=0)
        raw = file.read_bytes()
        file.write_bytes(raw[:-2])
        with pytest.raises(DataError, match=rf"{file} has {len(raw) - 2} bytes where the manifest says {len(raw)}; restore it"):
            Loader(split.folder, seq_len=1024, seed=0, on_damage="skip")
        assert any(str(file) in problem for problem in verify(split.folder).problems)
        file.unlink()
        with pytest.raises(DataError, match=rf"{file} is missing"):
            Loader(split.folder, seq_len=1024, seed=0, on_damage="skip")
        assert any(str(file) in problem for problem in verify(split.folder).problems)


class TestOtherTokenizer:
    """Tokens mean nothing without their tokenizer."""

    def test_a_tokenizer_that_was_swapped_is_noticed(self, tmp_path: Path, short: Text) -> None:
        prepare_here(tmp_path / "one", short.jsonl)
        other = prepare_here(tmp_path / "two", short.jsonl, vocab_size=290).path
        (tmp_path / "one" / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
        with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer that made .*train; restore it, or delete"):
            open_prepared(tmp_path / "one")
        with pytest.raises(DataError, match="is not the tokenizer that made"):
            prepare_here(tmp_path / "one", short.jsonl)
        assert any("tokenizer.json did not make" in problem for problem in verify(tmp_path / "one").problems)

    def test_prepared_tokens_of_another_tokenizer_are_refused(self, tmp_path: Path, short: Text) -> None:
        one, two = (prepare_here(tmp_path / str(size), short.jsonl, vocab_size=size).path for size in (300, 290))
        fingerprints = [load_tokenizer(path).fingerprint for path in (one, two)]
        sources = [SourceConfig(kind="prepared", paths=(str(one),))]
        with pytest.raises(
            DataError, match=rf"a manifest of another tokenizer: {fingerprints[0]}, .* is {fingerprints[1]}; set data\.tokenizer"
        ):
            prepare_here(tmp_path / "both", short.jsonl, sources=sources, tokenizer=two)
        assert not (tmp_path / "both").exists()
        adopted = prepare_here(tmp_path / "both", short.jsonl, sources=sources, tokenizer=one)
        assert adopted.splits["train"].tokens == open_prepared(one).splits["train"].tokens
