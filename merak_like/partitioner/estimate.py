"""A layout in a millisecond: the step and the fullest rank, from running sums over the units of a model.

The estimate is what the planner would find if work could be cut at the borders of units so that the slowest stage has
the least: ``sum of the stages + (m - 1) * slowest`` (Zheng et al. 2022, sec. 5.2); with an interleaved schedule filling
and draining take the part of one chunk (Narayanan et al. 2021, sec. 2.2). Memory counts the micro-batches that 1F1B
keeps on each stage.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from merak_like.partitioner.after import after_seconds
from merak_like.partitioner.balance import Floats, Ints
from merak_like.partitioner.batches import traced_samples
from merak_like.partitioner.blocks import repeated, units
from merak_like.partitioner.coding import Coding, coded
from merak_like.partitioner.cost import op_cost, op_costs
from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.layouts import Layout
from merak_like.partitioner.one_rank import Sources
from merak_like.partitioner.placement import hop
from merak_like.partitioner.plan import StageMemory
from merak_like.partitioner.software import Software
from merak_like.partitioner.states import StateBytes


@dataclass(frozen=True)
class Table:
    """Running sums over units of a graph, for one micro-batch."""

    forward: Floats
    backward: Floats
    saved: Ints
    held: Ints
    """Bytes of weights."""
    blocks: tuple[int, int]
    """Borders of the units that are in blocks."""
    block: int
    """Most that one unit saves."""
    entering: int
    """What enters a block."""


@dataclass(frozen=True)
class _Bytes:
    """What of a table does not depend on the micro-batch: bytes of the samples that were traced."""

    saved: Floats
    held: Ints
    live: Floats


@dataclass(frozen=True)
class Shares:
    """A table cut into stages, by pipeline rank."""

    work: Floats
    """Seconds of each stage."""
    slowest: float
    """Of a rank."""
    backward: float
    forward: float
    """Least of a stage."""
    held: Floats
    saved: Floats
    """Of a live micro-batch."""


@dataclass
class Tables:
    """Made once for each graph of a rank and size of micro-batch."""

    sources: Sources
    hardware: Hardware
    software: Software
    _borders: dict[bool, tuple[Ints, Ints]] = field(default_factory=dict[bool, tuple[Ints, Ints]])
    _bytes: dict[tuple[int, bool, bool], _Bytes] = field(default_factory=dict[tuple[int, bool, bool], _Bytes])
    _made: dict[tuple[int, bool, bool, int], Table] = field(default_factory=dict[tuple[int, bool, bool, int], Table])
    _cut: dict[Any, Shares | None] = field(default_factory=dict[Any, "Shares | None"])

    def of(self, layout: Layout) -> Table:
        """The sums for a layout."""
        key = _key(layout)
        if key not in self._made:
            software = replace(self.software, selective=layout.recompute == "selective")
            graph = self.sources.rank(layout.mesh.tp, software, sequence_parallel=layout.sequence_parallel)
            borders, blocks = self.borders(graph, layout.mesh.tp > 1)
            if key[:3] not in self._bytes:
                self._bytes[key[:3]] = _bytes_of(graph, borders)
            self._made[key] = self._table(graph, borders, blocks, self._bytes[key[:3]], layout.micro_batch)
        return self._made[key]

    def shares(self, layout: Layout) -> Shares | None:
        """The cut of a layout; None where it has more stages than there are units."""
        again = layout.recompute in ("blocks", "full")
        key = _key(layout), again, layout.recompute == "auto", layout.mesh.pp, layout.chunks
        if key not in self._cut:
            self._cut[key] = _shares(self.of(layout), layout, again)
        return self._cut[key]

    def borders(self, graph: ProxyGraph, fine: bool) -> tuple[Ints, Ints]:
        """Ops at which units begin, then the end, and which of these begin blocks: for all degrees of the same ops."""
        if fine not in self._borders:
            costs = op_costs(graph, self.hardware)
            pieces = units(graph, costs, 64, find_cuts(graph))
            borders = np.array([*(piece.first for piece in pieces), len(graph.ops)], np.int64)
            self._borders[fine] = borders, np.searchsorted(borders, repeated(graph, pieces))
        return self._borders[fine]

    def _table(self, graph: ProxyGraph, borders: Ints, blocks: Ints, held: _Bytes, micro_batch: int) -> Table:
        scale = micro_batch / traced_samples(graph)
        kinds, alike = graph.alike
        costs = [op_cost(graph.ops[i], graph, self.hardware, scale=scale) for i in kinds]
        each = np.array([(cost.forward_seconds, cost.backward_seconds) for cost in costs])[list(alike)]
        sums = np.vstack([np.zeros((1, 2)), np.cumsum(each, axis=0)])[borders]
        saved, live = held.saved * scale, held.live * scale
        return Table(
            np.ascontiguousarray(sums[:, 0]), np.ascontiguousarray(sums[:, 1]), saved.astype(np.int64), held.held,
            (int(blocks[0]), int(blocks[-1])) if len(blocks) else (0, len(borders) - 1),
            int(np.diff(saved).max()), int(np.median(live[1:-1])) if len(live) > 2 else 0,
        )  # fmt: skip


def _key(layout: Layout) -> tuple[int, bool, bool, int]:
    return layout.mesh.tp, layout.recompute == "selective", layout.sequence_parallel, layout.micro_batch


def _bytes_of(graph: ProxyGraph, borders: Ints) -> _Bytes:
    saved: Floats = np.cumsum(np.array([0, *(op.saved_bytes for op in graph.ops)], np.float64))[borders]
    reads, seen = np.zeros(len(graph.ops) + 1), set[str]()
    for index, op in enumerate(graph.ops):
        for name in op.params:
            if (first := graph.canonical[name]) not in seen:
                seen.add(first)
                reads[index + 1] += graph.parameter(first).nbytes
    return _Bytes(saved, np.cumsum(reads)[borders].astype(np.int64), find_live(graph, borders))


def _shares(table: Table, layout: Layout, again: bool) -> Shares | None:
    pp, stages = layout.mesh.pp, layout.mesh.pp * layout.chunks
    if stages > len(table.forward) - 1:
        return None
    first, last = table.blocks if layout.recompute == "blocks" else (0, -1)
    blocks = table.forward.clip(table.forward[first], table.forward[last]) - table.forward[first]
    work = table.forward + table.backward + blocks * again
    starts = _cut(work, stages)
    each, saved = np.diff(work[starts]), np.diff(table.saved[starts])
    if again or layout.recompute == "auto":
        saved = table.entering * np.diff(starts)
    return Shares(
        each, float(_per_rank(each, pp).max()), float(np.diff(table.backward[starts]).min()),
        float(np.diff(table.forward[starts]).min()), _per_rank(np.diff(table.held[starts]), pp), _per_rank(saved, pp),
    )  # fmt: skip


def find_live(graph: ProxyGraph, borders: Ints) -> Floats:
    """Bytes live at each border that have a gradient."""
    change = np.zeros(len(graph.ops) + 2)
    last = graph.last_use
    for name, first in graph.producer.items():
        value = graph.values[name]
        if value.requires_grad and last[name] > first:
            change[first + 1] += value.nbytes
            change[last[name] + 1] -= value.nbytes
    return np.cumsum(change)[borders]


def _cut(work: Floats, stages: int) -> Ints:
    """Borders of the partition whose largest stage is least, to a thousandth: bisection over greedy fillings."""
    largest, whole = float(np.diff(work).max()), float(work[-1])
    low, high = max(largest, whole / stages), whole / stages + largest
    sums, end, starts = work.tolist(), len(work) - 1, list[int]()
    while True:
        middle = low if not starts else (low + high) / 2
        made = [0]
        while made[-1] < end and len(made) <= stages:
            made.append(bisect_right(sums, sums[made[-1]] + middle * (1 + 1e-9), made[-1]) - 1)
        if made[-1] == end:
            high, starts = middle, made
            if middle == low or high - low < 3e-3 * high:
                return np.array(starts, np.int64)
        else:
            low = middle
            starts = starts or [0, end]


def estimate(
    layout: Layout, tables: Tables, hardware: Hardware, states: StateBytes, coding: Coding | None = None
) -> tuple[float, int]:
    """Seconds of the step, and bytes of the fullest rank."""
    shares, mesh, m = tables.shares(layout), layout.mesh, layout.micro_batches
    if shares is None:
        return float("inf"), 2**62
    table, stages = tables.of(layout), mesh.pp * layout.chunks
    blocks = layout.recompute in ("blocks", "full", "auto")
    slowest = shares.slowest if layout.chunks > 1 else shares.work.max()
    link = coded(hop(mesh, hardware, 0, 1), coding, hardware) if mesh.pp > 1 else None
    between = link.seconds(table.entering) if link is not None else 0.0
    pipeline = (m - 1) * slowest + shares.work.sum() / layout.chunks + 2 * between * (stages - 1)
    if layout.chunks > 1:
        pipeline = m * slowest + (mesh.pp - 1) * slowest / layout.chunks + 2 * between * (stages - 1)
    sharded = states.sharded(layout.zero, mesh.dp)
    factors = sharded.weights, sharded.gradients, sharded.optimizer
    heaviest = StageMemory(*(int(shares.held.max() * factor) for factor in factors))
    hidden = shares.backward + shares.forward * bool(layout.zero)
    after = after_seconds(mesh, hardware, [heaviest], 0, zero=layout.zero, hidden=hidden, micro_batches=m)
    at_once = np.array([min(m, mesh.pp - s) for s in range(mesh.pp)]) * 1.0
    if layout.chunks > 1:
        at_once = np.minimum(at_once + (mesh.pp - 1) / layout.chunks, m)
    fixed = sum(np.floor(shares.held * factor) for factor in factors)
    live = shares.saved * at_once + blocks * table.block
    return float(pipeline + sum(after.values())), int((fixed + live).max())


def _per_rank(amounts: Sequence[float] | Floats | Ints, ranks: int) -> Floats:
    """Sums over the stages of each rank, which are dealt in turn."""
    whole = np.zeros(-(-len(amounts) // ranks) * ranks)
    whole[: len(amounts)] = amounts
    return whole.reshape(-1, ranks).sum(axis=0)
