"""How a method plugs into an engine: it wraps what the engine is made of, and the engine does not know.

    traced(trace, model)       the recorded model, before anything is decided   (a pass over the graph)
    piece(piece)               the code of a run of ops                         (compiled, or watched as it runs)
    gradients(reducer, place)  what brings gradients together                   (what becomes of sums before the norm)

Each gives back what it was given where the method has nothing to do there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from merak_like.partitioner.schedules import AUTO, AUTO_V, data_builder
from merak_like.partitioner.schedules.action import Kind
from merak_like.partitioner.tracer import Trace
from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.groups import Group, Groups
from merak_like.runtime.initialize import World
from merak_like.runtime.prepared import Prepared, Ranges, StageLike
from merak_like.runtime.stage import Stage
from merak_like.runtime.stage_code import Piece
from merak_like.runtime.tensor_parallel.sharding import Prepare, Sharding
from merak_like.runtime.watch import Watch


@dataclass(frozen=True)
class Job:
    """What a method may ask before anything is made, to refuse what it cannot do."""

    schedule: str
    tp: int
    shares: int
    zero: int
    lowered: bool = False
    """Whether the optimizer updates other tensors than the model's parameters, in another precision."""

    @property
    def elsewhere(self) -> str:
        """What keeps weights or gradients away from ``parameter``; empty if nothing does."""
        return f"zero={self.zero}" if self.zero else "precision=" if self.lowered else ""

    @property
    def waits(self) -> bool:
        """Whether gradients of weights are computed apart, by a W."""
        if self.schedule in (AUTO, AUTO_V):
            return True
        return any(action.kind is Kind.W for order in data_builder(self.schedule)(2, 4).orders for action in order)


@dataclass(frozen=True)
class Place:
    """Where on the mesh a rank is, and what it trains."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    shared: Set[str]
    """Parameters whose gradients are summed over more ranks than the replicas: ties, rows of a sequence."""
    replicas: Group
    """The ranks that hold the same stages; None for one alone."""
    optimizer: torch.optim.Optimizer | None
    world: World
    watch: Watch
    steps: Callable[[], int]
    """How many steps the job has done, those before its checkpoint included."""

    @property
    def count(self) -> int:
        """How many replicas there are."""
        return 1 if self.replicas is None else dist.get_world_size(self.replicas)


class Method:
    """Changes nothing; methods override what concerns them."""

    watches = False
    """Whether it sees each layer's call."""
    compiles = False
    """Whether layers are no longer called one by one."""
    note = ""
    """What a plan shall say of it."""

    def __repr__(self) -> str:
        """With its options: all ranks must have the same."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if k[0] != '_')})"

    def check(self, job: Job) -> None:
        """Raise ValueError, with what works instead, for a job that this method cannot serve."""

    def traced(self, trace: Trace, model: nn.Module) -> Trace:
        """The recorded model, changed."""
        return trace

    def piece(self, piece: Piece) -> Piece:
        """The code of some ops, wrapped."""
        return piece

    def gradients(self, reducer: Gradients, place: Place) -> Gradients:
        """What brings gradients together, wrapped."""
        return reducer


class Methods:
    """Several, applied in order."""

    def __init__(self, methods: Sequence[Method], job: Job) -> None:
        self._methods = tuple(methods)
        for method in self._methods:
            if not isinstance(method, Method):
                raise ValueError(f"methods= takes objects of merak_like.runtime.methods, found {method!r}")
            if job.shares > 1 and type(method).piece is not Method.piece:
                raise ValueError(
                    f"{type(method).__name__} changes how a stage's code runs, which tp_shares={job.shares} does in "
                    "its own way: use tp_shares=1"
                )
            if job.zero == 3:
                raise ValueError("zero=3 runs the model whole, not the stages that methods= change: use zero=2")
            method.check(job)
        watching = [type(m).__name__ for m in self._methods if m.watches]
        if watching and (whole := [type(m).__name__ for m in self._methods if m.compiles]):
            raise ValueError(f"{watching[0]} sees each layer as it is called, which {whole[0]} hides: use one of them")

    def around(self, parts: Sharding, model: nn.Module) -> Sharding:
        """A model's traces and stages, as the methods want them."""
        return Wrapped(parts, model, self._methods) if self._methods else parts  # type: ignore[return-value]

    def gradients(
        self, reducer: Gradients, model: nn.Module, own: Mapping[str, nn.Parameter], shared: Set[str],
        optimizer: torch.optim.Optimizer | None, groups: Groups, world: World, watch: Watch, steps: Callable[[], int],
    ) -> Gradients:  # fmt: skip
        """What brings gradients together, as the methods want it."""
        place = Place(model, own, shared, groups.sums.get(((), ())), optimizer, world, watch, steps)
        for method in self._methods:
            reducer = method.gradients(reducer, place)
        return reducer


class Wrapped:
    """A ``Sharding`` whose traces and pieces go through methods; all else is its own."""

    def __init__(self, parts: Sharding, model: nn.Module, methods: Sequence[Method]) -> None:
        self._parts, self._model, self._methods = parts, model, methods

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parts, name)

    def trace(self, batch: Any, device: torch.device | str) -> Trace:
        """Record a micro-batch and change what was recorded."""
        found = self._parts.trace(batch, device)
        for method in self._methods:
            found = method.traced(found, self._model)
        return found

    def prepare(self, groups: Groups, watch: Watch) -> Prepare:
        """What makes a trace this rank's own, with wrapped pieces."""
        inner = self._parts.prepare(groups, watch)

        def prepared(traced: Trace, starts: Sequence[int], batch: Any) -> Prepared:
            ready = inner(traced, starts, batch)

            def make(index: int, again: Ranges, device: torch.device, pending: Counter[int] | None) -> StageLike:
                return self._around(ready.make(index, again, device, pending))

            return replace(ready, make=make)

        return prepared

    def _around(self, stage: StageLike) -> StageLike:
        if isinstance(stage, Stage):
            pieces = list(stage.code.pieces)
            for method in self._methods:
                pieces = [method.piece(piece) for piece in pieces]
            stage.code = replace(stage.code, pieces=tuple(pieces))
        return stage
