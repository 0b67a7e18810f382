"""Methods that change how a module's activations wait for the backward, in some modules and not in others.

blocks   a pattern of module paths: all by default, or "auto": those for which it pays (partitioner/keeping.py)
planned  what the planner shall count where these modules are treated so
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from torch import nn

from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.tracer import Trace
from merak_like.runtime.methods.method import Job, Method

ALL, AUTO = ".*", "auto"


class ByBlocks(Method, ABC):
    """In the modules whose path matches ``blocks``; with ``AUTO`` ``auto_parallel`` chooses them."""

    watches = True
    between_memories = False
    """Whether it is for devices only, whose memory is not the machine's."""
    what = ""
    """What is so, as a plan says it."""

    def __init__(self, blocks: str) -> None:
        self.blocks = blocks
        self._plans = True

    def of(self, paths: Sequence[str]) -> Self:
        """The same for these modules."""
        found = copy.deepcopy(self)
        found.blocks = "|".join(re.escape(path) for path in paths)
        return found

    @property
    def note(self) -> str:  # type: ignore[override]
        """Which blocks a plan was made for: who obeys it must ask for the same."""
        return f"{self.what}: planned for methods=[{self!r}]"

    @abstractmethod
    def planned(self, graph: ProxyGraph, inside: tuple[str, ...] | None) -> ProxyGraph:
        """The same code; to the planner, what it keeps and what it takes in these modules (None: all)."""

    def check(self, job: Job) -> None:
        """Modules are found by their calls, which tensor-parallel code does not make."""
        if job.tp > 1 and self.blocks != ALL:
            raise ValueError(
                f"{type(self).__name__}(blocks={self.blocks!r}) follows calls of modules, and with tp={job.tp} their "
                "parts are called one by one: leave blocks out, or use tp=1"
            )
        self._plans = job.tp == 1

    def traced(self, trace: Trace, model: nn.Module) -> Trace:
        """``planned`` in the modules that are meant. Of a shard, on tensor-parallel ranks, it counts nothing.

        Raises ValueError where no module has such a path.
        """
        name, named = type(self).__name__, self.named(model)
        if self.blocks == AUTO and not named:
            raise ValueError(
                f"{name}(blocks='auto') chooses blocks while a plan is made: beside plan= say those that it was made "
                "with, as its notes have them (planned for methods=[...]), or leave it out where they have none"
            )
        if not named:
            some = ", ".join(repr(path) for path, _ in list(model.named_modules())[1:6])
            raise ValueError(f"{name}(blocks={self.blocks!r}): no module has such a path; there are {some}")
        if not trace.training or not self._plans:
            return trace
        return replace(trace, graph=self.planned(trace.graph, None if self.blocks == ALL else tuple(named)))

    def named(self, model: nn.Module) -> list[str]:
        """The paths of the modules that are meant."""
        return [path for path, _ in model.named_modules() if re.fullmatch(self.blocks, path)]
