"""Run all GPU stages with one command.

Each stage has its own timeout and log, and one that fails does not stop the others.

    python -m benchmarks.gpu --out DIR [--seconds 570] [--stages smoke kernels ...] [--rehearse]

DIR gets `<stage>.log` (its output), `<stage>.jsonl` (a line for each result, written as soon as it is known) and
`summary.json` (status and rows of every stage). Exit code 1 if a stage failed, 2 if a Python package is missing.

No network is needed. Missing packages come from wheels: `make gpu-wheels` downloads them into `.wheels/` on any machine
with a network, and this program installs them into `.wheels/site`. `--rehearse` runs every stage in a small size on a
CPU. This file imports only the standard library: it must also run where packages are missing, to say which.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".wheels"
SITE = WHEELS / "site"
INSTALLED = SITE / ".installed"
"""Written when all wheels are in `SITE`."""

REQUIRED_PACKAGES = (
    *("torch", "numpy", "pydantic", "yaml", "typer", "rich", "tokenizers", "gigatoken", "fsspec", "pyarrow"),
    *("zstandard", "xxhash", "safetensors", "plotly", "jinja2", "pytest", "pytest_timeout"),
)
"""What the stages import. `make gpu-wheels` downloads those that a stock image with PyTorch lacks."""

KILL_DELAY = 5.0
"""Seconds in which a stage that timed out prints its stacks before it is killed."""

LOG_TAIL = 25
"""Lines of a failed stage's log that are printed."""


@dataclass(frozen=True)
class Stage:
    """One program of the check."""

    name: str
    command: tuple[str, ...]
    """Arguments of `python`."""

    seconds: float
    """Timeout."""

    takes_rows: bool = True
    """Whether it has the options `--rows FILE` and `--small`; pytest does not."""


@dataclass
class StageResult:
    """How a stage ended."""

    name: str
    status: str
    """`passed`, `failed`, `timed out` or `not started` (no time was left)."""

    seconds: float = 0.0
    exit_code: int | None = None


def pytest_command(expression: str) -> tuple[str, ...]:
    """Return the arguments that run the GPU tests which match a marker expression."""
    options = (
        *("-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider"),
        *("--timeout=90", "--durations=8", "--color=no"),
    )
    return ("-m", "pytest", *options, "tests/gpu", "-m", expression)


STAGES = (
    Stage("environment", ("-m", "benchmarks.gpu.environment"), 30),
    Stage("smoke", ("-m", "benchmarks.gpu.smoke"), 45),
    Stage("kernels", ("-m", "benchmarks.gpu.kernels"), 50),
    Stage("tests", pytest_command("gpu and not compiles"), 120, takes_rows=False),
    Stage("training", ("-m", "benchmarks.gpu.training", "--suite", "base"), 140),
    Stage("variants", ("-m", "benchmarks.gpu.training", "--suite", "variants"), 90),
    Stage("experts", ("-m", "benchmarks.gpu.training", "--suite", "experts"), 70),
    Stage("tests-compiled", pytest_command("gpu and compiles"), 120, takes_rows=False),
    Stage("command-line", ("-m", "benchmarks.gpu.command_line"), 120),
)
"""The most valuable results come first: no time may be left for the last stages."""


