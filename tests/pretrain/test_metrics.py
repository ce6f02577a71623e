"""The run's books: what is written is what is read, after a crash too; and the clock behind tokens/s."""

import json
import math
from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.estimate.hardware import find_accelerator
from pretrain.runs.jsonl import RecordFile, read_events, read_metrics, truncate_after
from pretrain.runs.schema import Event, RunRecord, StepRecord, ValidationRecord
from pretrain.runs.throughput import ThroughputMeter, mfu_statement


def step_record(step: int, loss: float = 2.5, attempt: int = 1) -> StepRecord:
    return StepRecord(
        step=step, samples=8 * step, tokens=4096 * step, loss=loss, lr=3e-4, grad_norm=1.25,
        tokens_per_s=10_000.0, step_s=0.4096, time=1e9 + step, attempt=attempt,
    )  # fmt: skip


def validation_record(step: int, loss: float = 2.0) -> ValidationRecord:
    return ValidationRecord(step=step, val_loss=loss, val_tokens=4096, time=1e9 + step)


def write(path: Path, *records: RunRecord) -> None:
    with RecordFile(path) as file:
        for record in records:
            file.append(record)


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# Records


def test_every_float_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    losses = [math.pi, 1 / 3, 5e-324, 1.7976931348623157e308, 0.1 + 0.2]
    write(tmp_path / "metrics.jsonl", *(step_record(i, loss) for i, loss in enumerate(losses, 1)))
    assert [record.loss for record in read_metrics(tmp_path / "metrics.jsonl").steps] == losses


def test_a_line_holds_the_named_fields_and_leaves_out_what_is_unknown() -> None:
    written = json.loads(step_record(3).line())
    assert set(written) == {
        "step",
        "samples",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "step_s",
        "time",
        "attempt",
    }
    assert set(json.loads(step_record(3).model_copy(update={"mfu": 0.4, "z_loss": 1e-3}).line())) == {
        *written,
        "mfu",
        "z_loss",
    }
    assert json.loads(validation_record(3).line())["val_perplexity"] == math.exp(2.0)


def test_numbers_that_are_not_finite_are_null_on_disk_and_nan_when_read(tmp_path: Path) -> None:
    write(tmp_path / "m", step_record(1, math.nan), step_record(2, math.inf), validation_record(2, 1e4))
    raw = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "m").read_text().splitlines()]
    assert (raw[0]["loss"], raw[1]["loss"], raw[2]["val_perplexity"]) == (None, None, None)
    assert all(math.isnan(record.loss) for record in read_metrics(tmp_path / "m").steps)


def test_an_event_keeps_its_text_as_it_is(tmp_path: Path) -> None:
    event = Event(time=1e9, step=7, kind="sample", text='line\nbreak "quoted" </script> ü', prompt="def ")
    write(tmp_path / "events.jsonl", event)
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 1
    assert read_events(tmp_path / "events.jsonl") == [event]


def test_a_record_is_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    with RecordFile(tmp_path / "m") as file:
        file.append(step_record(1))
        assert len(read_metrics(tmp_path / "m").steps) == 1


def test_a_half_written_last_line_is_neither_read_nor_built_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, step_record(1), step_record(2))
    with path.open("a") as file:
        file.write(step_record(3).line()[:40])
    assert [record.step for record in read_metrics(path).steps] == [1, 2]
    write(path, step_record(3))
    assert [record.step for record in read_metrics(path).steps] == [1, 2, 3]


def test_a_damaged_line_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(step_record(1).line() + '{"step": 2, "loss": \n' + step_record(3).line())
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a record"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a record"):
        truncate_after(path, 1)


def test_a_step_recorded_twice_counts_once_and_the_last_record_wins(tmp_path: Path) -> None:
    write(
        tmp_path / "m",
        validation_record(0, 9.0),
        step_record(1, 5.0),
        validation_record(0, 8.0),
        step_record(1, 4.0, attempt=2),
    )
    metrics = read_metrics(tmp_path / "m")
    assert [(r.step, r.loss, r.attempt) for r in metrics.steps] == [(1, 4.0, 2)]
    assert [(r.step, r.val_loss) for r in metrics.validations] == [(0, 8.0)]


def test_no_file_is_an_empty_book(tmp_path: Path) -> None:
    truncate_after(tmp_path / "m", 3)
    assert read_metrics(tmp_path / "m").steps == []
    assert read_events(tmp_path / "e") == []
    assert list(tmp_path.iterdir()) == []


