"""An op while it is being recorded, and the reasons to begin again."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from merak_like.partitioner.graph import Value
from merak_like.partitioner.tracer.errors import TraceError


class Descend(Exception):
    """A module recorded as a leaf lets a tensor escape: trace again with its inside recorded."""


class ReadsData(Exception):
    """A module asks for data that is not known: trace again with that module kept whole and run for real."""

    def __init__(self, path: str, error: TraceError) -> None:
        super().__init__(path)
        self.path, self.error = path, error


class CannotStayWhole(Exception):
    """A module that should be kept whole and run for real cannot: its caller may."""

    def __init__(self, path: str, caller: str, error: TraceError) -> None:
        super().__init__(path)
        self.path, self.caller, self.error = path, caller, error


@dataclass
class Draft:
    """An op while it is being recorded."""

    name: str
    kind: str
    target: str
    scope: str
    node: fx.Node | None = None
    inputs: dict[str, None] = field(default_factory=dict)
    outputs: list[Value] = field(default_factory=list)
    params: dict[str, None] = field(default_factory=dict)
    buffers: dict[str, None] = field(default_factory=dict)
    mutates: dict[str, None] = field(default_factory=dict)
    flops: int = 0
    moved: int = 0
    saved: int = 0
    kept: list[int] = field(default_factory=list)
    """The storages behind ``saved``."""
    kernels: int = 0
    random: bool = False
    custom: bool = False
    """Made by a custom autograd function, which keeps its own backward."""
