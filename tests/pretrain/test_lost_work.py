"""Checkpoints or records are missing, renamed, unreadable or beside stray files: a run says so, and loses nothing."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pretrain.checkpoint.directory import checkpoint_path
from pretrain.errors import UserError
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.runs.schema import Event, StepRecord, ValidationRecord
from pretrain.train.loop import Outcome
from pretrain.train.resume_checks import check_records, saved_steps

Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py
RunTiny = Callable[..., Outcome]
TinyArgs = Callable[..., list[str]]
ARGS = ("checkpoint.every=10", "eval.every=40")
GO_BACK = "checkpoint.on_invalid=go_back"


class StopAt:
    """Asks the run to stop when it hears of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, record: StepRecord | ValidationRecord) -> None:
        if isinstance(record, StepRecord) and record.step == self.step:
            signal.raise_signal(signal.SIGTERM)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.run.write_report", lambda path: path)
        yield


@pytest.fixture(scope="module")
def stopped_once(run_tiny: RunTiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """(a run that was stopped after 30 of 40 steps, the losses of one that was not)."""
    folder = tmp_path_factory.mktemp("stopped")
    assert run_tiny(folder / "run", *ARGS, observers=[StopAt(30)]) is Outcome.STOPPED
    assert run_tiny(folder / "whole", *ARGS) is Outcome.FINISHED
    return folder / "run", losses(folder / "whole")


@pytest.fixture
def stopped(stopped_once: tuple[Path, list[float]], tmp_path: Path) -> Path:
    """A copy of that run: checkpoints of steps 10, 20 and 30."""
    return shutil.copytree(stopped_once[0], tmp_path / "run")


@pytest.fixture
def undisturbed(stopped_once: tuple[Path, list[float]]) -> list[float]:
    return stopped_once[1]


@pytest.fixture
def refused(pretrain: Pretrain, tiny_args: TinyArgs) -> Callable[..., str]:
    """`refused(run_dir, code)`: the one line with which `pretrain train` refuses to go on, having changed nothing."""

    def run(run_dir: Path, code: int = 2) -> str:
        before = contents(run_dir)
        answer = pretrain("train", *tiny_args(run_dir, *ARGS))
        assert (answer.code, answer.err.count("\n")) == (code, 1), answer.err
        assert contents(run_dir) == before
        assert "delete " not in answer.err
        return str(answer.err)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def losses(run_dir: Path) -> list[float]:
    steps = read_metrics(run_dir / "metrics.jsonl").steps
    assert [record.step for record in steps] == list(range(1, len(steps) + 1))
    return [record.loss for record in steps]


def notices(run_dir: Path) -> list[str]:
    return [event.text for event in read_events(run_dir / "events.jsonl") if event.kind == "notice"]


def resumed_steps(run_dir: Path) -> list[int | None]:
    return [event.step for event in read_events(run_dir / "events.jsonl") if event.kind in {"start", "resume"}]


def test_unlisted_files_are_reported_and_the_run_resumes_from_that_checkpoint(
    stopped: Path, run_tiny: RunTiny, undisturbed: list[float]
) -> None:
    newest = checkpoint_path(stopped / "checkpoints", 30)
    (newest / ".DS_Store").touch()
    (newest / "mine").mkdir()
    console = Console(file=io.StringIO(), width=400)
    assert run_tiny(stopped, *ARGS, console=console) is Outcome.FINISHED
    message = "step-00000030 holds files that its manifest does not list; they are ignored: .DS_Store, mine"
    assert notices(stopped) == [message]
    assert f"notice at step 30: {message}" in console.file.getvalue()
    assert resumed_steps(stopped) == [0, 30]
    assert (newest / ".DS_Store").exists()
    assert losses(stopped) == undisturbed


def test_without_its_checkpoints_a_run_does_not_start_over_by_itself(
    stopped: Path, refused: Callable[..., str], run_tiny: RunTiny, undisturbed: list[float]
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    old = (stopped / "metrics.jsonl").read_bytes()
    message = refused(stopped)
    assert (
        f"{stopped}/checkpoints does not exist, but events.jsonl records that step 30 was saved. Put back what "
        f"is missing" in message
    )
    assert f"To train again from its beginning here, set {GO_BACK}" in message
    (stopped / "checkpoints").mkdir()
    assert f"{stopped}/checkpoints holds no checkpoint, but events.jsonl records that step 30" in refused(stopped)
    (stopped / "checkpoints").rmdir()
    (stopped / "checkpoints").symlink_to(stopped / "not mounted")
    assert (
        f"{stopped}/checkpoints is a link to a folder that does not exist, but events.jsonl records that step 30"
        in refused(stopped)
    )
    (stopped / "checkpoints").unlink()

    assert run_tiny(stopped, *ARGS, GO_BACK) is Outcome.FINISHED
    assert resumed_steps(stopped) == [0, 0]
    assert losses(stopped) == undisturbed
    assert (stopped / "metrics.before-attempt-2.jsonl").read_bytes() == old
    assert [event.step for event in read_events(stopped / "events.jsonl") if event.kind == "save"] == [
        10,
        20,
        30,
        10,
        20,
        30,
        40,
    ]
    assert GO_BACK in notices(stopped)[0]
    assert "step 30 was saved. By" in notices(stopped)[0]


def test_a_checkpoint_that_vanished_is_not_replaced_by_an_older_one_unasked(
    stopped: Path, refused: Callable[..., str], run_tiny: RunTiny, undisturbed: list[float]
) -> None:
    shutil.rmtree(checkpoint_path(stopped / "checkpoints", 30))
    message = refused(stopped)
    assert (
        "checkpoints has lost the checkpoint of step 30, which events.jsonl records; its latest valid one is of "
        "step 20." in message
    )
    assert f"To train again from step 20 here, set {GO_BACK}" in message
    assert run_tiny(stopped, *ARGS, GO_BACK) is Outcome.FINISHED
    assert resumed_steps(stopped) == [0, 20]
    assert losses(stopped) == undisturbed
    assert run_tiny(stopped, *ARGS) is Outcome.FINISHED  # what was accepted once is not asked again
    assert resumed_steps(stopped) == [0, 20]


def test_go_back_does_nothing_if_no_checkpoint_is_lost(stopped: Path, run_tiny: RunTiny) -> None:
    assert run_tiny(stopped, *ARGS, GO_BACK) is Outcome.FINISHED
    assert resumed_steps(stopped) == [0, 30]
    assert not list(stopped.glob("metrics.before-*"))


def test_without_a_valid_checkpoint_all_stay_and_starting_over_marks_them_damaged(
    stopped: Path, refused: Callable[..., str], run_tiny: RunTiny
) -> None:
    for step in (10, 20, 30):
        (checkpoint_path(stopped / "checkpoints", step) / "__0_0.distcp").write_bytes(b"damaged")
    message = refused(stopped)
    assert f"none of the 3 checkpoints in {stopped}/checkpoints is valid; the newest fails because" in message
    assert f"To train again from its beginning here, set {GO_BACK}" in message
    assert run_tiny(stopped, *ARGS, GO_BACK, observers=[StopAt(5)]) is Outcome.STOPPED
    names = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    assert names[0] == "step-00000005"
    assert [name[:25] for name in names[1:]] == [f"step-000000{step}.tmp-damaged" for step in (10, 20, 30)]


def test_a_checkpoint_that_cannot_be_read_for_a_moment_stops_the_run_and_stays_the_newest(
    stopped: Path,
    refused: Callable[..., str],
    run_tiny: RunTiny,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: list[float],
) -> None:
    file, digest = checkpoint_path(stopped / "checkpoints", 30) / "__0_0.distcp", hashlib.file_digest

    def fail(stream: Any, kind: Any) -> Any:
        if stream.name == str(file):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", fail)
    message = refused(stopped, code=1)
    monkeypatch.undo()
    assert message.startswith(
        f"error: {file} cannot be read (Input/output error); nothing is known to be damaged: check the disk or mount"
    )
    assert run_tiny(stopped, *ARGS) is Outcome.FINISHED
    assert resumed_steps(stopped) == [0, 30]
    assert losses(stopped) == undisturbed


def test_a_checkpoint_under_the_name_of_another_step_is_refused(stopped: Path, refused: Callable[..., str]) -> None:
    folder = stopped / "checkpoints"
    checkpoint_path(folder, 30).rename(checkpoint_path(folder, 45))
    message = refused(stopped)
    assert (
        f"{folder}/step-00000045 is named like the checkpoint of step 45, but its manifest.json says step 30; "
        f"rename it to" in message
    )


def test_missing_metrics_are_reported_once_and_no_step_is_trained_twice(
    stopped: Path, run_tiny: RunTiny, undisturbed: list[float]
) -> None:
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text(
        "".join(lines[:15]) + lines[15][:20]
    )  # a validation, 14 steps and a torn line
    assert run_tiny(stopped, *ARGS, observers=[StopAt(34)]) is Outcome.STOPPED
    assert run_tiny(stopped, *ARGS) is Outcome.FINISHED
    assert notices(stopped) == [
        "metrics.jsonl has no records of steps 15 to 30: curves have a gap there, but no step is trained twice"
    ]
    steps = read_metrics(stopped / "metrics.jsonl").steps
    assert [record.step for record in steps] == [*range(1, 15), *range(31, 41)]
    assert [record.loss for record in steps][14:] == undisturbed[30:]


def test_without_any_records_a_run_resumes_from_its_checkpoint_and_reports_the_loss(
    stopped: Path, run_tiny: RunTiny
) -> None:
    (stopped / "metrics.jsonl").unlink()
    (stopped / "events.jsonl").unlink()
    assert run_tiny(stopped, *ARGS) is Outcome.FINISHED
    assert notices(stopped) == [
        "metrics.jsonl has no records of steps 1 to 30: curves have a gap there, but no step is trained twice",
        "events.jsonl does not record how the run reached step 30: its earlier events are lost",
    ]
    assert resumed_steps(stopped) == [30]


def test_records_of_another_run_are_refused(stopped: Path, refused: Callable[..., str]) -> None:
    lines = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["samples"] = 240
    assert lines[-1]["step"] == 30
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = refused(stopped)
    assert (
        f"step-00000030 had read 120 sequences after step 30, and by {stopped}/metrics.jsonl it was 240: one of "
        f"them belongs to" in message
    )


def test_a_config_that_was_cut_off_is_one_line(stopped: Path, refused: Callable[..., str]) -> None:
    config = stopped / "config.yaml"
    whole = config.read_text()
    for text in (
        whole[: whole.index("\ntrain:\n") + 1],
        whole[: whole.index("log:\n")],
    ):  # both are YAML, of fewer settings
        config.write_text(text)
        assert f"{config} is cut short: it ends before its last section, log. Restore it" in refused(stopped)
    for size in range(0, len(whole) - 40, len(whole) // 7):
        config.write_text(whole[:size])
        assert f"{config} " in refused(stopped)


def events(*message: tuple[str, int]) -> list[Event]:
    return [Event(time=0, kind=kind, step=step, text="") for kind, step in message]


@pytest.mark.parametrize(
    ("message", "saved"),
    [
        ([], set()),
        ([("start", 0), ("save", 10), ("save", 20)], {10, 20}),
        ([("start", 0), ("save", 10), ("save", 20), ("resume", 10)], {10}),  # 20 was passed over, which was message
        ([("start", 0), ("save", 10), ("save", 20), ("resume", 10), ("save", 15)], {10, 15}),
        ([("start", 0), ("save", 10), ("stop", 10), ("start", 0)], set()),
    ],
)
def test_the_saves_that_count_are_those_not_gone_back_behind(message: list[tuple[str, int]], saved: set[int]) -> None:
    assert saved_steps(events(*message)) == saved


def test_a_run_that_was_killed_before_its_first_save_has_lost_nothing(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("".join(event.line() for event in events(("start", 0))))
    (tmp_path / "metrics.jsonl").write_text(step_line(1) + step_line(2))
    assert check_records(tmp_path, None, None).lost == ""
    (tmp_path / "events.jsonl").unlink()  # but without events nobody knows
    with pytest.raises(
        UserError,
        match=r"checkpoints does not exist and events\.jsonl records no start, but metrics\.jsonl has 2 steps",
    ):
        check_records(tmp_path, None, None)
    assert check_records(tmp_path, None, None, go_back=True).lost


def test_a_checkpoint_marked_as_damaged_is_not_lost(tmp_path: Path) -> None:
    """A crash between setting it aside and telling of the resume."""
    (tmp_path / "events.jsonl").write_text("".join(event.line() for event in events(("start", 0), ("save", 20))))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="records that step 20 was saved"):
        check_records(tmp_path, None, None)
    (tmp_path / "checkpoints" / "step-00000020.tmp-damaged-1a2b3c4d").mkdir()
    assert check_records(tmp_path, None, None).lost == ""


def step_line(step: int) -> str:
    return StepRecord(
        step=step, samples=step, tokens=step, loss=1, lr=1, grad_norm=1, tokens_per_s=1, step_s=1, time=0, attempt=1
    ).line()
