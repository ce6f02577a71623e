"""Failures while data is prepared: they are reported, nothing wrong is used, and the same command continues."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attempts import (
    SETTINGS,
    Text,
    children,
    contents,
    end_of,
    finished,
    is_alive,
    looks_prepared,
    prepare_here,
    preparing,
    wait_until,
    write_text,
)

from data_pipeline.errors import DataError
from data_pipeline.prepare import StageProgress, prepare
from data_pipeline.reading.loader import Loader
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.prepared import open_prepared
from data_pipeline.storage.verify import verify
from data_pipeline.tokenizing.tokenizer_formats import make_tokenizer_config


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return write_text(tmp_path_factory.mktemp("short"), 100)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Long enough to interrupt its preparation."""
    return write_text(tmp_path_factory.mktemp("long"), 560)


class TestInterruption:
    """The preparation is killed or signalled; the same command continues."""

    @pytest.mark.parametrize("pass_", ["judged", "done"])
    def test_kill_9_leaves_no_process_and_loses_no_finished_chunk(self, tmp_path: Path, long: Text, pass_: str) -> None:
        data = tmp_path / "data"
        with preparing(data, long.jsonl) as process:
            wait_until(lambda: len(finished(data, pass_)) >= 5)
            workers = children(process.pid)
            assert len(workers) >= 2
            process.kill()
            process.wait()
            wait_until(lambda: not any(is_alive(pid) for pid in workers))
        done = finished(data, pass_)
        assert 5 <= len(done) < long.chunks  # it was interrupted in the middle
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

        def look(progress: StageProgress) -> None:
            if (
                progress.stage == ("cleaning" if pass_ == "judged" else "tokenizing")
                and progress.read == progress.total
            ):
                seen.update({name: ((work / name).stat().st_ino, (work / name).stat().st_mtime_ns) for name in kept})

        prepare_here(data, long.jsonl, look)
        assert seen == kept
        assert contents(data) == long.prepared

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 75), (signal.SIGTERM, -signal.SIGTERM)])
    def test_after_a_signal_the_same_command_continues(
        self, tmp_path: Path, long: Text, number: signal.Signals, code: int
    ) -> None:
        data = tmp_path / "data"
        with preparing(data, long.jsonl) as process:
            wait_until(lambda: len(finished(data)) >= 5)
            workers = children(process.pid)
            if number == signal.SIGINT:  # a terminal sends it to all processes
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            answer, said = end_of(process)
            wait_until(lambda: not any(is_alive(pid) for pid in workers))
        assert answer == code
        assert "Traceback" not in said
        if number == signal.SIGINT:
            assert "stopped; finished work is kept, and the same command resumes from there" in said
        assert len(finished(data)) < long.chunks
        assert not looks_prepared(data)
        prepare_here(data, long.jsonl)
        assert contents(data) == long.prepared

    def test_a_killed_worker_is_reported(self, tmp_path: Path, long: Text) -> None:
        data = tmp_path / "data"
        with preparing(data, long.jsonl) as process:
            wait_until(lambda: len(finished(data)) >= 5)
            workers = [pid for pid in children(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
            os.kill(workers[0], signal.SIGKILL)
            answer, said = end_of(process)
            assert not any(is_alive(pid) for pid in workers)
        assert answer == 2
        assert re.search(
            r"error: a worker process died while words-\d{5}.* lower data\.workers or data\.shard_tokens", said
        )
        assert not looks_prepared(data)
        prepare_here(data, long.jsonl)
        assert contents(data) == long.prepared

    def test_two_processes_do_not_prepare_into_one_folder(self, tmp_path: Path, long: Text) -> None:
        data = tmp_path / "data"
        with preparing(data, long.jsonl) as process:
            wait_until(lambda: len(finished(data, "judged")) >= 1)
            with pytest.raises(
                DataError, match=rf"data\.path={data} is being prepared by another process; wait for it, or set another"
            ):
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
        if target.parent != data:  # not one of the renames of the commit
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


def test_after_a_kill_during_the_commit_there_is_no_data_until_the_next_attempt(tmp_path: Path, short: Text) -> None:
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


class TestFailure:
    """Something inside of the preparation fails."""

    def test_a_document_that_cannot_be_encoded_is_reported(self, tmp_path: Path) -> None:
        words = {"<|endoftext|>": 0, "one": 1, "two": 2}
        model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}  # the vocabulary does not have it
        (tmp_path / "tokenizer.json").write_text(
            json.dumps(make_tokenizer_config({"<|endoftext|>": 0}, model, pre_tokenizer={"type": "Whitespace"}))
        )
        lines = [json.dumps({"text": "one two " * 100, "id": f"page {i}"}) for i in range(40)]
        lines[31] = json.dumps({"text": "one three two", "id": "page 31"})
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        sources = [{"kind": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "id_field": "id"}]
        settings = {
            "sources": sources,
            "tokenizer": str(tmp_path / "tokenizer.json"),
            "filters": {},
            "dedup": {},
            "allow_lossy_tokenizer": True,
        }
        with preparing(tmp_path / "data", tmp_path, **settings) as process:
            wait_until(lambda: len(children(process.pid)) >= 2 or process.poll() is not None)
            workers = children(process.pid)
            answer, said = end_of(process)
            wait_until(lambda: not any(is_alive(pid) for pid in workers))
        assert answer == 2
        assert "error: document page 31 of source x cannot be encoded (WordLevel error: " in said
        assert "Traceback" not in said
        assert not looks_prepared(tmp_path / "data")

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_full_disk_is_reported_and_the_same_command_continues_when_there_is_room(
        self, small_disk: tuple[Path, Callable[[], None]], short: Text, workers: int
    ) -> None:
        disk, make_room = small_disk
        data = disk / "data"
        message = rf"data\.path={data} cannot be prepared: .*(No space left|File too large).* run the command again"
        with pytest.raises(DataError, match=message):
            prepare_here(data, short.jsonl, workers=workers)
        assert not looks_prepared(data)
        assert len(finished(data, "judged")) + len(finished(data)) > 0
        make_room()
        prepare_here(data, short.jsonl)
        assert contents(data) == short.prepared


@pytest.fixture(params=["tmpfs", "limit"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Return (a folder without room for large files, a function that makes room).

    Either a small file system, or a limit on the size of files.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    mount = ["mount", "-t", "tmpfs", "-o"]
    mounted = False
    if request.param == "tmpfs":  # only root may mount it
        mounted = (
            subprocess.run([*mount, "size=200k", "tmpfs", tmp_path], capture_output=True, check=False).returncode == 0
        )
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    def make_room() -> None:
        if mounted:
            subprocess.run([*mount, "remount,size=100m", "tmpfs", tmp_path], check=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        yield tmp_path, make_room
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(["umount", tmp_path], check=True)


def test_a_document_of_200_mb_is_prepared_in_3_gb(tmp_path: Path, short: Text) -> None:
    (tmp_path / "tokenizer.json").write_bytes(short.prepared["tokenizer.json"])
    text = "".join(json.loads(line)["text"] + "\n" for line in short.jsonl.read_text().splitlines())
    text *= 200_000_000 // len(text) + 1
    (tmp_path / "big.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "a small one"}))
    settings = {
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "validation_fraction": 0,
        "workers": 1,
        "shard_tokens": 10**8,
        "dedup": {"exact": True},
    }
    with preparing(tmp_path / "data", tmp_path / "big.jsonl", **settings) as process:
        _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_maxrss < 3_000_000  # kB
    made = open_prepared(tmp_path / "data").splits["train"].sources[0]
    assert (made.documents, made.text_bytes, made.dropped) == (1, len(text), {"length: too short": 1})
    assert verify(tmp_path / "data").problems == ()
