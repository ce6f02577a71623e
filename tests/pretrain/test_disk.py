"""A disk without space: a warning before the run, and one line that says what is safe when the disk fills up."""

import errno
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import StorageError
from pretrain.checkpoint.directory import checkpoint_path, partial_path
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.errors import UserError
from pretrain.runs.jsonl import RecordFile, read_events, read_metrics
from pretrain.runs.schema import Event
from pretrain.train.disk_space import check_disk_space, checkpoint_bytes, free_bytes
from pretrain.train.loop import Outcome

Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py
RunTiny = Callable[..., Outcome]
TinyArgs = Callable[..., list[str]]


@contextmanager
def files_up_to(n_bytes: int) -> Iterator[None]:
    """A limit on the size of files, which a write meets like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def disk_of(monkeypatch: pytest.MonkeyPatch, free: int, blocks: int = 10**9) -> None:
    monkeypatch.setattr(
        os, "statvfs", lambda path: SimpleNamespace(f_bavail=free // 512, f_frsize=512, f_blocks=blocks)
    )


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    sizes = "n_layers: 12, d_model: 768, n_heads: 12, n_kv_heads: 12, d_ff: 2048, vocab_size: 32768"
    model = f"model={{{sizes}, tie_embeddings: true}}"
    args = ["train.micro_batch_size=4", "train.precision=bf16", "train.recompute=none"]
    return load(None, [model, *args, f"run.dir={tmp_path / 'run'}", "checkpoint.keep=3"]).config


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(
    tmp_path: Path, run_tiny: RunTiny, tiny_args: TinyArgs, kind: str
) -> None:
    args = ("train.steps=1", "optim.warmup=0", "model.d_model=128", "model.d_ff=256", f"optim.kind={kind}")
    run_tiny(tmp_path, *args)
    size = sum(file.stat().st_size for file in checkpoint_path(tmp_path / "checkpoints", 1).iterdir())
    message = checkpoint_bytes(load(tmp_path / "config.yaml").config)
    assert message == pytest.approx(size, rel=0.03)


def test_parameters_of_a_checkpoint_count_12_bytes_with_adamw(config: RunConfig) -> None:
    parameters = 32768 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768  # the tied embedding once
    assert checkpoint_bytes(config) == 12 * parameters + 4 * 2048 * (2 + 12 * 9)


def test_a_run_whose_first_checkpoint_does_not_fit_is_refused(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = checkpoint_bytes(config)
    assert size // 10**8 == 13
    disk_of(monkeypatch, 1_299_000_000)
    message = rf"run.dir={config.run.dir}: a checkpoint takes 1\.3 GB, and 1\.2 GB are free there: make room"
    with pytest.raises(UserError, match=message):
        check_disk_space(config)
    assert not config.run.dir.exists()


def test_a_run_whose_last_checkpoints_do_not_fit_is_warned(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    size = checkpoint_bytes(config)
    disk_of(monkeypatch, 4 * size + 512)
    assert check_disk_space(config) == ""
    disk_of(monkeypatch, 4 * size - 512)
    message = (
        r"checkpoint\.keep=3 will need 5\.2 GB more \(4 checkpoints of 1\.3 GB; .*5\.2 GB are free .* lower "
        r"checkpoint\.keep"
    )
    assert re.match(message, check_disk_space(config))
    for step in (1, 2, 3, 4):  # those that are there already take no more
        checkpoint_path(config.run.dir / "checkpoints", step).mkdir(parents=True)
    disk_of(monkeypatch, size + 512)
    assert check_disk_space(config) == ""
    disk_of(monkeypatch, size - 1024)
    (checkpoint_path(config.run.dir / "checkpoints", 1) / "file").write_bytes(bytes(2048))
    assert check_disk_space(config) == ""  # the fourth goes when the run goes on


def test_unfinished_checkpoints_count_as_free_space_and_are_deleted_on_resume(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_tiny: RunTiny
) -> None:
    size = checkpoint_bytes(config)
    disk_of(monkeypatch, size - 1024)
    later = partial_path(config.run.dir / "checkpoints", 60, "1a2b3c4d")
    damaged = partial_path(config.run.dir / "checkpoints", 60, "damaged-1a2b3c4d")
    for folder, held in ((damaged, 2048), (later, 0)):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(held))
    with pytest.raises(UserError, match="a checkpoint takes"):
        check_disk_space(config)  # what was set aside stays
    (later / "file").write_bytes(bytes(2048))
    assert "checkpoint.keep=3 will need" in check_disk_space(config)
    monkeypatch.undo()

    args = ("train.steps=2", "optim.warmup=0", "checkpoint.every=1", "checkpoint.keep=1")
    run_tiny(tmp_path / "tiny", *args)
    checkpoints = tmp_path / "tiny" / "checkpoints"
    shutil.copytree(damaged, checkpoints / damaged.name)
    for step in (1, 60):  # before and after the newest one
        shutil.copytree(later, partial_path(checkpoints, step, "1a2b3c4d"))
    run_tiny(tmp_path / "tiny", *args)
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000002", damaged.name}


def a_file(checkpoints: Path) -> str:
    checkpoints.write_text("")
    return "Not a directory"


def a_dangling_link(checkpoints: Path) -> str:
    checkpoints.symlink_to("/not/mounted")
    return "a link to /not/mounted, which does not exist"


@pytest.mark.parametrize("make", [a_file, a_dangling_link])
def test_unwritable_checkpoints_are_reported_before_training(
    tmp_path: Path, pretrain: Pretrain, tiny_args: TinyArgs, run_tiny: RunTiny, make: Callable[[Path], str]
) -> None:
    args, checkpoints = ("train.steps=2", "optim.warmup=0"), tmp_path / "run" / "checkpoints"
    run_tiny(tmp_path / "whole", *args)
    checkpoints.parent.mkdir()
    shutil.copy(
        tmp_path / "whole" / "config.yaml", checkpoints.parent
    )  # a run that was killed before its first checkpoint
    (checkpoints.parent / "config.yaml").write_text(
        (checkpoints.parent / "config.yaml").read_text().replace(str(tmp_path / "whole"), str(tmp_path / "run"))
    )
    reason = make(checkpoints)
    answer = pretrain("train", *tiny_args(tmp_path / "run", *args))
    message = (
        f"error: {checkpoints} cannot hold checkpoints ({reason}), and nothing was trained: make it a folder that "
        f"can be written ("
    )
    assert (answer.code, answer.err.splitlines()[-1][: len(message)]) == (2, message)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    checkpoints.unlink()
    assert run_tiny(tmp_path / "run", *args) is Outcome.FINISHED


def test_a_read_only_mount_refuses_a_run_that_would_save_and_not_a_finished_one(
    tmp_path: Path, pretrain: Pretrain, tiny_args: TinyArgs, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, checkpoints = ("optim.warmup=0", "optim.schedule=constant"), tmp_path / "checkpoints"
    run_tiny(tmp_path, *args, "train.steps=2")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    mkdir = Path.mkdir

    def refuse(self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if self.parent == checkpoints:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        mkdir(self, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", refuse)
    answer = pretrain("train", *tiny_args(tmp_path, *args, "train.steps=4"))
    assert (
        answer.code,
        f"error: {checkpoints} cannot hold checkpoints (Read-only file system), and" in answer.err,
    ) == (2, True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    answer = pretrain("train", *tiny_args(tmp_path, *args, "train.steps=2"))
    assert (answer.code, "is finished: all 2 steps are done" in answer.out) == (0, True)
    monkeypatch.undo()
    assert run_tiny(tmp_path, *args, "train.steps=4") is Outcome.FINISHED
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-00000002", "step-00000004"]


def test_a_file_system_without_sizes_is_not_checked(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert free_bytes(tmp_path / "not" / "there") == free_bytes(tmp_path)
    disk_of(monkeypatch, 0, blocks=0)
    assert check_disk_space(config) == ""


def test_a_finished_run_is_not_asked_for_room(
    tmp_path: Path, run_tiny: RunTiny, pretrain: Pretrain, tiny_args: TinyArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tiny(tmp_path, "train.steps=2", "optim.warmup=0")
    disk_of(monkeypatch, 0)
    answer = pretrain("train", *tiny_args(tmp_path, "train.steps=2", "optim.warmup=0"))
    assert (answer.code, "is finished: all 2 steps are done" in answer.out) == (0, True)
    answer = pretrain("train", *tiny_args(tmp_path / "other", "train.steps=2", "optim.warmup=0"))
    assert (answer.code, "a checkpoint takes" in answer.err) == (2, True)
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_run_resumes_with_more_space(
    tmp_path: Path, run_tiny: RunTiny, pretrain: Pretrain, tiny_args: TinyArgs
) -> None:
    args = ("train.steps=8", "checkpoint.every=4")
    with files_up_to(100_000):  # records fit, checkpoints do not
        answer = pretrain("train", *tiny_args(tmp_path, *args))
    path = checkpoint_path(tmp_path / "checkpoints", 4)
    message = (
        rf"error: {path} cannot be written \(File too large\): it takes 640,896 bytes, and .* are free\. There is no "
        rf"checkpoint yet: "
    )
    assert answer.code == 1
    assert re.match(message, answer.err.splitlines()[-1])
    assert "Traceback" not in answer.err
    assert list((tmp_path / "checkpoints").iterdir()) == []

    assert run_tiny(tmp_path, *args) is Outcome.FINISHED
    (checkpoint_path(tmp_path / "checkpoints", 8)).rename(tmp_path / "away")
    with files_up_to(100_000):
        answer = pretrain("train", *tiny_args(tmp_path, *args, "checkpoint.on_invalid=go_back"))
    assert answer.code == 1
    assert "The same command resumes from step-00000004: make room or make it writable first" in answer.err
    assert [record.step for record in read_metrics(tmp_path / "metrics.jsonl").steps] == list(range(1, 9))


def test_records_that_cannot_be_written_end_the_run_in_one_line(
    tmp_path: Path, pretrain: Pretrain, tiny_args: TinyArgs
) -> None:
    with files_up_to(9_000):  # the settings fit, the records of 40 steps do not
        answer = pretrain("train", *tiny_args(tmp_path, "checkpoint.every=1000"))
    assert answer.code == 1
    message = f"error: {tmp_path}/metrics.jsonl cannot be written (File too large): make room or make it writable"
    assert answer.err.splitlines()[-1].startswith(message)
    assert "Traceback" not in answer.err
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert content.endswith(b"\n")  # no torn line
    assert [record.step for record in read_metrics(tmp_path / "metrics.jsonl").steps][:3] == [1, 2, 3]


def test_a_record_that_did_not_fit_leaves_no_part_of_itself(tmp_path: Path) -> None:
    event = Event(time=0, kind="save", step=1, text="x" * 100)
    with RecordFile(tmp_path / "events.jsonl") as file:
        file.append(event)
        with (
            files_up_to(len(event.line()) + 50),
            pytest.raises(StorageError, match=r"events\.jsonl cannot be written \(File too large\)"),
        ):
            file.append(event)
        file.append(event)
    assert (tmp_path / "events.jsonl").read_text() == 2 * event.line()
    assert len(read_events(tmp_path / "events.jsonl")) == 2


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.ESTALE, 1)])
def test_a_failing_disk_that_nobody_expected_is_one_line_too(
    tmp_path: Path, pretrain: Pretrain, tiny_args: TinyArgs, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/far/away")

    monkeypatch.setattr("pretrain.train.run.save_tokenizer", fail)
    answer = pretrain("train", *tiny_args(tmp_path, "train.steps=1", "optim.warmup=0"))
    assert answer.code == code
    assert answer.err.splitlines()[-1].startswith(
        f"error: [Errno {number}] {os.strerror(number)}: '/far/away'; check the disk"
    )
    assert "Traceback" not in answer.err
