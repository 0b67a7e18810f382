"""All choices at once: degrees, micro-batch, schedule, recompute, ZeRO and sequence form, ranked by the step.

::

    every layout of the world ──► estimate (milliseconds each) ──► the best few by the whole planner ──► ranked list

The estimate is what the planner would find if work could be cut at the borders of units so that the slowest stage has
the least: ``sum of the stages + (m - 1) * slowest`` (Zheng et al. 2022, sec. 5.2), the sum divided by the chunks of an
interleaved schedule (Narayanan et al. 2021, sec. 2.2). Memory counts the micro-batches that 1F1B keeps on each stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from merak_like.partitioner.after import after_seconds
from merak_like.partitioner.balance import Floats, Ints
from merak_like.partitioner.batches import divisors, traced_samples
from merak_like.partitioner.blocks import units
from merak_like.partitioner.cost import op_costs
from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.executable import ANYTHING, Executable
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.one_rank import Sources
from merak_like.partitioner.plan import Plan, StageMemory
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.software import Software
from merak_like.partitioner.states import ADAMW, StateBytes

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""Samples of a micro-batch that are tried."""
CHUNKS = (2, 3, 4, 6)
"""Stages per rank that are tried."""
JUDGED = 3
"""Layouts that the whole planner looks at, when nobody says."""
SLACK = 0.97
"""Share of the memory that an estimate may fill."""


@dataclass(frozen=True)
class Layout:
    """One way to run a step."""

    mesh: Mesh
    micro_batch: int
    micro_batches: int
    schedule: str
    chunks: int
    recompute: str
    zero: int
    sequence_parallel: bool


@dataclass(frozen=True)
class Ranked:
    """A layout with what is estimated of it, and its plan if the whole planner looked at it."""

    layout: Layout
    step_seconds: float
    rank_bytes: int
    """Of the fullest rank."""
    plan: Plan | None = None


@dataclass(frozen=True)
class Wanted:
    """What is asked for; None leaves it to the search."""

    world: int
    batch: int
    dp: int | None = None
    pp: int | None = None
    tp: int | None = None
    micro_batch: int | None = None
    micro_batches: int | None = None
    schedule: str | None = None
    chunks: int | None = None
    recompute: str | None = None
    zero: int | None = None
    sequence_parallel: bool | None = None
    memory_limit: int | None = None
    executable: Executable = ANYTHING


def choose(
    sources: Sources, wanted: Wanted, hardware: Hardware, software: Software, *, states: StateBytes = ADAMW,
    judged: int = JUDGED, listed: int = 12,
) -> list[Ranked]:  # fmt: skip
    """The best layouts: first the one whose plan is fastest, then others, some of which are estimated only.

    Raises ValueError where no layout is possible, or none fits the memory.
    """
    limit = hardware.memory_limit if wanted.memory_limit is None else wanted.memory_limit
    tables = _Tables(sources, hardware, software)
    found = [
        Ranked(layout, *_estimate(layout, tables, hardware, states)) for layout in layouts(sources, wanted, hardware)
    ]
    if not found:
        raise ValueError(_nothing(sources, wanted))
    fitting = sorted((r for r in found if r.rank_bytes <= limit * SLACK), key=lambda r: r.step_seconds)
    if not fitting:
        least = min(found, key=lambda r: r.rank_bytes)
        raise ValueError(
            f"no layout of {wanted.world} devices fits their memory: of {len(found)} the emptiest, {least.layout.mesh} "
            f"with micro-batches of {least.layout.micro_batch}, takes about {least.rank_bytes / 1e9:.1f} GB of "
            f"{limit / 1e9:.1f} GB: use more devices, or ones of more memory"
        )
    planned: list[Ranked] = []
    rest = list[Ranked]()
    for ranked in fitting:
        plan = _plan(ranked.layout, sources, wanted, hardware, software, states) if len(planned) < judged else None
        if plan is None:
            rest.append(ranked)
        else:
            planned.append(replace(ranked, step_seconds=plan.step_seconds, rank_bytes=max(plan.rank_bytes), plan=plan))
        if len(planned) >= judged and len(rest) + len(planned) >= listed:
            break
    planned.sort(key=lambda r: r.step_seconds)
    if planned and (best := _plan(planned[0].layout, sources, wanted, hardware, software, states, True)) is not None:
        planned[0] = replace(planned[0], step_seconds=best.step_seconds, rank_bytes=max(best.rank_bytes), plan=best)
    others = sorted([*planned[1:], *rest], key=lambda r: r.step_seconds)
    return [*planned[:1], *others][:listed]


def _plan(
    layout: Layout, sources: Sources, wanted: Wanted, hardware: Hardware, software: Software, states: StateBytes,
    thorough: bool = False,
) -> Plan | None:  # fmt: skip
    selective = layout.recompute == "selective"
    try:
        return make_plan(
            sources.base(layout.mesh.tp), layout.mesh, hardware=hardware, batch=wanted.batch,
            micro_batch=layout.micro_batch, schedule=layout.schedule,
            chunks=layout.chunks if layout.schedule == "interleaved" else None,
            recompute="none" if selective else layout.recompute, memory_limit=wanted.memory_limit, states=states,
            zero=layout.zero, sequence_parallel=layout.sequence_parallel, sources=sources,
            software=replace(software, selective=selective), thorough=thorough,
        )  # fmt: skip
    except ValueError:  # it does not fit after all, or cannot be cut as finely
        return None


