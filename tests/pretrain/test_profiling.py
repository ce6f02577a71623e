"""`train.profile`: a trace and a table of exactly the steps asked for, and the same run as without it."""

from __future__ import annotations

import gzip
import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.report.profile_tables import latest_profile
from pretrain.report.run_page import write_report
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.runs.profile import OperatorTime, ProfileSummary, read_profile
from pretrain.train.loop import Outcome
from pretrain.train.profiling import StepProfiler

RunTiny = Callable[..., Outcome]
Pretrain = Callable[..., object]
PROFILE = ("train.steps=12", "checkpoint.every=6", "eval.every=12", "train.profile={from: 5, steps: 3}")


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> object:
    """report.html has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.run.write_report", lambda _: None)
        yield


@pytest.fixture(scope="module")
def profiled(run_tiny: RunTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("profiled") / "run"
    assert run_tiny(run_dir, *PROFILE) is Outcome.FINISHED
    return run_dir


def profile_events(run_dir: Path) -> list[tuple[str, int | None]]:
    events = read_events(run_dir / "events.jsonl")
    return [(event.kind, event.step) for event in events if event.kind.startswith("profile")]


def summary_of(run_dir: Path) -> ProfileSummary:
    """The summary that the last profile event names."""
    paths = [event.profile for event in read_events(run_dir / "events.jsonl") if event.profile]
    return read_profile(run_dir / paths[-1])


def step_marks(run_dir: Path) -> list[str]:
    with gzip.open(run_dir / summary_of(run_dir).trace) as file:
        events = json.load(file)["traceEvents"]
    return [
        event["name"]
        for event in events
        if event["name"].startswith("ProfilerStep#") and event["cat"] == "user_annotation"
    ]


def numbers(run_dir: Path) -> list[tuple[float, float]]:
    return [(record.loss, record.grad_norm) for record in read_metrics(run_dir / "metrics.jsonl").steps]


def test_the_steps_of_the_window_are_in_the_trace_each_once(profiled: Path) -> None:
    summary = summary_of(profiled)
    assert (summary.first_step, summary.last_step) == (5, 7)
    assert step_marks(profiled) == ["ProfilerStep#1", "ProfilerStep#2", "ProfilerStep#3"]  # #0 is the warm-up
    assert profile_events(profiled) == [("profile", 7)]


def test_the_table_has_the_matrix_products_and_their_time(profiled: Path) -> None:
    summary = summary_of(profiled)
    products = {time.name: time for time in summary.operators if time.name in {"aten::mm", "aten::addmm", "aten::bmm"}}
    # Forward: 7 projections in each of 2 layers and the output layer, in each of the 3 steps.
    assert products["aten::mm"].calls >= 3 * (2 * 7 + 1)
    assert products["aten::mm"].self_cpu_us > 0
    assert products["aten::mm"].self_cuda_us == 0
    assert "aten::mm" in (profiled / summary.table).read_text()
    assert not any(time.name.startswith("ProfilerStep") for time in summary.operators)


def test_nothing_but_the_named_files_is_written(profiled: Path) -> None:
    name = "step-00000005-00000007"
    assert sorted(file.name for file in (profiled / "profile").iterdir()) == [
        f"{name}.json",
        f"{name}.trace.json.gz",
        f"{name}.txt",
    ]


def test_losses_are_bitwise_those_of_a_run_without_profile(profiled: Path, tmp_path: Path, run_tiny: RunTiny) -> None:
    run_tiny(tmp_path / "run", *PROFILE[:-1])
    assert numbers(tmp_path / "run") == numbers(profiled)
    assert not (tmp_path / "run" / "profile").exists()


def test_a_run_resumed_within_the_window_profiles_the_rest(tmp_path: Path, run_tiny: RunTiny) -> None:
    """It may be asked for on resume. There is no step before the rest of the window: nothing warms the profiler up."""
    run_tiny(tmp_path, "train.steps=6", "optim.decay=1.0", "optim.schedule=constant")
    run_tiny(tmp_path, "train.steps=12", "optim.schedule=constant", "train.profile.from=5", "train.profile.steps=4")
    summary = summary_of(tmp_path)
    assert (summary.first_step, summary.last_step) == (7, 8)
    assert step_marks(tmp_path) == ["ProfilerStep#0", "ProfilerStep#1"]
    assert run_tiny(tmp_path, "train.steps=14", "optim.schedule=constant", PROFILE[-1]) is Outcome.FINISHED
    assert profile_events(tmp_path) == [("profile", 8)]  # the new window ended before this attempt
    notices = [event.text for event in read_events(tmp_path / "events.jsonl") if event.kind == "notice"]
    assert notices[-1].endswith("are done; nothing is profiled")


def test_the_first_steps_and_the_last_may_be_profiled(tmp_path: Path, run_tiny: RunTiny) -> None:
    run_tiny(tmp_path, "train.steps=3", "optim.warmup=0", "train.profile={from: 1, steps: 9}")
    summary = summary_of(tmp_path)
    assert (summary.first_step, summary.last_step) == (1, 3)
    assert len(step_marks(tmp_path)) == 3


@pytest.mark.parametrize("method", ["start", "step", "export_chrome_trace"])
def test_a_profiler_that_fails_does_not_end_the_run(
    method: str, profiled: Path, tmp_path: Path, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    monkeypatch.setattr(torch.profiler.profile, method, fail)
    assert run_tiny(tmp_path, *PROFILE) is Outcome.FINISHED
    (event,) = [event for event in read_events(tmp_path / "events.jsonl") if event.kind.startswith("profile")]
    assert event.kind == "profile_failed"
    assert "RuntimeError: CUPTI_ERROR_NOT_INITIALIZED; the run continues without it" in event.text
    assert numbers(tmp_path) == numbers(profiled)


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, run_tiny: RunTiny) -> None:
    (tmp_path / "profile").write_text("not a folder")
    assert run_tiny(tmp_path, *PROFILE) is Outcome.FINISHED
    assert profile_events(tmp_path) == [("profile_failed", 7)]


def test_a_run_that_raises_within_the_window_stops_the_profiler(
    tmp_path: Path, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next run in this process could not profile."""
    end_step = StepProfiler.end_step

    def interrupt(self: StepProfiler, step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt
        end_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(StepProfiler, "end_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path / "run", *PROFILE)
    assert profile_events(tmp_path / "run") == []
    run_tiny(tmp_path / "run", *PROFILE)
    assert profile_events(tmp_path / "run") == [("profile", 7)]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["train.profile.from=13"],
            "train.profile.from=13 is after the last step, train.steps=12: use an earlier step",
        ),
        (["train.profile.from=0"], "train.profile.from"),
        (["train.profile={from: 5, steps: 0}"], "train.profile.steps"),
        (
            ["train.profile={from: 5, stepz: 2}"],
            "train.profile.stepz is not a setting; did you mean train.profile.steps",
        ),
        (["train.profile=5"], "train.profile"),
    ],
)
def test_a_wrong_window_is_refused_in_one_line(
    args: list[str], line: str, tmp_path: Path, tiny_args: Callable[..., list[str]], pretrain: Callable[..., object]
) -> None:
    answer = pretrain("train", *tiny_args(tmp_path / "run", "train.steps=12", *args))
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert line in answer.err
    assert not (tmp_path / "run").exists()


