"""What one side runs for a micro-batch of a given shape: its own stages, and those that stand for the other side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn

from merak_like.partitioner.cuts import crossings
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.locality import held_by, residents
from merak_like.partitioner.mesh import Coord, Mesh
from merak_like.partitioner.realign import moved
from merak_like.partitioner.schedules.action import Edges
from merak_like.partitioner.tracer import LossFn, Trace, trace
from merak_like.runtime import rng
from merak_like.runtime.batches import signature
from merak_like.runtime.links import Spec
from merak_like.runtime.programs import KEPT, Program
from merak_like.runtime.stage import Stage
from merak_like.runtime.stage_code import build_stage
from merak_like.runtime.tensor_parallel.sharding import Prepare, Sharded, Sharding, Unsharded
from merak_like.runtime.value_code import ValueCode, value_code
from merak_like.split.adapters import adapted
from merak_like.split.cut import Cut
from merak_like.split.elsewhere import Arrives, Leaves, Shown
from merak_like.split.enduring import Sturdy
from merak_like.split.exchange import Exchange
from merak_like.split.halves import Halves, halve, spec_of
from merak_like.split.joined import Joined, Pool, joinable
from merak_like.split.order import Side, stage_rank
from merak_like.split.parts import borders
from merak_like.split.sharded import as_agreed, require_whole


@dataclass(frozen=True)
class Half(Program):
    """One side's program for a shape, as far as this rank runs it."""

    halves: Halves = field(kw_only=True)
    holds: Mapping[int, tuple[str, ...]] = field(kw_only=True)
    """First names of the parameters and buffers of each stage of the side."""

    @property
    def shown(self) -> Shown | None:
        """The stage that makes the model's outputs, if it is here."""
        return next((s for s in self.stages.values() if isinstance(s, Shown) and "loss" in s.code.results), None)


@dataclass(frozen=True)
class Placed:
    """Where a half is cut for a shape, and what its parts hold; no code yet."""

    halves: Halves
    starts: tuple[int, ...]
    holds: Mapping[int, tuple[str, ...]]


class Leaving(Protocol):
    """Makes the stage by which values leave an edge."""

    def __call__(self, exchange: Exchange, *, specs: Sequence[Spec]) -> Leaves:
        """Of the values that are sent."""
        ...