def _nothing(sources: Sources, wanted: Wanted) -> str:
    given = {name: getattr(wanted, name) for name in ("dp", "pp", "tp", "micro_batch", "micro_batches")}
    told = ", ".join(f"{name} = {degree}" for name, degree in given.items() if degree is not None) or "any degrees"
    return (
        f"no layout of {sources.graph.model} on {wanted.world} devices with {told} divides the batch of {wanted.batch} "
        f"samples: dp * pp * tp must be {wanted.world}, and dp times the micro-batch must divide {wanted.batch}; "
        f"use a batch of {max(wanted.batch // wanted.world, 1) * wanted.world}"
    )


def layouts(sources: Sources, wanted: Wanted, hardware: Hardware) -> Iterator[Layout]:
    """Every layout worth an estimate. tp stays inside a node unless it is given."""
    can, world = wanted.executable, wanted.world
    most = min(hardware.devices_per_node, world, can.tp or world)
    tps = [wanted.tp] if wanted.tp else [t for t in divisors(world) if t <= most and sources.divides(t)]
    for tp in tps:
        for pp in [wanted.pp] if wanted.pp else divisors(world // tp):
            if world % (tp * pp) or (wanted.dp and wanted.dp * pp * tp != world):
                continue
            mesh = Mesh(world // tp // pp, pp, tp)
            if wanted.batch % mesh.dp:
                continue
            each = wanted.batch // mesh.dp
            sizes = MICRO_BATCHES
            if wanted.micro_batch or wanted.micro_batches:
                sizes = (wanted.micro_batch or each // (wanted.micro_batches or 1),)
            for size in sizes:
                if size > 0 and each % size == 0 and wanted.micro_batches in (None, each // size):
                    yield from _ways(Layout(mesh, size, each // size, "1f1b", 1, "none", 0, False), wanted, hardware)


def _ways(layout: Layout, wanted: Wanted, hardware: Hardware) -> Iterator[Layout]:
    mesh, can = layout.mesh, wanted.executable
    if wanted.schedule is not None:
        schedules = [(wanted.schedule, wanted.chunks or (2 if wanted.schedule == "interleaved" else 1))]
    else:
        turns = mesh.pp > 1 and layout.micro_batches % mesh.pp == 0
        schedules = [("1f1b", 1), *(("interleaved", c) for c in (wanted.chunks or 0,) or CHUNKS if c and turns)]
        if turns and wanted.chunks is None:
            schedules += [("interleaved", c) for c in CHUNKS]
    fused = hardware.kernels == "fused"
    again = ["none", *["selective"] * (fused and hardware.attention == "math"), "blocks" if fused else "auto"]
    zeros = [wanted.zero] if wanted.zero is not None else [1 if mesh.dp > 1 and 1 in can.zero else 0]
    parted = wanted.sequence_parallel
    form = (can.sequence_parallel if parted is None else parted) and mesh.tp > 1
    for (schedule, chunks), recompute, zero in product(
        schedules, again if wanted.recompute is None else [wanted.recompute], zeros
    ):
        yield replace(
            layout, schedule=schedule, chunks=chunks, recompute=recompute, zero=zero, sequence_parallel=form
        )  # fmt: skip


@dataclass(frozen=True)
class _Table:
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
class _Tables:
    """Made once for each graph of a rank and size of micro-batch."""

    sources: Sources
    hardware: Hardware
    software: Software
    _borders: dict[bool, Ints] = field(default_factory=dict[bool, Ints])
    _made: dict[tuple[int, bool, bool, int], _Table] = field(default_factory=dict[tuple[int, bool, bool, int], _Table])

    def of(self, layout: Layout) -> _Table:
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

    def _table(self, graph: ProxyGraph, borders: Ints, micro_batch: int) -> _Table:
        scale = micro_batch / traced_samples(graph)
        kinds, alike = graph.alike
        costs = op_costs(graph, self.hardware, scale=scale)
        each = np.array([(costs[i].forward_seconds, costs[i].backward_seconds) for i in kinds])[list(alike)]
        sums = np.vstack([np.zeros((1, 2)), np.cumsum(each, axis=0)])[borders]
        saved = np.concatenate([[0], np.cumsum([op.saved_bytes for op in graph.ops])])[borders] * scale
        reads, seen = np.zeros(len(graph.ops) + 1), set[str]()
        for index, op in enumerate(graph.ops):
            for name in op.params:
                if (first := graph.canonical[name]) not in seen:
                    seen.add(first)
                    reads[index + 1] += graph.parameter(first).nbytes
        live = find_live(graph, borders) * scale
        return _Table(
            np.ascontiguousarray(sums[:, 0]), np.ascontiguousarray(sums[:, 1]), saved.astype(np.int64),
            np.cumsum(reads)[borders].astype(np.int64), int(np.diff(saved).max()), int(np.median(live[1:-1])) if len(live) > 2 else 0,
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
            made.append(int(np.searchsorted(work, work[made[-1]] + middle * (1 + 1e-9), side="right")) - 1)
        if made[-1] == len(work) - 1:
            high, starts = middle, np.array(made, np.int64)
            if middle == low or high - low < 3e-3 * high:
                return starts
        else:
            low = middle
            if not len(starts):
                starts = np.array([0, len(work) - 1], np.int64)


def _estimate(layout: Layout, tables: _Tables, hardware: Hardware, states: StateBytes) -> tuple[float, int]:
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
