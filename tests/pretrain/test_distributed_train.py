"""Real runs under torchrun: the loss curve equals that of one process, and checkpoints resume on any other layout."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.storage.shards import open_split
from pretrain.config.saved import read_config
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.train.loop import Outcome

RunTiny = Callable[..., Outcome]
TinyArgs = Callable[..., list[str]]

BATCHES = (
    "train.batch_size=6",
    "train.batch_ramp_steps=12",
    "train.batch_ramp_start=1",
    "train.micro_batch_size=2",
    "eval.batches=100",
)
"""Uneven ones, at first fewer sequences than ranks; and validation to the odd end of the held-out documents."""

STEPS = ("train.steps=20", "model.n_kv_heads=2")

MODULE = ("-m", "pretrain")

SIGTERM_AT = """
import os, signal, sys, time
from pathlib import Path
from pretrain.cli import main
from pretrain.train import run

folder, step = Path(sys.argv.pop(1)), int(sys.argv.pop(1))

class Terminate:  # received by rank 0 alone; torchrun is its parent and passes the signal on
    def log(self, record):
        if hasattr(record, "loss") and record.step == step:
            os.kill(os.getppid(), 15)
            time.sleep(1)
    def close(self):
        pass

run.open_loggers = lambda *_: [Terminate()]
try:
    main()
except SystemExit as end:
    (folder / f"exit-{step}-{os.environ['RANK']}").write_text(str(end.code))
    raise
"""

SAME_ROWS = """
from parallel.layout import Layout
from pretrain.cli import main

Layout.data_rank = lambda self, rank: self.data - 1
main()
"""


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> object:
    """report.html of the runs in this process has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.run.write_report", lambda _: None)
        yield


def torchrun(*args: str, ranks: int = 2) -> tuple[int, str]:
    """Exit code and output of `torchrun --nproc-per-node 2 ...`, on a port of its own."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *args)
    path = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout


def curve(run_dir: Path) -> list[tuple[str, int, float]]:
    """Every number that `metrics.jsonl` tells of the model."""
    metrics = read_metrics(run_dir / "metrics.jsonl")
    losses = [("loss", record.step, record.loss) for record in metrics.steps]
    norms = [("grad_norm", record.step, record.grad_norm) for record in metrics.steps]
    return losses + norms + [("val_loss", record.step, record.val_loss) for record in metrics.validations]


def largest_difference(ours: Path, theirs: Path) -> float:
    """Relative; both curves have the same points."""
    pairs = list(zip(curve(ours), curve(theirs), strict=True))
    assert all(a[:2] == b[:2] for a, b in pairs)
    return max(abs(a[2] - b[2]) / b[2] for a, b in pairs)


def kinds(run_dir: Path) -> list[tuple[str, int | None]]:
    return [(event.kind, event.step) for event in read_events(run_dir / "events.jsonl")]


@pytest.fixture(scope="module")
def damaged(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny data with a flipped bit in its second training shard."""
    data = shutil.copytree(tiny_data, tmp_path_factory.mktemp("damaged") / "data")
    file = data / "train" / f"{open_split(data / 'train').manifest.sources[0].shards[1].name}.bin"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    return data


