"""Training on data that is damaged or not its own: it stops and names the place, or goes on without it and says so."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.prepare import prepare
from data_pipeline.reading.loader import Loader
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.shards import open_split
from data_pipeline.tokenizing.tokenizer import load_tokenizer
from pretrain.runs.jsonl import read_events, read_metrics

Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py
TinyArgs = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """report.html has its own tests and costs most of the time of a tiny run."""
    monkeypatch.setattr("pretrain.train.run.write_report", lambda _: None)


@pytest.fixture
def damaged(tiny_data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(a copy of the tiny data with a flipped bit in its second training shard, that shard)."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    shards = open_split(data / "train").manifest.sources[0].shards
    assert len(shards) >= 3
    file = data / "train" / f"{shards[1].name}.bin"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    return data, file


def test_a_flipped_bit_stops_training_and_is_named(
    damaged: tuple[Path, Path], tmp_path: Path, pretrain: Pretrain, tiny_args: TinyArgs
) -> None:
    data, file = damaged
    answer = pretrain("train", *tiny_args(tmp_path / "run", f"data.path={data}", "train.steps=200"))
    assert answer.code == 2
    assert (
        f"error: {file} is damaged: block 0 of 1 (1 MiB from byte 0) does not match its checksum; restore it"
        in answer.err
    )
    assert "Traceback" not in answer.err


def test_skipping_damage_records_it_once_and_trains_on_all_other_sequences(
    damaged: tuple[Path, Path], tiny_data: Path, tmp_path: Path, pretrain: Pretrain, tiny_args: TinyArgs
) -> None:
    data, file = damaged
    steps = 60
    args = (
        f"data.path={data}",
        f"train.steps={steps}",
        "data.on_damage=skip",
        "run.seed=5",
        "eval.every=60",
        "checkpoint.every=60",
    )
    assert pretrain("train", *tiny_args(tmp_path / "run", *args)).code == 0
    loader = Loader(data / "train", seq_len=32, seed=5, on_damage="skip")
    lost = [step for step in range(1, steps + 1) for _ in loader.batch(4 * (step - 1), 4).damaged]
    assert len(lost) > 10
    skipped = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event.kind == "skip_data"]
    assert [event.step for event in skipped] == [lost[0]]
    assert f"{file} is damaged: block 0 of 1" in skipped[0].text
    damaged_run = read_metrics(tmp_path / "run" / "metrics.jsonl").steps
    assert [record.step for record in damaged_run] == list(range(1, steps + 1))
    assert damaged_run[-1].loss < damaged_run[0].loss - 1

    args = (f"data.path={tiny_data}", *args[1:])
    assert pretrain("train", *tiny_args(tmp_path / "whole", *args)).code == 0
    whole_run = read_metrics(tmp_path / "whole" / "metrics.jsonl").steps
    assert not [event for event in read_events(tmp_path / "whole" / "events.jsonl") if event.kind == "skip_data"]
    same = [ours.loss == theirs.loss for ours, theirs in zip(damaged_run, whole_run, strict=True)]
    assert same.index(False) == lost[0] - 1


def test_a_missing_or_truncated_shard_is_reported_before_a_run_starts(
    damaged: tuple[Path, Path], tmp_path: Path, pretrain: Pretrain, tiny_args: TinyArgs
) -> None:
    data, file = damaged
    args = tiny_args(tmp_path / "run", f"data.path={data}", "data.on_damage=skip")
    file.write_bytes(file.read_bytes()[:-2])
    answer = pretrain("train", *args)
    assert (answer.code, f"{file} has" in answer.err) == (2, True)
    file.unlink()
    answer = pretrain("train", *args)
    assert (answer.code, f"{file} is missing" in answer.err) == (2, True)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_did_not_make_the_data_is_refused(
    tiny_data: Path, tiny_text: Path, tmp_path: Path, pretrain: Pretrain, tiny_args: TinyArgs
) -> None:
    source = SourceConfig(kind="text", paths=(str(tiny_text),))
    other = tmp_path / "other"
    prepare(
        other, PrepareConfig(sources=(source,), vocab_size=290, tokenizer_sample_mb=1, shard_tokens=4000, workers=1)
    )
    theirs, ours = load_tokenizer(other).fingerprint, load_tokenizer(tiny_data).fingerprint
    assert theirs != ours
    answer = pretrain("train", *tiny_args(tmp_path / "run", f"data.tokenizer={other / 'tokenizer.json'}"))
    assert answer.code == 2
    assert f"({theirs}) is not the tokenizer that made data.path={tiny_data} ({ours})" in answer.err

    swapped = shutil.copytree(tiny_data, tmp_path / "swapped")
    shutil.copy(other / "tokenizer.json", swapped / "tokenizer.json")
    answer = pretrain("train", *tiny_args(tmp_path / "run", f"data.path={swapped}"))
    assert answer.code == 2
    assert f"({theirs}) is not the tokenizer that made data.path={swapped} ({ours})" in answer.err
    assert not (tmp_path / "run").exists()
