"""What every benchmark uses: command line, measured matmul peak, description of the machine, table of results."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices that measure the peak, so large that all but the product takes no time."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option `--json FILE` (`args.json: Path | None`). A benchmark adds its own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows of the table to this file")
    return parser


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queue, so that a clock read next measures the work. Does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` calls, the device's work included."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def matmul_peak(device: torch.device, dtype: torch.dtype, repeats: int = 15) -> float:
    """Return the FLOP/s of a large square matmul: the median of `repeats`, after warm-up.

    The matrices hold random numbers: GPUs run zeros faster.
    """
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = time_calls(lambda: torch.mm(a, b, out=out), device, 3 + repeats)
    return 2.0 * size**3 / median(seconds[3:])


def describe_machine() -> dict[str, str]:
    """Return the date, the hardware and the versions of torch and Python."""
    machine = {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine | {"torch": torch.__version__, "python": platform.python_version()}


def print_table(title: str, rows: list[dict[str, object]], json_file: Path | None) -> None:
    """Print the machine, then the rows as a table.

    Write {"title", "machine", "rows"} to `json_file` if there is one.
    """
    machine = describe_machine()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_numeric = all(isinstance(row.get(column, 0), int | float) for row in rows)
        table.add_column(column, justify="right" if is_numeric else "left")
    for row in rows:
        table.add_row(*(_format_cell(row.get(column)) for column in columns))
    console = Console()
    summary = ", ".join(f"{key} {value}" for key, value in machine.items())
    console.print(summary, style="dim", highlight=False, soft_wrap=True)
    console.print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        content = {"title": title, "machine": machine, "rows": rows}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _format_cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cpu_model() -> str:
    """Return the CPU's name on Linux, its architecture elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
