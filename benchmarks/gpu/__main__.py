"""Run all GPU stages in one command: each has a timeout and a log of its own, and a failure cancels nothing.

    python -m benchmarks.gpu --out DIR [--seconds 570] [--stages smoke kernels ...] [--rehearse]

Under DIR: `<stage>.log` (its output), `<stage>.jsonl` (a row for each result, written as soon as it is known), and `summary.json` (machine,
status of each stage, all rows). Exit code 1 if a stage failed, 2 if a Python package is missing.

Needs no network. Packages that the machine lacks come from wheels: `make gpu-wheels`, on any machine with a network, puts them into
`.wheels/`; they are installed into `.wheels/site` here. `--rehearse` runs every stage small, on a CPU. Imports nothing but the standard
library: it must run where packages are missing, and say which.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".wheels"
SITE = WHEELS / "site"
INSTALLED = SITE / ".installed"
"""Written when all wheels are in `SITE`."""

NEEDED = (
    *(
        "torch",
        "numpy",
        "pydantic",
        "yaml",
        "typer",
        "rich",
        "tokenizers",
        "gigatoken",
        "fsspec",
        "pyarrow",
        "zstandard",
        "xxhash",
    ),
    *("safetensors", "plotly", "jinja2", "pytest", "pytest_timeout"),
)
"""What the stages import. `make gpu-wheels` brings those that a stock image with PyTorch lacks."""

GRACE = 5.0
"""Seconds that a stage gets to print where it hangs before it is killed."""

TAIL = 25
"""Lines of a failed stage's log that are shown."""


@dataclass(frozen=True)
class Stage:
    """One program of the check."""

    name: str
    command: tuple[str, ...]
    """Words after `python`."""

    seconds: float
    """Timeout."""

    takes_rows: bool = True
    """Whether it understands `--rows FILE` and `--small`; pytest does not."""


@dataclass
class Result:
    """What became of a stage."""

    name: str
    status: str
    """passed, failed, timed out, or not started (no time was left)."""

    seconds: float = 0.0
    exit_code: int | None = None


def _tests(expression: str) -> tuple[str, ...]:
    options = (
        "-o",
        "addopts=-ra --strict-markers",
        "-p",
        "no:cacheprovider",
        "--timeout=90",
        "--durations=8",
        "--color=no",
    )
    return ("-m", "pytest", *options, "tests/gpu", "-m", expression)


STAGES = (
    Stage("environment", ("-m", "benchmarks.gpu.environment"), 30),
    Stage("smoke", ("-m", "benchmarks.gpu.smoke"), 45),
    Stage("kernels", ("-m", "benchmarks.gpu.kernels"), 50),
    Stage("tests", _tests("gpu and not compiles"), 120, takes_rows=False),
    Stage("training", ("-m", "benchmarks.gpu.training", "--suite", "base"), 140),
    Stage("variants", ("-m", "benchmarks.gpu.training", "--suite", "variants"), 90),
    Stage("tests-compiled", _tests("gpu and compiles"), 120, takes_rows=False),
    Stage("command-line", ("-m", "benchmarks.gpu.command_line"), 120),
)
"""In the order in which results are worth most: what comes late may find no time left."""


def install_wheels() -> None:
    """Put the wheels that were brought along into `.wheels/site`, once, and let every stage find them there.

    Only for a Python that lacks packages: they are built for one version, and would hide what another one has.
    """
    wheels = sorted(WHEELS.glob("*.whl"))
    newest = max((wheel.stat().st_mtime for wheel in wheels), default=0.0)
    if wheels and (not INSTALLED.is_file() or INSTALLED.stat().st_mtime < newest):
        options = (
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--no-cache-dir",
            "--upgrade",
            "--disable-pip-version-check",
        )
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(SITE), *map(str, wheels)]
        done = subprocess.run(command, check=False)
        if done.returncode:
            sys.exit(f"gpu-check: the wheels in {WHEELS} could not be installed (see above)")
        INSTALLED.touch()
    if INSTALLED.is_file():
        sys.path.insert(0, str(SITE))


def missing_packages() -> list[str]:
    """Packages that the stages import and that are not there."""
    return [name for name in NEEDED if find_spec(name) is None]


