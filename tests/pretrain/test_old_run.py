"""A run of 27 November 2026, made before modules and settings were renamed, still loads and resumes with equal numbers.

`fixtures/run_of_november_2026` holds its prepared data, its run directory at step 4 of 8, and the records that the
program of that day wrote for steps 5 to 8: Muon, a WSD schedule, longer sequences from step 7 on, all settings written
out.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FIXTURE = Path(__file__).parent / "fixtures" / "run_of_november_2026"
NUMBERS = ("samples", "tokens", "loss", "lr", "grad_norm", "val_loss", "val_tokens")


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in the working directory: the run names its data and itself by relative paths."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def numbers(records: list[str]) -> list[dict[str, float]]:
    """The numbers of the run itself, without clocks."""
    return [{key: value for key, value in json.loads(line).items() if key in NUMBERS} for line in records]


def test_an_old_run_goes_on_with_the_numbers_it_had(old_run: Path, pretrain: Callable[..., Any]) -> None:
    before = (old_run / "run/metrics.jsonl").read_text().splitlines()
    assert pretrain("train", "run/config.yaml").code == 0
    records = (old_run / "run/metrics.jsonl").read_text().splitlines()
    assert records[: len(before)] == before
    expected = numbers((old_run / "expected.jsonl").read_text().splitlines())
    assert len(expected) == 5
    # All digits on the machine that made the fixture; another CPU may round a sum otherwise.
    assert numbers(records[len(before) :]) == [pytest.approx(record, rel=1e-6) for record in expected]
    losses = [record["loss"] for record in expected if "loss" in record]
    assert max(losses) / min(losses) > 1 + 1e-3  # steps differ by far more than the tolerance


def test_an_old_run_goes_on_without_a_change_of_settings(old_run: Path, pretrain: Callable[..., Any]) -> None:
    """Its config.yaml and the manifest of its checkpoint have settings under their old names."""
    config = (old_run / "run/config.yaml").read_text()
    manifest = (old_run / "run/checkpoints/step-00000004/manifest.json").read_text()
    for old in ("growth", "clip", "on_loss"):
        assert f"  {old}:" in config
        assert f'"{old}": ' in manifest
    answer = pretrain("train", "run/config.yaml")
    assert (answer.code, answer.err) == (0, "")
    events = [json.loads(line)["kind"] for line in (old_run / "run/events.jsonl").read_text().splitlines()]
    assert "resume" in events
    assert "settings" not in events
    assert (old_run / "run/config.yaml").read_text() == config


def test_a_changed_setting_of_an_old_run_is_reported_under_its_new_name(
    old_run: Path, pretrain: Callable[..., Any]
) -> None:
    assert pretrain("train", "run/config.yaml", "checkpoint.on_invalid=go_back").code == 0
    events = [json.loads(line) for line in (old_run / "run/events.jsonl").read_text().splitlines()]
    (change,) = (event["text"] for event in events if event["kind"] == "settings")
    assert change == "checkpoint.on_invalid: stop in the run, go_back now"
    answer = pretrain("train", "run/config.yaml", "optim.clip=2")
    assert answer.code == 2
    assert "optim.max_grad_norm: 1.0 in the run, 2.0 now" in answer.err


def test_a_run_begins_from_an_old_run(old_run: Path, pretrain: Callable[..., Any]) -> None:
    args = ("run/config.yaml", "run.dir=branch", "run.init_mode=full")
    for parent in ("run@4", "run/checkpoints/step-00000004"):
        answer = pretrain("train", *args, f"run.init_from={parent}", f"run.dir={Path(parent).name}-branch")
        assert (answer.code, answer.err) == (0, "")
        records = (old_run / f"{Path(parent).name}-branch/metrics.jsonl").read_text().splitlines()
        expected = numbers((old_run / "expected.jsonl").read_text().splitlines())
        assert numbers(records[-len(expected) :]) == [pytest.approx(record, rel=1e-6) for record in expected]


def test_the_old_checkpoint_is_what_the_run_goes_on_from(old_run: Path, pretrain: Callable[..., Any]) -> None:
    """Control: from step 0 the same settings give other numbers for steps 5 to 8."""
    assert pretrain("train", "run/config.yaml", "run.dir=fresh", "run.seed=4").code == 0
    fresh = numbers((old_run / "fresh/metrics.jsonl").read_text().splitlines())[-5:]
    expected = numbers((old_run / "expected.jsonl").read_text().splitlines())
    assert fresh != [pytest.approx(record, rel=1e-6) for record in expected]


def test_old_data_and_an_old_run_are_read_by_every_command(old_run: Path, pretrain: Callable[..., Any]) -> None:
    for args in (["data", "verify", "data"], ["report", "run"], ["generate", "run", "the "]):
        answer = pretrain(*args)
        assert answer.code == 0, answer
