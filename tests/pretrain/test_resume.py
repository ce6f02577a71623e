"""A run that was stopped, killed or damaged ends with the losses, validations and weights of an uninterrupted one."""

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from data_pipeline.reading.loader import Loader
from pretrain.checkpoint.directory import checkpoint_path
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.manifest import TrainState, read_manifest
from pretrain.checkpoint.save import save_checkpoint
from pretrain.checkpoint.verify import verify_checkpoint
from pretrain.config.loading import load
from pretrain.runs.jsonl import read_events
from pretrain.runs.schema import StepRecord, ValidationRecord
from pretrain.setup.engine import build_engine
from pretrain.train import loop
from pretrain.train.loop import Outcome

RunTiny = Callable[..., Outcome]
UninterruptedRun = Callable[..., Path]

CASES = {
    "adamw": (),
    "bf16": ("train.precision=bf16",),
    "muon": ("optim.kind=muon",),
    "experts": (
        *("model.architecture=moe", "model.moe.n_experts=4", "model.moe.d_ff=32", "model.moe.expert_bias=true"),
        *("model.moe.input_jitter=0.1", "model.moe.expert_dropout=0.1", "model.moe.capacity_factor=1.5"),
    ),
    "accumulation": ("train.batch_size=7", "train.micro_batch_size=3"),
    "batch ramp": ("train.batch_ramp_steps=30", "train.batch_ramp_start=1", "train.micro_batch_size=2"),
}


class SignalAfter:
    """Sends this process a signal, so many times, when it hears of a step."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGINT, times: int = 1) -> None:
        self.step, self.number, self.times = step, number, times

    def log(self, record: StepRecord | ValidationRecord) -> None:
        if isinstance(record, StepRecord) and record.step == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> Iterator[None]:
    """report.html has its own tests, and would double the time of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.run.write_report", lambda _: None)
        yield


@pytest.fixture(scope="module")
def uninterrupted(run_tiny: RunTiny, tmp_path_factory: pytest.TempPathFactory) -> UninterruptedRun:
    """`uninterrupted(*args)`: the directory of a run of 40 steps that nothing disturbed."""

    @cache
    def run(*args: str) -> Path:
        path = tmp_path_factory.mktemp("uninterrupted") / "run"
        assert run_tiny(path, *args) is Outcome.FINISHED
        return path

    return run


def curve(run_dir: Path) -> list[tuple[str, int, float]]:
    """Every number that `metrics.jsonl` tells of the model, in the order of the file."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        (name, line["step"], line[name]) for line in lines for name in ("loss", "grad_norm", "val_loss") if name in line
    ]


def state_at(run_dir: Path, step: int) -> dict[str, Tensor]:
    """The weights and the optimizer's state in the checkpoint of a step."""
    engine = build_engine(load(run_dir / "config.yaml").config)
    state = engine.state()
    load_checkpoint(checkpoint_path(run_dir / "checkpoints", step), state)
    flat = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    return flat | {
        f"{name}.{slot}": tensor for name, slots in state["optimizer"].items() for slot, tensor in slots.items()
    }


def assert_same_end(run_dir: Path, undisturbed: Path) -> None:
    assert curve(run_dir) == curve(undisturbed)
    ours, theirs = state_at(run_dir, 40), state_at(undisturbed, 40)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def kinds(run_dir: Path) -> list[tuple[str, int | None]]:
    return [(event.kind, event.step) for event in read_events(run_dir / "events.jsonl")]


@pytest.mark.parametrize("args", CASES.values(), ids=CASES)
def test_losses_and_weights_after_a_stop_at_20_are_those_of_the_undisturbed_run(
    tmp_path: Path, run_tiny: RunTiny, uninterrupted: UninterruptedRun, args: tuple[str, ...]
) -> None:
    assert run_tiny(tmp_path, *args, observers=[SignalAfter(20)]) is Outcome.STOPPED
    assert [step for name, step, _ in curve(tmp_path) if name == "loss"] == list(range(1, 21))
    assert run_tiny(tmp_path, *args) is Outcome.FINISHED
    assert_same_end(tmp_path, uninterrupted(*args))
    assert kinds(tmp_path) == [("start", 0), ("save", 20), ("stop", 20), ("resume", 20), ("save", 40), ("finish", 40)]


