"""A layout in a millisecond: the step and the fullest rank, from running sums over the units of a model.

The estimate is what the planner would find if work could be cut at the borders of units so that the slowest stage has
the least: ``sum of the stages + (m - 1) * slowest`` (Zheng et al. 2022, sec. 5.2); with an interleaved schedule filling
and draining take the part of one chunk (Narayanan et al. 2021, sec. 2.2). Memory counts the micro-batches that 1F1B
keeps on each stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from merak_like.partitioner.after import after_seconds
from merak_like.partitioner.balance import Floats, Ints
from merak_like.partitioner.batches import traced_samples
from merak_like.partitioner.blocks import units
from merak_like.partitioner.cost import op_costs
from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.layouts import Layout
from merak_like.partitioner.one_rank import Sources
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
    block: int
    """Most that one unit saves."""
    entering: int
    """What enters a block."""


@dataclass
class Tables:
    """Made once for each graph of a rank and size of micro-batch."""

    sources: Sources
    hardware: Hardware
    software: Software
    _borders: dict[bool, Ints] = field(default_factory=dict[bool, Ints])
    _made: dict[tuple[int, bool, bool, int], Table] = field(default_factory=dict[tuple[int, bool, bool, int], Table])

    def of(self, layout: Layout) -> Table:
        tp, selective = layout.mesh.tp, layout.recompute == "selective"
        key = tp, selective, layout.sequence_parallel, layout.micro_batch
        if key not in self._made:
            software = replace(self.software, selective=selective)
            graph = self.sources.rank(tp, software, sequence_parallel=layout.sequence_parallel)
            self._made[key] = self._table(graph, self.borders(graph, tp > 1), layout.micro_batch)
        return self._made[key]

    def borders(self, graph: ProxyGraph, fine: bool) -> Ints:
        if fine not in self._borders:
            costs = op_costs(graph, self.hardware)
            pieces = units(graph, costs, 64, find_cuts(graph))
            self._borders[fine] = np.array([*(piece.first for piece in pieces), len(graph.ops)], np.int64)
        return self._borders[fine]

    def _table(self, graph: ProxyGraph, borders: Ints, micro_batch: int) -> Table:
        scale = micro_batch / traced_samples(graph)
        kinds, alike = graph.alike
        costs = op_costs(graph, self.hardware, scale=scale)
        each = np.array([(costs[i].forward_seconds, costs[i].backward_seconds) for i in kinds])[list(alike)]
        sums = np.vstack([np.zeros((1, 2)), np.cumsum(each, axis=0)])[borders]
        saved: Floats = np.cumsum(np.array([0, *(op.saved_bytes for op in graph.ops)], np.float64))[borders] * scale
        reads, seen = np.zeros(len(graph.ops) + 1), set[str]()
        for index, op in enumerate(graph.ops):
            for name in op.params:
                if (first := graph.canonical[name]) not in seen:
                    seen.add(first)
                    reads[index + 1] += graph.parameter(first).nbytes
        live = find_live(graph, borders) * scale
        return Table(
            np.ascontiguousarray(sums[:, 0]), np.ascontiguousarray(sums[:, 1]), saved.astype(np.int64),
            np.cumsum(reads)[borders].astype(np.int64), int(np.diff(saved).max()),
            int(np.median(live[1:-1])) if len(live) > 2 else 0,
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
    starts = np.zeros(0, np.int64)
    while True:
        middle = low if not len(starts) else (low + high) / 2
        made = [0]
        while made[-1] < len(work) - 1 and len(made) <= stages:
            reach = float(work[made[-1]]) + middle * (1 + 1e-9)
            made.append(int(np.searchsorted(work, reach, side="right")) - 1)  # pyright: ignore[reportUnknownArgumentType]
        if made[-1] == len(work) - 1:
            high, starts = middle, np.array(made, np.int64)
            if middle == low or high - low < 3e-3 * high:
                return starts
        else:
            low = middle
            if not len(starts):
                starts = np.array([0, len(work) - 1], np.int64)


def estimate(layout: Layout, tables: Tables, hardware: Hardware, states: StateBytes) -> tuple[float, int]:
    """Seconds of the step, and bytes of the fullest rank."""
    table, mesh, m = tables.of(layout), layout.mesh, layout.micro_batches
    stages = mesh.pp * layout.chunks
    if stages > len(table.forward) - 1:
        return float("inf"), 2**62
    blocks = layout.recompute in ("blocks", "full", "auto")
    work = table.forward + table.backward + table.forward * (layout.recompute in ("blocks", "full"))
    starts = _cut(work, stages)
    each = np.diff(work[starts])
    slowest = _per_rank(each, mesh.pp).max() if layout.chunks > 1 else each.max()
    hop = hardware.link(0, mesh.tp).seconds(table.entering / (mesh.tp if hardware.kernels == "fused" else 1))
    pipeline = (m - 1) * slowest + each.sum() / layout.chunks + 2 * hop * (stages - 1)
    if layout.chunks > 1:
        pipeline = m * slowest + (mesh.pp - 1) * slowest / layout.chunks + 2 * hop * (stages - 1)
    sharded = states.sharded(layout.zero, mesh.dp)
    held = _per_rank(np.diff(table.held[starts]), mesh.pp)
    kinds = [StageMemory(*(int(n * f) for f in (sharded.weights, sharded.gradients, sharded.optimizer))) for n in held]
    rank_backward = np.diff(table.backward[starts]).min()
    rank_forward = np.diff(table.forward[starts]).min() * bool(layout.zero)
    after = after_seconds(mesh, hardware, kinds, 0, zero=layout.zero, hidden=float(rank_backward + rank_forward))
    saved = np.diff(table.saved[starts])
    if blocks:
        saved = table.entering * np.diff(starts)
    at_once = np.array([min(m, mesh.pp - s) for s in range(mesh.pp)]) * 1.0
    if layout.chunks > 1:
        at_once = np.minimum(at_once + (mesh.pp - 1) / layout.chunks, m)
    live = _per_rank(saved, mesh.pp) * at_once + blocks * table.block
    return float(pipeline + sum(after.values())), int(max(k.total + n for k, n in zip(kinds, live, strict=True)))


def _per_rank(amounts: Sequence[float] | Floats | Ints, ranks: int) -> Floats:
    """Sums over the stages of each rank, which are dealt in turn."""
    whole = np.zeros(-(-len(amounts) // ranks) * ranks)
    whole[: len(amounts)] = amounts
    return whole.reshape(-1, ranks).sum(axis=0)