def environment_of_stages(out: Path, *, small: bool = False) -> dict[str, str]:
    """Variables of every stage. The user's own come first."""
    path = os.pathsep.join(
        part for part in (str(SITE) if str(SITE) in sys.path else "", os.environ.get("PYTHONPATH", "")) if part
    )
    defaults = {
        "GLOO_SOCKET_IFNAME": "lo",  # all ranks are on this machine, whose own name may not resolve
        "NCCL_SOCKET_IFNAME": "lo",
        "TORCH_LOGS": "recompiles,graph_breaks",
        "TORCHINDUCTOR_CACHE_DIR": str(out / "inductor"),  # a stage reuses what an earlier one compiled
        "TRITON_CACHE_DIR": str(out / "triton"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # SIGABRT prints where every thread stands
    }
    if small:
        defaults["OMP_NUM_THREADS"] = "1"  # nothing in it is worth a second thread
    return defaults | dict(os.environ) | ({"PYTHONPATH": path} if path else {})


def run_stage(stage: Stage, out: Path, seconds: float, *, small: bool) -> Result:
    """Run one stage for at most that long. A stage that hangs is asked to print its stacks, then killed with all its processes."""
    words = [sys.executable, *stage.command]
    if stage.takes_rows:
        words += ["--rows", str(out / f"{stage.name}.jsonl"), *(["--small"] if small else [])]
    began = time.monotonic()
    with (out / f"{stage.name}.log").open("wb") as log:
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment_of_stages(out, small=small),
            start_new_session=True,
        )
        try:
            code = process.wait(max(1.0, seconds))
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "timed out"
            _signal(process, signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _signal(process, signal.SIGKILL)  # also what the stage started and left behind
            process.wait()
    return Result(stage.name, status, round(time.monotonic() - began, 1), code)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def rows_of(out: Path, stage: str) -> list[dict[str, object]]:
    """The results that a stage wrote, also one that did not end; a last line cut in half is left out."""
    file = out / f"{stage}.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def summarize(out: Path, results: list[Result], *, rehearsed: bool) -> None:
    """Write `summary.json`: everything that is known so far."""
    stages = [asdict(result) | {"rows": rows_of(out, result.name)} for result in results]
    summary = {"date": datetime.date.today().isoformat(), "rehearsed": rehearsed, "stages": stages}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def tell(result: Result, out: Path) -> None:
    """One line for a stage, and the end of its log where it failed."""
    print(f"{result.name:15} {result.status:12} {result.seconds:6.1f} s", flush=True)
    if result.status in {"failed", "timed out"}:
        log = (out / f"{result.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(f"    {line[:200]}" for line in log[-TAIL:]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all stages together (default 570)")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="run these only")
    parser.add_argument("--rehearse", action="store_true", help="run every stage small, on a CPU")
    options = parser.parse_args()
    began = time.monotonic()
    if missing_packages():
        install_wheels()
    if missing := missing_packages():
        print(
            f"gpu-check: {sys.executable} has no {', '.join(missing)}; bring them as wheels (`make gpu-wheels` where there is a network, "
            "then copy the folder .wheels here), or run `make install-dev` and then this again",
            file=sys.stderr,
        )
        return 2
    if not options.rehearse and not _sees_gpu():
        print(
            "gpu-check: PyTorch sees no CUDA GPU here, so nothing was run; `--rehearse` runs every stage small on a CPU"
        )
        return 0
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for stage in STAGES:
        if options.stages and stage.name not in options.stages:
            continue
        left = options.seconds - (time.monotonic() - began)
        if left > GRACE:
            left -= GRACE  # a stage that hangs takes that long to be ended
            seconds = left if options.rehearse else min(stage.seconds, left)  # a busy CPU has no stage's timeout
            result = run_stage(stage, out, seconds, small=options.rehearse)
        else:
            result = Result(stage.name, "not started")
        results.append(result)
        summarize(out, results, rehearsed=options.rehearse)
        tell(result, out)
    print(
        f"\n{sum(result.status == 'passed' for result in results)} of {len(results)} stages passed; results in {out}/summary.json"
    )
    return int(any(result.status != "passed" for result in results))


def _sees_gpu() -> bool:
    """Asked in a process of its own: this one must not hold GPU memory while the stages run."""
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return (
        subprocess.run([sys.executable, "-c", question], check=False, env=environment_of_stages(Path.cwd())).returncode
        == 0
    )


if __name__ == "__main__":
    sys.exit(main())