def test_the_report_shows_the_operators_with_the_most_self_time_and_names_the_trace(profiled: Path) -> None:
    page = write_report(profiled).read_text()
    card = page[page.index('id="profile"') :]
    card = card[: card.index("</section>")]
    summary = summary_of(profiled)
    assert f"Steps 5 to 7 of rank 0; times are per step. All operators are in {summary.table}." in card
    assert summary.trace in card
    assert "<h3>CPU</h3>" in card
    assert "<h3>GPU</h3>" not in card
    top = sorted(summary.operators, key=lambda time: time.self_cpu_us, reverse=True)[:15]
    assert re.findall(r"<td>(.*?)</td>", card) == [html.escape(time.name) for time in top]


def test_the_report_of_a_gpu_run_has_a_table_for_each_device(profiled: Path, tmp_path: Path) -> None:
    shutil.copytree(profiled, tmp_path / "run")
    summary = summary_of(profiled)
    kernel = OperatorTime(name="gemm_kernel", calls=6, self_cpu_us=0, cpu_us=0, self_cuda_us=3000, cuda_us=3000)
    changed = summary.model_copy(update={"operators": [kernel, *summary.operators]})
    (tmp_path / "run" / "profile" / "step-00000005-00000007.json").write_text(changed.model_dump_json())
    tables = latest_profile(tmp_path / "run", read_events(tmp_path / "run" / "events.jsonl"))
    assert tables is not None
    assert tables.tables["GPU"].rows[0] == ("gemm_kernel", "2.0", "1.000", "100.0%", "1.000")
    assert "gemm_kernel" not in [row[0] for row in tables.tables["CPU"].rows]


def test_a_report_without_the_files_of_its_profile_is_written(profiled: Path, tmp_path: Path) -> None:
    shutil.copytree(profiled, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "profile")
    assert 'id="profile"' not in write_report(tmp_path / "run").read_text()