def test_sigterm_saves_a_step_that_has_no_checkpoint_of_its_own(
    tmp_path: Path, run_tiny: RunTiny, uninterrupted: UninterruptedRun
) -> None:
    for step in (3, 17, 33):
        assert run_tiny(tmp_path, observers=[SignalAfter(step, signal.SIGTERM)]) is Outcome.STOPPED
        assert kinds(tmp_path)[-2:] == [("save", step), ("stop", step)]
    assert run_tiny(tmp_path) is Outcome.FINISHED
    assert_same_end(tmp_path, uninterrupted())


def test_a_second_ctrl_c_exits_at_once_and_nothing_is_recorded_twice(
    tmp_path: Path, run_tiny: RunTiny, uninterrupted: UninterruptedRun
) -> None:
    for step, last in ((7, "start"), (27, "save")):  # before the first checkpoint, and after it
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path, observers=[SignalAfter(step, times=2)])
        assert curve(tmp_path)[-1][1] == step
        assert kinds(tmp_path)[-1][0] == last
    assert run_tiny(tmp_path) is Outcome.FINISHED
    assert_same_end(tmp_path, uninterrupted())


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_a_save_stops_after_that_save(
    tmp_path: Path, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    press_in_the_first_save(monkeypatch, times)
    assert run_tiny(tmp_path, "checkpoint.every=10") is Outcome.STOPPED
    assert kinds(tmp_path) == [("start", 0), ("save", 10), ("stop", 10)]
    assert not verify_checkpoint(checkpoint_path(tmp_path / "checkpoints", 10))


def test_a_third_ctrl_c_in_a_save_leaves_without_it(
    tmp_path: Path, run_tiny: RunTiny, uninterrupted: UninterruptedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    press_in_the_first_save(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path)
    assert kinds(tmp_path) == [("start", 0)]
    assert run_tiny(tmp_path) is Outcome.FINISHED
    assert_same_end(tmp_path, uninterrupted())


def press_in_the_first_save(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    save, presses = loop.save_checkpoint, [times]

    def pressed(*given: object) -> Path:
        for _ in range(presses.pop() if presses else 0):
            signal.raise_signal(signal.SIGINT)
        return save(*given)

    monkeypatch.setattr(loop, "save_checkpoint", pressed)


def test_ctrl_c_in_a_validation_saves_after_it(tmp_path: Path, run_tiny: RunTiny) -> None:
    class InValidation(SignalAfter):
        def log(self, record: StepRecord | ValidationRecord) -> None:
            if isinstance(record, ValidationRecord) and record.step == self.step:
                signal.raise_signal(self.number)

    assert run_tiny(tmp_path, observers=[InValidation(10)]) is Outcome.STOPPED
    assert kinds(tmp_path) == [("start", 0), ("save", 10), ("stop", 10)]


KILLED_AT_27 = """
import os, signal, sys
import torch
from rich.console import Console
from pretrain.config.loading import load
from pretrain.train.run import train

class Kill:
    def log(self, record):
        if record.step == 27:
            os.kill(os.getpid(), signal.SIGKILL)
    def close(self):
        pass

torch.set_num_threads(1)
train(load(None, sys.argv[1:]).config, Console(), [Kill()])
"""


def test_a_run_killed_at_27_resumes_from_20(
    tmp_path: Path, run_tiny: RunTiny, uninterrupted: UninterruptedRun, tiny_args: Callable[..., list[str]]
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_27, *tiny_args(tmp_path)], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert curve(tmp_path)[-1][1] == 27
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step":28,"samp')  # what a power cut may leave
    assert run_tiny(tmp_path) is Outcome.FINISHED
    assert_same_end(tmp_path, uninterrupted())
    assert ("resume", 20) in kinds(tmp_path)


# The second case saves step 25 beside the damaged 30: it must be kept, though 30 is the newest by its name.
@pytest.mark.parametrize(
    ("args", "left"),
    [(("checkpoint.every=10",), [20, 30, 40]), (("checkpoint.every=5", "checkpoint.keep=1"), [40])],
)
def test_a_damaged_checkpoint_is_passed_over_loudly_and_the_end_is_the_same(
    tmp_path: Path, run_tiny: RunTiny, uninterrupted: UninterruptedRun, args: tuple[str, ...], left: list[int]
) -> None:
    run_tiny(tmp_path, "checkpoint.every=10", observers=[SignalAfter(30)])
    shard = checkpoint_path(tmp_path / "checkpoints", 30) / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    console = Console(file=io.StringIO())
    assert run_tiny(tmp_path, *args, console=console) is Outcome.FINISHED
    event = next(event for event in read_events(tmp_path / "events.jsonl") if event.kind == "skip_checkpoint")
    assert event.step == 30
    assert "step-00000030" in event.text
    assert "damaged: its checksum is" in event.text
    assert event.text in console.file.getvalue()
    assert ("resume", 20) in kinds(tmp_path)
    assert curve(tmp_path) == curve(uninterrupted())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-{step:08d}" for step in left]


def rewrite(run_dir: Path, change: Callable[[dict[str, dict]], None]) -> None:
    """Load the checkpoint of step 20, change its tensors, and save it again as a valid one."""
    path = checkpoint_path(run_dir / "checkpoints", 20)
    manifest, engine = read_manifest(path), build_engine(load(run_dir / "config.yaml").config)
    load_checkpoint(path, engine.state())
    with torch.no_grad():
        change(engine.state())
    shutil.rmtree(path)
    save_checkpoint(
        path.parent, engine.state(), TrainState(**{name: getattr(manifest, name) for name in TrainState.model_fields})
    )


def nothing(state: dict[str, dict]) -> None:
    pass


def zero_the_moments(state: dict[str, dict]) -> None:
    for slots in state["optimizer"].values():
        slots["exp_avg"].zero_()


def forget_the_step_count(state: dict[str, dict]) -> None:
    for slots in state["optimizer"].values():
        slots["step"].zero_()


def move_one_weight(state: dict[str, dict]) -> None:
    weight = state["model"]["model.norm.weight"]
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))


@pytest.mark.parametrize(
    ("change", "same"),
    [(nothing, True), (zero_the_moments, False), (forget_the_step_count, False), (move_one_weight, False)],
)
def test_the_comparison_notices_lost_state(
    tmp_path: Path,
    run_tiny: RunTiny,
    uninterrupted: UninterruptedRun,
    change: Callable[[dict[str, dict]], None],
    same: bool,
) -> None:
    run_tiny(tmp_path, observers=[SignalAfter(20)])
    rewrite(tmp_path, change)
    run_tiny(tmp_path)
    assert (curve(tmp_path) == curve(uninterrupted())) is same
    assert (curve(tmp_path)[-1] == curve(uninterrupted())[-1]) is same


def test_the_comparison_notices_data_that_is_off_by_one_sample(
    tmp_path: Path, run_tiny: RunTiny, uninterrupted: UninterruptedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tiny(tmp_path, observers=[SignalAfter(20)])
    batch = Loader.batch
    monkeypatch.setattr(Loader, "batch", lambda self, first, count, seq_len: batch(self, first + 1, count, seq_len))
    run_tiny(tmp_path)
    ours, theirs = curve(tmp_path), curve(uninterrupted())
    same = [a == b for a, b in zip(ours, theirs, strict=True) if a[1] > 20]
    assert not any(same)


def test_a_finished_run_started_again_does_nothing_and_says_so(tmp_path: Path, run_tiny: RunTiny) -> None:
    run_tiny(tmp_path, "train.steps=10")
    before = {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in tmp_path.rglob("*")
        if file.is_file() and file.name != ".lock"
    }
    console = Console(file=io.StringIO(), width=400)
    assert run_tiny(tmp_path, "train.steps=10", console=console) is Outcome.FINISHED
    assert f"run.dir={tmp_path} is finished: all 10 steps are done" in console.file.getvalue()
    assert before == {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in tmp_path.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def test_a_run_killed_after_its_last_checkpoint_records_its_end_on_resume(tmp_path: Path, run_tiny: RunTiny) -> None:
    args = ("train.steps=10", "log.samples=[the loop]")
    run_tiny(tmp_path, *args)
    lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
    reported, metrics = read_events(tmp_path / "events.jsonl"), (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "events.jsonl").write_text("".join(lines[:2]))
    assert run_tiny(tmp_path, *args) is Outcome.FINISHED
    assert kinds(tmp_path) == [("start", 0), ("save", 10), ("resume", 10), ("sample", 10), ("finish", 10)]
    assert read_events(tmp_path / "events.jsonl")[3].text == reported[2].text
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