def install_wheels() -> None:
    """Install the downloaded wheels into `.wheels/site`, once, and add that folder to the path.

    Only for a Python that lacks packages. The wheels are built for one Python version and would hide packages of
    another one.
    """
    wheels = sorted(WHEELS.glob("*.whl"))
    newest = max((wheel.stat().st_mtime for wheel in wheels), default=0.0)
    if wheels and (not INSTALLED.is_file() or INSTALLED.stat().st_mtime < newest):
        options = (
            *("--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"),
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
    """Return the packages that the stages import and this Python lacks."""
    return [name for name in REQUIRED_PACKAGES if find_spec(name) is None]


def stage_environment(out: Path, *, small: bool = False) -> dict[str, str]:
    """Return the environment variables of every stage. The user's own override the defaults."""
    folders = (str(SITE) if str(SITE) in sys.path else "", os.environ.get("PYTHONPATH", ""))
    path = os.pathsep.join(filter(None, folders))
    defaults = {
        "GLOO_SOCKET_IFNAME": "lo",  # all ranks are on this machine, and its host name may not resolve
        "NCCL_SOCKET_IFNAME": "lo",
        "TORCH_LOGS": "recompiles,graph_breaks",
        "TORCHINDUCTOR_CACHE_DIR": str(out / "inductor"),  # later stages reuse what earlier ones compiled
        "TRITON_CACHE_DIR": str(out / "triton"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # SIGABRT prints the stacks of all threads
    }
    if small:
        defaults["OMP_NUM_THREADS"] = "1"  # small sizes gain nothing from more threads
    return defaults | dict(os.environ) | ({"PYTHONPATH": path} if path else {})


def run_stage(stage: Stage, out: Path, seconds: float, *, small: bool) -> StageResult:
    """Run one stage. After `seconds` it must print its stacks (SIGABRT), and all its processes are killed."""
    command = [sys.executable, *stage.command]
    if stage.takes_rows:
        command += ["--rows", str(out / f"{stage.name}.jsonl"), *(["--small"] if small else [])]
    start = time.monotonic()
    with (out / f"{stage.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=stage_environment(out, small=small),
            start_new_session=True,
        )
        try:
            code = process.wait(max(1.0, seconds))
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "timed out"
            signal_group(process, signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_DELAY)
        finally:
            signal_group(process, signal.SIGKILL)  # also kills processes that the stage left behind
            process.wait()
    return StageResult(stage.name, status, round(time.monotonic() - start, 1), code)


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def read_rows(out: Path, stage: str) -> list[dict[str, object]]:
    """Return the rows that a stage has written. An incomplete last line of a stage that was killed is left out."""
    file = out / f"{stage}.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def write_summary(out: Path, results: list[StageResult], *, rehearsed: bool) -> None:
    """Write `summary.json` with the stages that have ended."""
    stages = [asdict(result) | {"rows": read_rows(out, result.name)} for result in results]
    summary = {"date": datetime.date.today().isoformat(), "rehearsed": rehearsed, "stages": stages}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def print_result(result: StageResult, out: Path) -> None:
    """Print a line for a stage, and the end of its log if it failed."""
    print(f"{result.name:15} {result.status:12} {result.seconds:6.1f} s", flush=True)
    if result.status in {"failed", "timed out"}:
        log = (out / f"{result.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(f"    {line[:200]}" for line in log[-LOG_TAIL:]), flush=True)


def run_stages(stages: Sequence[Stage], out: Path, deadline: float, *, small: bool) -> list[StageResult]:
    """Run the stages until `deadline`, by time.monotonic(); the rest is `not started`.

    Updates `summary.json` after each.
    """
    results: list[StageResult] = []
    for stage in stages:
        left = deadline - time.monotonic() - KILL_DELAY
        if left > 0:
            limit = left if small else min(stage.seconds, left)  # a busy CPU would exceed a stage's own limit
            result = run_stage(stage, out, limit, small=small)
        else:
            result = StageResult(stage.name, "not started")
        results.append(result)
        write_summary(out, results, rehearsed=small)
        print_result(result, out)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--seconds", type=float, default=570.0, help="time for all stages together (default 570)")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="run only these")
    parser.add_argument("--rehearse", action="store_true", help="run every stage in a small size on a CPU")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    if missing_packages():
        install_wheels()
    if missing := missing_packages():
        print(
            f"gpu-check: {sys.executable} has no {', '.join(missing)}; bring them as wheels (`make gpu-wheels` where "
            "there is a network, then copy the folder .wheels here), or run `make install-dev` and then this again",
            file=sys.stderr,
        )
        return 2
    if not args.rehearse and not has_gpu():
        note = "`--rehearse` runs every stage in a small size on a CPU"
        print(f"gpu-check: PyTorch sees no CUDA GPU here, so nothing was run; {note}")
        return 0
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in STAGES if not args.stages or stage.name in args.stages]
    results = run_stages(stages, out, deadline, small=args.rehearse)
    n_passed = sum(result.status == "passed" for result in results)
    print(f"\n{n_passed} of {len(results)} stages passed; results in {out}/summary.json")
    return int(n_passed < len(results))


def has_gpu() -> bool:
    """Return whether PyTorch sees a GPU.

    Asked in another process: this one must not hold GPU memory while the stages run.
    """
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False, env=stage_environment(Path.cwd())).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
