"""Constraints on settings: each stands beside its message and its remedy, and one function writes the error.

A constraint is a function that returns the `Violation` it finds, or None. Lists of them are checked in order: a
constraint may rely on those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ParamSpec

from pretrain.errors import UserError

P = ParamSpec("P")


@dataclass(frozen=True)
class Violation:
    """Settings that do not go together."""

    problem: str
    """What is wrong, with each setting and its value: `parallel.tensor=3 does not divide model.n_heads=8`."""

    remedy: str = ""
    """What to change: `use 1, 2, 4 or 8`. Empty where `problem` says it."""

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}" if self.remedy else self.problem


def enforce(constraints: Iterable[Callable[P, Violation | None]], *args: P.args, **kwargs: P.kwargs) -> None:
    """Raise UserError with the first violation of `constraints`, which all take the same arguments."""
    for constraint in constraints:
        violation = constraint(*args, **kwargs)
        if violation is not None:
            raise UserError(str(violation))


def format_choices(values: Iterable[int]) -> str:
    """`1, 2, 4 or 8`."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def format_sizes(sizes: Mapping[str, int]) -> str:
    """Axes with their sizes: `parallel.pipeline=2 x parallel.tensor=4 = 8`."""
    product = f" = {math.prod(sizes.values())}" if len(sizes) > 1 else ""
    return " x ".join(f"parallel.{axis}={size}" for axis, size in sizes.items()) + product


def format_processes(count: int) -> str:
    """`8 processes`, `1 process`."""
    return f"{count} processes" if count > 1 else "1 process"


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]
