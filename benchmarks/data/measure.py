"""What the cases share: the clock, and the type of their results."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

Measurements = dict[str, Any]  # Any: results of a case cross the process boundary as JSON


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children, user and system."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def measure_time(work: Callable[[], object]) -> Measurements:
    """Run `work` and return its CPU and wall-clock seconds."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    work()
    return {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