@pytest.fixture(scope="module")
def alone(run_tiny: RunTiny, damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process on damaged data, in uneven batches."""
    path = tmp_path_factory.mktemp("alone") / "run"
    assert run_tiny(path, *STEPS, *BATCHES, f"data.path={damaged}", "data.on_damage=skip") is Outcome.FINISHED
    return path


@pytest.fixture(scope="module")
def undisturbed(run_tiny: RunTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process on whole data, in even batches; with a checkpoint of step 10."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_tiny(path, *STEPS, "checkpoint.every=10") is Outcome.FINISHED
    return path


def test_two_data_ranks_have_the_curve_of_one_process_and_write_everything_once(
    alone: Path, damaged: Path, tiny_args: TinyArgs, tmp_path: Path
) -> None:
    args = tiny_args(
        tmp_path / "run", *STEPS, *BATCHES, f"data.path={damaged}", "data.on_damage=skip", "log.samples=[the loop]"
    )
    code, output = torchrun(*MODULE, "train", *args, "parallel.shard=2")
    assert code == 0, output
    assert largest_difference(tmp_path / "run", alone) < 1e-5
    run, said = (
        tmp_path / "run",
        [event.text for event in read_events(alone / "events.jsonl") if event.kind == "skip_data"],
    )
    assert said
    assert [event.text for event in read_events(run / "events.jsonl") if event.kind == "skip_data"] == said
    assert [kind for kind, _ in kinds(run) if kind != "skip_data"] == ["start", "save", "sample", "finish"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 20 + 3
    files = {"config.yaml", "metrics.jsonl", "events.jsonl", "report.html", "tokenizer.json", ".lock", "checkpoints"}
    assert {file.name for file in run.iterdir()} == files
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000020"]
    assert output.count("start at step 0") == 1
    assert "2 processes (shard=2)" in (run / "events.jsonl").read_text()


def test_ranks_that_read_the_same_rows_have_another_curve(
    undisturbed: Path, tiny_args: TinyArgs, tmp_path: Path
) -> None:
    """Negative control of the comparisons above and below."""
    (tmp_path / "same_rows.py").write_text(SAME_ROWS)
    args = tiny_args(tmp_path / "run", *STEPS)
    code, output = torchrun(str(tmp_path / "same_rows.py"), "train", *args, "parallel.shard=2")
    assert code == 0, output
    assert largest_difference(tmp_path / "run", undisturbed) > 1e-3


def test_two_ranks_start_from_the_checkpoint_of_one_process(
    undisturbed: Path, tiny_args: TinyArgs, tmp_path: Path
) -> None:
    """With optimizer and data position, the curve is the rest of the other run's. The test above is the control."""
    args = tiny_args(tmp_path / "run", *STEPS, f"run.init_from={undisturbed}@10", "run.init_mode=full")
    code, output = torchrun(*MODULE, "train", *args, "parallel.shard=2")
    assert code == 0, output
    ours, theirs = (
        curve(tmp_path / "run"),
        [point for point in curve(undisturbed) if point[1] > 10 or point[:2] == ("val_loss", 10)],
    )
    assert [point[:2] for point in ours] == [point[:2] for point in theirs]
    assert max(abs(a[2] - b[2]) / b[2] for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert kinds(tmp_path / "run") == [("start", 10), ("save", 20), ("finish", 20)]
    (ancestor,) = read_config(tmp_path / "run" / "config.yaml").run.ancestry
    assert (ancestor.run, ancestor.step) == (str(undisturbed), 10)


def test_sigterm_saves_on_all_ranks_and_the_run_resumes_on_other_layouts(
    run_tiny: RunTiny, undisturbed: Path, tiny_args: TinyArgs, tmp_path: Path
) -> None:
    """shard=2, then pipeline=2, then one process: the curve is the uninterrupted one.

    torchrun exits with 1, the ranks with 75.

    The signal is sent when a step was recorded. The other ranks learn of it with the sums of the next step.
    """
    run, script = tmp_path / "run", tmp_path / "sigterm_at.py"
    script.write_text(SIGTERM_AT)
    for step, layout in ((6, "parallel.shard=2"), (12, "parallel.pipeline=2")):
        code, output = torchrun(str(script), str(tmp_path), str(step), "train", *tiny_args(run, *STEPS), layout)
        assert code == 1, output
        assert [(tmp_path / f"exit-{step}-{rank}").read_text() for rank in range(2)] == ["75", "75"], output
        assert "death signal, shutting down workers" in output
        assert kinds(run)[-2:] == [("save", step + 1), ("stop", step + 1)]
    assert run_tiny(run, *STEPS) is Outcome.FINISHED
    expected = [("start", 0), ("save", 7), ("stop", 7), ("settings", None), ("resume", 7), ("save", 13), ("stop", 13)]
    assert kinds(run) == [*expected, ("settings", None), ("resume", 13), ("save", 20), ("finish", 20)]
    assert largest_difference(run, undisturbed) < 1e-4
