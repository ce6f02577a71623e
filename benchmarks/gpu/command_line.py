"""Stage 8: the command line as a user types it: prepare, train, stop with SIGINT, resume, train to the end.

The text is Python's standard library. The run must stop with exit code 75, resume where it stopped, end with code 0,
record every step once, and learn.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.stage import StageContext
from pretrain.runs.jsonl import read_events, read_metrics

STOP_AFTER, STEPS = 40, 120
SMALL_STOP_AFTER, SMALL_STEPS = 4, 24
SMALL_MODEL = (
    "model.preset=tiny",
    "data.seq_len=64",
    "train.batch_size=4",
    "optim.lr=1e-2",
    "train.compile=false",
    "eval.batches=2",
)
MODEL = ("model.preset=demo", "data.seq_len=512", "train.batch_size=16", "optim.lr=3e-3", "eval.batches=4")


def run(*args: str, stop: tuple[Path, int] | None = None) -> tuple[int, float]:
    """Run a `pretrain` command and return its exit code and seconds.

    `stop` is (run directory, steps): send SIGINT once the run has recorded that many steps.
    """
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pretrain", *args])
    while stop is not None and process.poll() is None:
        time.sleep(0.1)
        if len(read_metrics(stop[0] / "metrics.jsonl").steps) >= stop[1]:
            process.send_signal(signal.SIGINT)
            break
    return process.wait(), time.monotonic() - start


def main() -> None:
    stage = StageContext(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        run_dir, data = Path(folder, "run"), Path(folder, "data")
        library = sysconfig.get_paths()["stdlib"]
        pattern = "a*.py" if stage.small else "*.py"
        source = {"name": "stdlib", "kind": "text", "paths": [library], "pattern": pattern}
        sources = json.dumps([source | {"exclude": ["site-packages", "test"]}])
        data_settings = (
            f"data.sources={sources}",
            f"data.path={data}",
            "data.vocab_size=2048",
            "data.tokenizer_sample_mb=2",
        )
        code, seconds = run("data", "prepare", *data_settings)
        stage.add_row(what="prepare", exit_code=code, seconds=seconds)
        assert code == 0
        stop_after, n_steps = (SMALL_STOP_AFTER, SMALL_STEPS) if stage.small else (STOP_AFTER, STEPS)
        steps = (f"train.steps={n_steps}", f"eval.every={n_steps // 2}", "checkpoint.every=1000", f"run.dir={run_dir}")
        device = ("train.device=cpu",) if stage.small else ("train.device=cuda",)
        command = ("train", *data_settings, *(SMALL_MODEL if stage.small else MODEL), *steps, *device)
        for what, stop, expected in (("train, stopped", (run_dir, stop_after), 75), ("train, resumed", None, 0)):
            code, seconds = run(*command, stop=stop)
            records = read_metrics(run_dir / "metrics.jsonl")
            stage.add_row(
                what=what, exit_code=code, seconds=seconds, steps=len(records.steps), loss=records.steps[-1].loss
            )
            assert code == expected
        assert [record.step for record in records.steps] == list(range(1, n_steps + 1))
        assert {record.attempt for record in records.steps} == {1, 2}
        assert {"start", "stop", "resume", "finish"} <= {event.kind for event in read_events(run_dir / "events.jsonl")}
        first, last = records.validations[0].val_loss, records.validations[-1].val_loss
        speed = records.steps[-1]
        stage.add_row(what="validation loss", first=first, last=last, tokens_per_s=speed.tokens_per_s, mfu=speed.mfu)
        assert last < (0.99 if stage.small else 0.9) * first
        assert (run_dir / "report.html").stat().st_size > 10_000


if __name__ == "__main__":
    main()