class HalfPrograms:
    """One side's programs by input shape and mode."""

    def __init__(
        self, side: Side, model: nn.Module, cut: Cut, exchange: Exchange, device: torch.device, loss_fn: LossFn | None,
        *, mesh: Mesh | None = None, at: Coord | None = None, parts: Sharding | None = None, pool: Pool | None = None,
        leave: Leaving | None = None, arrive: type[Arrives] = Arrives,
    ) -> None:  # fmt: skip
        """``mesh`` is what a host's half is on and ``at`` where this rank is; the first batch that is asked for decides
        where it is cut. ``parts`` are how its weights lie. ``pool`` is of halves whose micro-batches may go through
        together. ``leave`` makes the stage by which an edge's values leave, ``arrive`` the one by which they come to a
        host.
        """
        self.pool, self._leave, self._arrive = pool, leave, arrive
        self.side: Side = side
        self.model, self.cut, self.exchange = model, cut, exchange
        self.device, self.loss_fn = device, loss_fn
        self.parts: Sharding = parts or Unsharded(model, loss_fn)
        self.prepare: Prepare | None = None
        """What makes a trace this rank's own, where ranks have parts of weights: from the time it has them."""
        self._mesh = mesh or Mesh()
        self.stage_rank, self.rank = stage_rank(side, cut, self._mesh.pp), at.pp if at is not None else 0
        self._planned: tuple[ProxyGraph, tuple[int, ...], Mapping[int, tuple[str, ...]]] | None = None
        self._known: dict[Any, list[Half]] = {}

    def at(self, batch: Any) -> Half:
        """The program for a micro-batch like this one, in the model's present mode."""
        key = (signature(batch), self.model.training)
        if key in self._known:
            self._known[key] = self._known.pop(key)
        for half in self._known.get(key, ()):
            if half.traced.fits(batch):
                return half
        placed = self.place(batch)
        made = self._edge(placed) if self.side == "edge" else self._host(placed, batch)
        if len(self._known) >= KEPT:
            del self._known[next(iter(self._known))]
        self._known.setdefault(key, []).append(made)
        return made

    def place(self, batch: Any) -> Placed:
        """Trace a micro-batch in the model's present mode, and cut it."""
        with torch.enable_grad():  # a value's gradient decides how it travels, in an evaluation too
            own = self.parts.trace(batch, self.device)
            layers = adapted(self.model)  # each is called by itself: torch's own blocks pass by them in evaluations
            calls = tuple(c for c in own.calls if not any(path.startswith(f"{c.path}.") for path in layers))
            halves = halve(replace(own, calls=calls), self.cut)
            if isinstance(self.parts, Sharded):
                known = trace(self.parts.blueprint, batch, self.loss_fn, device=self.device)
                halves = as_agreed(halve(known, self.cut), halves)
        if self.side == "edge":
            return Placed(
                halves,
                halves.starts,
                {at: halves.params(p) for at, p in ((0, 0), (3, 2)) if p < len(halves.starts) - 1},
            )
        starts, needs = self._starts(halves), residents(halves.trace.graph)
        holds = {part: held_by(needs, starts[part], starts[part + 1]) for part in range(1, self._mesh.pp + 1)}
        if halves.rebuilt:
            holds[0] = tuple(self._again(halves, starts).buffers)
        self._check(holds)
        return Placed(halves, starts, holds)

    def edges(self) -> Edges:
        """Neighbours talk, whatever the shape."""
        return frozenset(pairwise(range(len(self.stage_rank))))

    def _edge(self, placed: Placed) -> Half:
        halves = placed.halves
        edges: dict[tuple[int, int], tuple[Spec, ...]] = dict.fromkeys(self.edges(), ())
        leaves = (self._leave or partial(Leaves, link="up"))(self.exchange, specs=halves.sent)
        stages: dict[int, Any] = {0: self._own(halves, 0), 1: leaves}
        edges[0, 1] = halves.sent
        if halves.tailed:
            names = [spec.name for spec in halves.returned]
            stages[2] = Arrives(self.exchange, "down", halves.returned, names)
            stages[3] = self._own(halves, 2)
            edges[2, 3] = halves.returned
            if halves.kept:
                edges[0, 3] = halves.kept
        return self._half(placed, halves.trace, stages, edges)

    def _host(self, placed: Placed, batch: Any) -> Half:
        halves, starts, last = placed.halves, placed.starts, self._mesh.pp
        stages: dict[int, Any] = {}
        if self.rank == 0:
            names = [spec.name for spec in (*halves.sent, *halves.rebuilt)]
            again = _Again(self._again(halves, starts), self.device) if halves.rebuilt else None
            stages[0] = self._arrive(self.exchange, "up", halves.sent, names, again)
            if halves.tailed:
                stages[last + 1] = Leaves(self.exchange, "down", halves.returned)
        traced = halves.trace
        if self.prepare is not None:
            traced = self.prepare(traced, starts, batch).trace
            shapes = {name: value.shape for name, value in traced.graph.values.items()}
            require_whole((*halves.sent, *halves.returned), shapes)
        edges: dict[tuple[int, int], tuple[Spec, ...]] = dict.fromkeys(self.edges(), ())
        for c in crossings(traced.graph, starts):
            for target in c.targets:
                if (c.source, target) != (0, last + 1):  # what the edge's tail reads of its head stays there
                    edges[c.source, target] = (*edges.get((c.source, target), ()), spec_of(c))
        for part in range(1, last + 1):
            if self.stage_rank[part] == self.rank:
                stages[part] = self._part(halves, traced, starts, part)
        return self._half(placed, traced, stages, edges)

    def _again(self, halves: Halves, starts: tuple[int, ...]) -> ValueCode:
        return value_code(halves.trace, self.model, [s.name for s in halves.rebuilt], starts[1])

    def _starts(self, halves: Halves) -> tuple[int, ...]:
        """The starts of the halves with those of the parts among them, before the same ops for every shape."""
        if self._planned is None:
            inner = borders(halves, self._mesh.pp)
            self._planned = halves.trace.graph, inner, {}
        else:
            inner = moved(self._planned[1], self._planned[0], halves.trace.graph)
        return (*halves.starts[:2], *inner, *halves.starts[2:])

    def _check(self, holds: Mapping[int, tuple[str, ...]]) -> None:
        assert self._planned is not None
        graph, inner, first = self._planned
        self._planned = graph, inner, first or holds
        for stage, names in holds.items():
            if first and (missing := sorted(set(names) - set(first.get(stage, ())))):
                raise ValueError(
                    f"with these input shapes rank {self.stage_rank[stage]} of the host would need {missing[0]}, which "
                    "is on another rank: open the session with an example of this shape"
                )

    def _half(
        self, placed: Placed, traced: Trace, stages: Mapping[int, Any], edges: dict[tuple[int, int], tuple[Spec, ...]]
    ) -> Half:
        drawing = any(op.random for op in traced.graph.ops)
        if drawing:
            state = Spec(rng.RNG, tuple(rng.state(self.device).shape), torch.uint8, False)
            for edge in self.edges():
                edges[edge] = (*edges[edge], state)
        halves = placed.halves
        return Half(stages, edges, traced, halves.trace.fits, drawing, {}, halves=halves, holds=placed.holds)

    def _own(self, halves: Halves, part: int) -> Stage:
        """One of the edge's."""
        return Shown(build_stage(halves.trace, self.model, halves.starts, part), halves.trace.inputs, self.device)

    def _part(self, halves: Halves, traced: Trace, starts: tuple[int, ...], part: int) -> Stage:
        """One of the host's."""
        code = build_stage(traced, self.model, starts, part)
        if self._mesh.size > 1:
            named = {**traced.graph.values, **{n: traced.graph.values[v] for n, v in traced.graph.outputs.items()}}
            shapes = {n: (v.shape, getattr(torch, v.dtype)) for n, v in named.items()}
            return Sturdy(code, traced.inputs, self.device, self.exchange, shapes)
        if self.pool is not None and joinable(halves):
            return Joined(code, traced.inputs, self.device, self, halves, self.pool)
        return Shown(code, traced.inputs, self.device)


@dataclass(frozen=True)
class _Again:
    code: ValueCode
    device: torch.device

    def __call__(self, batch: Any) -> Mapping[str, torch.Tensor]:
        return self.code(batch, self.device)
