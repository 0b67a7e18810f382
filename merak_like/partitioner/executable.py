"""What the engine can run, in one place: ``auto`` chooses among these only when a plan is to be executed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Executable:
    """Choices that may be made."""

    tp: int | None
    """The most tensor-parallel ranks; None is any number."""
    zero: tuple[int, ...]
    sequence_parallel: bool


ENGINE = Executable(tp=None, zero=(0, 1, 2), sequence_parallel=True)
"""Of this engine, on any number of stages and tensor-parallel ranks (DeepSpeed's optimizers: level 1 alone)."""
ANYTHING = Executable(tp=None, zero=(0, 1, 2, 3), sequence_parallel=True)
"""Of no particular one: a plan for people."""
