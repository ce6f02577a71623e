"""What every benchmark shares: its command line, the measured matmul peak, the machine it ran on, and its table."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

MATMUL_WIDTH = {"cpu": 2048, "cuda": 8192}
"""Edge of the square matrices of the peak measurement: large enough that nothing but the product counts."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark: `--json FILE`, read as `arguments.json: Path | None`; add your own to it."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the table's rows here as well")
    return arguments


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(device: torch.device, dtype: torch.dtype, repeats: int = 15) -> float:
    """FLOP/s of a large square matrix product on random numbers (zeros run faster on GPUs): median of `repeats`, after warm-up."""
    width = MATMUL_WIDTH[device.type]
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(3 + repeats):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2.0 * width**3 / median(seconds[3:])


def machine() -> dict[str, str]:
    """Where and when this runs."""
    described = {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described | {"torch": torch.__version__, "python": platform.python_version()}


def report(title: str, rows: list[dict[str, object]], json_file: Path | None) -> None:
    """Print the rows as a table under a line on the machine; write {"title", "machine", "rows"} to `json_file` if there is one."""
    where = machine()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = all(isinstance(row.get(column, 0), int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console = Console()
    console.print(
        ", ".join(f"{key} {value}" for key, value in where.items()), style="dim", highlight=False, soft_wrap=True
    )
    console.print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(
            json.dumps({"title": title, "machine": where, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cpu_model() -> str:
    """The CPU's name where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