# Resuming


def test_a_resumed_run_records_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, validation_record(0), *(step_record(s) for s in range(1, 31)), validation_record(25))
    truncate_after(path, 20)
    write(path, *(step_record(s, attempt=2) for s in range(21, 26)))
    metrics = read_metrics(path)
    assert [record.step for record in metrics.steps] == list(range(1, 26))
    assert [record.attempt for record in metrics.steps] == [1] * 20 + [2] * 5
    assert [record.step for record in metrics.validations] == [0]


def test_without_the_cut_stale_steps_would_remain(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(step_record(s) for s in range(1, 31)))
    write(path, *(step_record(s, attempt=2) for s in range(21, 26)))
    assert [record.step for record in read_metrics(path).steps] == list(range(1, 31))


def test_a_crash_while_cutting_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(step_record(s) for s in range(1, 11)))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk gone"):
        truncate_after(path, 5)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# The meter


def test_tokens_per_second_and_mfu_are_those_of_the_step() -> None:
    clock = FakeClock()
    meter = ThroughputMeter(total_tokens=100_000, peak_flops=100e12, clock=clock)
    clock.now += 2.0
    speed = meter.step(10_000, 6e9)
    assert (speed.step_s, speed.tokens_per_s) == (2.0, 5000.0)
    assert speed.mfu == pytest.approx(5000 * 6e9 / 100e12)


def test_an_unknown_peak_shows_no_mfu() -> None:
    clock = FakeClock()
    meter = ThroughputMeter(total_tokens=100, peak_flops=None, clock=clock)
    for _ in range(2):
        clock.now += 1.0
        assert meter.step(10, 6e9).mfu is None
    average = meter.average()
    assert average is not None
    assert average.mfu is None


def test_evaluation_and_saving_belong_to_no_step() -> None:
    clock = FakeClock()
    meter = ThroughputMeter(total_tokens=1000, peak_flops=None, clock=clock)
    clock.now += 1.0
    meter.step(100, 1.0)
    with meter.paused():
        clock.now += 500.0
    clock.now += 1.0
    assert meter.step(100, 1.0).step_s == 1.0


def test_the_time_left_ignores_the_first_step_and_follows_the_tokens() -> None:
    clock = FakeClock()
    meter = ThroughputMeter(total_tokens=1000, peak_flops=None, clock=clock)
    clock.now += 300.0  # compiling
    meter.step(100, 1.0)
    assert meter.average() is None
    clock.now += 2.0
    meter.step(100, 1.0)
    clock.now += 2.0
    meter.step(200, 1.0)  # a growing batch: what counts is the tokens that are left, not the steps
    average = meter.average()
    assert average is not None
    assert average.tokens_per_s == 75.0
    assert average.seconds_left == 600 / 75.0


def test_a_resumed_run_has_only_the_rest_before_it() -> None:
    clock = FakeClock()
    meter = ThroughputMeter(total_tokens=1000, tokens_done=700, peak_flops=None, clock=clock)
    for _ in range(2):
        clock.now += 1.0
        meter.step(100, 1.0)
    average = meter.average()
    assert average is not None
    assert average.seconds_left == 1.0


def test_the_pace_forgets_steps_outside_its_window() -> None:
    clock = FakeClock()
    meter = ThroughputMeter(total_tokens=10_000, peak_flops=None, window=2, clock=clock)
    for seconds in (1.0, 50.0, 1.0, 1.0):
        clock.now += seconds
        meter.step(100, 1.0)
    average = meter.average()
    assert average is not None
    assert average.tokens_per_s == 100.0


def test_the_mfu_statement_names_convention_and_peak() -> None:
    statement = mfu_statement(8.05e8, "NVIDIA H100 80GB HBM3", find_accelerator("NVIDIA H100 80GB HBM3"))
    assert statement == (
        "MFU counts 0.805 GFLOP a token (6 N_matmul + causal attention, forward and backward, no recomputation) "
        "against 989 TFLOP/s (H100 SXM, dense bf16)"
    )
    assert mfu_statement(8.05e8, "NVIDIA H100 80GB HBM3", find_accelerator("NVIDIA H100 80GB HBM3"), 16).endswith(
        "against 16 x 989 TFLOP/s (H100 SXM, dense bf16)"
    )
    assert (
        mfu_statement(8.05e8, "NVIDIA H800", None)
        == "No MFU: the peak of NVIDIA H800 at this precision is not known for certain"
    )
