"""What a rank runs for a micro-batch of a given shape: traced once per shape, cut as the plan says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from merak_like.partitioner.cuts import crossings
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.realign import realign, recomputed_ranges
from merak_like.partitioner.schedules.action import Edges
from merak_like.partitioner.tensor_parallel.layout import Layout
from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.example import leaf
from merak_like.runtime import rng
from merak_like.runtime.batches import signature
from merak_like.runtime.links import Spec
from merak_like.runtime.prepared import Prepared, StageLike
from merak_like.runtime.stage_code import inputs_of
from merak_like.runtime.tensor_parallel.sharding import Prepare, Sharding


@dataclass(frozen=True)
class Program:
    """A rank's stages for one input shape, and what crosses their borders."""

    stages: Mapping[int, StageLike]
    forward: Mapping[tuple[int, int], tuple[Spec, ...]]
    """Edge (source, target) to the values that travel along it."""
    traced: Trace
    fits: Callable[[Any], bool]
    """Whether a micro-batch of this shape takes the traced way."""
    random: bool
    """Whether the model draws random numbers, so that streams must be kept."""
    parts: Mapping[str, Layout]
    """How results lie of which a tensor-parallel rank has a part only, by their names."""
    reads: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    """Names of the batch's values that this rank must have, and where they are in a batch."""

    def check(self, batch: Any) -> None:
        """Raise ValueError where this rank must have of a batch what it knows the outline of only."""
        absent = [name for name, path in self.reads.items() if getattr(leaf(batch, path), "is_meta", False)]
        if absent:
            raise ValueError(
                f"a batch needs {', '.join(absent)} here, which this rank did not load because its stages did not read "
                "it in the first batch: let collate give all batches the same values"
            )

    def backward(self, edge: tuple[int, int]) -> tuple[Spec, ...]:
        """The gradients that come back along an edge."""
        return tuple(spec for spec in self.forward.get(edge, ()) if spec.requires_grad)


KEPT = 64
"""Shapes kept: a model whose Python asks for numbers that differ from batch to batch needs a trace for each."""


class Programs:
    """Programs by input shape, mode and autocast; traces are kept, so a shape is traced once.

    Where the model's Python looked at the data, a batch that gives other answers gets a trace of its own.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, planned: Trace, example: Any, rank: int, device: torch.device,
        sharding: Sharding, prepare: Prepare, pending: Counter[int] | None = None,
    ) -> None:  # fmt: skip
        """``planned`` is the trace of ``example``, a micro-batch, in the model's present mode.

        ``rank`` is the pipeline rank; ``pending`` counts gradients that wait for a W by the ``id`` of the parameter.
        """
        self.model, self.plan, self.planned = model, plan, planned
        self.rank, self.device, self.pending = rank, device, pending
        self.sharding, self.prepare = sharding, prepare
        self._known: dict[Any, list[Program]] = {self._key(example): [self._program(planned, example)]}

    def at(self, batch: Any) -> Program:
        """The program for a micro-batch like this one, in the model's present mode."""
        key = self._key(batch)
        if key in self._known:
            self._known[key] = self._known.pop(key)  # to the end: the one used longest ago is forgotten first
        for program in self._known.get(key, ()):
            program.check(batch)
            if program.fits(batch):
                return program
        made = self._program(self.sharding.trace(batch, self.device), batch)
        made.check(batch)
        if sum(map(len, self._known.values())) >= KEPT:
            self._forget_one()
        self._known.setdefault(key, []).append(made)
        return made

    def _forget_one(self) -> None:
        oldest = next(iter(self._known))
        self._known[oldest].pop(0)
        if not self._known[oldest]:
            del self._known[oldest]

    def _key(self, batch: Any) -> Any:
        kind = self.device.type
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        return signature(batch), self.model.training, autocast

    def _program(self, traced: Trace, example: Any) -> Program:
        starts = realign(self.plan, self.planned.graph, traced.graph)
        ready = self.prepare(traced, starts, example)
        traced = ready.trace
        stages = {stage.index: self._stage(ready, stage.index) for stage in self.plan.stages if stage.rank == self.rank}
        drawing = any(op.random for op in traced.graph.ops)
        edges: dict[tuple[int, int], list[Spec]] = {edge: [] for edge in self.edges(traced)}
        for crossing in crossings(traced.graph, starts):
            spec = Spec(crossing.value, crossing.shape, getattr(torch, crossing.dtype), crossing.requires_grad)
            for target in crossing.targets:
                edges[crossing.source, target].append(spec)
        if drawing:
            state = Spec(rng.RNG, tuple(rng.state(self.device).shape), torch.uint8, False)
            for s in range(len(starts) - 2):
                edges[s, s + 1].append(state)
        return Program(
            stages, {edge: tuple(specs) for edge, specs in edges.items()}, traced, ready.fits, drawing, ready.parts,
            read_on(self.rank, self.plan, traced, starts),
        )  # fmt: skip

    def _stage(self, ready: Prepared, index: int) -> StageLike:
        again = recomputed_ranges(self.plan, index, self.planned.graph, ready.trace.graph)
        return ready.make(index, again, self.device, self.pending)

    def edges(self, traced: Trace | None = None) -> Edges:
        """The stage pairs that talk: where values cross, and neighbours (for the random streams)."""
        graph = (traced or self.planned).graph
        starts = realign(self.plan, self.planned.graph, graph)
        found = {(c.source, target) for c in crossings(graph, starts) for target in c.targets}
        return frozenset(found | {(s, s + 1) for s in range(len(self.plan.stages) - 1)})

    def read(self, rank: int) -> set[tuple[Any, ...]]:
        """Where in a batch like the planned one is what a pipeline rank must have."""
        return {*read_on(rank, self.plan, self.planned, self.plan.starts).values()}


def read_on(rank: int, plan: Plan, traced: Trace, starts: Sequence[int]) -> dict[str, tuple[Any, ...]]:
    """The batch's values that a pipeline rank must have: what its stages read, or all where the model asks of data."""
    own = [stage.index for stage in plan.stages if stage.rank == rank]
    read = {name for index in own for name in inputs_of(traced, starts, index)}
    return {name: path for name, path in traced.inputs.items() if name in read or traced.questions}
