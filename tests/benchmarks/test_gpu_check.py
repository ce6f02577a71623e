"""`make gpu-check` without a GPU: every stage runs small, and a failure stops no other stage."""

import gzip
import json
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from benchmarks.gpu import __main__ as check

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ignore wheels that were downloaded for another machine."""
    monkeypatch.setattr(check, "WHEELS", tmp_path / "wheels")


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *map(str, args)])
    return check.main()


@pytest.mark.timeout(900)
def test_every_stage_runs_small_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = run(monkeypatch, "--out", tmp_path, "--rehearse", "--seconds", 850)
    assert code == 0, (tmp_path / "summary.json").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert list(stages) == [stage.name for stage in check.STAGES]
    assert {stage["status"] for stage in stages.values()} == {"passed"}
    assert all((tmp_path / f"{name}.log").stat().st_size > 0 for name in stages)
    cases = [
        row["case"] for name in ("training", "variants", "experts") for row in stages[name]["rows"] if "case" in row
    ]
    assert len(cases) == 12
    assert all(row["tokens_per_s"] > 0 for row in stages["training"]["rows"] if "case" in row)
    assert "aten::mm" in (tmp_path / "kernels.txt").read_text()
    assert json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    runs = {row["what"]: row for row in stages["command-line"]["rows"]}
    assert (runs["train, stopped"]["exit_code"], runs["train, resumed"]["exit_code"]) == (75, 0)


def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hang = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '987']); print('before', flush=True); time.sleep(60)"
    )
    row = "import sys; open(sys.argv[2], 'w').write('{\"what\": 1}\\n{\"wh')"
    stages = (
        check.Stage("fails", ("-c", "raise SystemExit('no such kernel')"), 60, takes_rows=False),
        check.Stage("hangs", ("-c", hang), 1.5, takes_rows=False),
        check.Stage("passes", ("-c", row), 60),
        check.Stage("late", ("-c", "pass"), 60, takes_rows=False),
    )
    monkeypatch.setattr(check, "STAGES", stages)
    monkeypatch.setattr(check, "has_gpu", lambda: True)
    clock = iter([0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 569.0])  # no time is left for the last stage
    monkeypatch.setattr(check, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert run(monkeypatch, "--out", tmp_path) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(stage["name"], stage["status"]) for stage in summary["stages"]] == [
        ("fails", "failed"),
        ("hangs", "timed out"),
        ("passes", "passed"),
        ("late", "not started"),
    ]
    assert summary["stages"][2]["rows"] == [{"what": 1}]  # the incomplete line is left out
    assert "no such kernel" in (tmp_path / "fails.log").read_text()
    hung = (tmp_path / "hangs.log").read_text()
    assert "before" in hung
    assert "most recent call first" in hung  # the stacks
    assert "no such kernel" in capsys.readouterr().out
    # The process that the stage started is gone as well.
    assert not [file for file in Path("/proc").glob("[0-9]*/cmdline") if b"987" in read(file)]


def read(file: Path) -> bytes:
    """Return the content, or nothing if the process has ended meanwhile."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def test_a_missing_package_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "REQUIRED_PACKAGES", (*check.REQUIRED_PACKAGES, "no_such_package"))
    assert run(monkeypatch, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no no_such_package; bring them as wheels (`make gpu-wheels`" in line
    assert not (tmp_path / "out").exists()


def test_wheels_are_not_installed_where_nothing_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check.WHEELS.mkdir()
    (check.WHEELS / "pydantic-0-cp1-cp1-other.whl").write_text("for another Python")
    monkeypatch.setattr(check, "has_gpu", lambda: False)
    assert run(monkeypatch, "--out", tmp_path / "out") == 0
    monkeypatch.setattr(check, "REQUIRED_PACKAGES", (*check.REQUIRED_PACKAGES, "no_such_package"))
    with pytest.raises(SystemExit, match="could not be installed"):  # but where a package is missing
        run(monkeypatch, "--out", tmp_path / "out")


def test_without_a_gpu_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(monkeypatch, "--out", tmp_path / "out") == 0
    assert "PyTorch sees no CUDA GPU here, so nothing was run" in capsys.readouterr().out


def test_the_wheels_have_versions_that_the_project_accepts() -> None:
    lines = (ROOT / "benchmarks/gpu/wheels.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[\d.]+", version) for version in pinned.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    shared = pinned.keys() & required.keys()
    assert {"pydantic", "gigatoken", "plotly", "zstandard"} <= shared
    assert all(pinned[name] in required[name].specifier for name in shared)
