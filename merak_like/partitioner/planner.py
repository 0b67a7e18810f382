"""From a graph and a mesh to a plan: every decision of a run, made once, by pure functions of the arguments.

graph ─► costs ─► pieces ─► candidates ─► search (chain partition, recompute, bound, simulation) ─► order ─► plan
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from merak_like.partitioner.assemble import Setting, assemble
from merak_like.partitioner.basis import remembered
from merak_like.partitioner.batches import divide, traced_samples
from merak_like.partitioner.blocks import Piece, repeated, units
from merak_like.partitioner.candidates import candidates
from merak_like.partitioner.coding import Coding
from merak_like.partitioner.cost import CostTable, Hardware, hardware_named, op_costs
from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.gathering import gathered_bytes
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.infeasible import too_little_memory
from merak_like.partitioner.job import RECOMPUTE, Job
from merak_like.partitioner.keeping import as_computed_again
from merak_like.partitioner.memory import MemoryModel
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.notes import notes
from merak_like.partitioner.one_rank import Sources
from merak_like.partitioner.ordering import arrange
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.schedules import AS_DATA, AUTO, AUTO_V
from merak_like.partitioner.schedules.action import known
from merak_like.partitioner.search import quick, search
from merak_like.partitioner.sharding import ShardedBlock
from merak_like.partitioner.software import TORCH, Software
from merak_like.partitioner.states import ADAMW, StateBytes
from merak_like.partitioner.traffic import Traffic

CHUNKS = 2
"""Stages per rank of an interleaved schedule when nobody says."""


@remembered
def make_plan(
    graph: ProxyGraph,
    mesh: Mesh,
    *,
    hardware: Hardware | str,
    batch: int,
    micro_batches: int | None = None,
    micro_batch: int | None = None,
    schedule: str = "1f1b",
    chunks: int | None = None,
    recompute: str = "auto",
    memory_limit: int | None = None,
    states: StateBytes = ADAMW,
    zero: int = 0,
    sequence_parallel: bool = False,
    sources: Sources | None = None,
    software: Software | None = None,
    thorough: bool = True,
    signature: Mapping[str, str] | None = None,
    sharding: Sequence[ShardedBlock] = (),
    coding: Coding | None = None,
) -> Plan:
    """Decide how to train a graph on a mesh, ``batch`` samples a step.

    ``hardware`` is a preset's name or your own. ``memory_limit`` is in bytes per rank, by default what the hardware can
    use. ``states`` says what the optimizer keeps. Left to choose, the number of micro-batches is the one whose quickest
    partition is simulated to be fastest. Costs of another micro-batch size than the traced one are scaled.

    ``schedule`` is a name of ``schedules.AS_DATA``, or ``auto`` or ``auto-v``, whose order is built for the stages
    found. ``chunks`` are the stages per rank of ``interleaved`` (2 by default). ``recompute``: ``auto`` computes as
    little again as the memory asks for, ``none`` nothing, ``full`` all that the schedule lets be computed again,
    ``blocks`` the same a block at a time.

    For ``tp`` above 1 the graph is that of one rank, or ``sources`` has the trace that it is made of, and ``sharding``
    says how; ``software`` other than torch's own kernels needs ``sources``, too. Unless ``thorough``, the partition is
    the best of few seeds.
    ``zero`` is the ZeRO level; ``sequence_parallel`` divides along the sequence what tp ranks would all have;
    ``coding`` says what transfers between stages shrink to.

    Raises ValueError, with what was asked, what was found and the nearest thing that works, for a mesh, batch or
    schedule that cannot be, for more stages than the graph can be cut into, and for stages that do not fit the memory.
    """
    asked = ask(
        graph, mesh, hardware=hardware, batch=batch, schedule=schedule, chunks=chunks, recompute=recompute,
        memory_limit=memory_limit, states=states, zero=zero, sequence_parallel=sequence_parallel, sources=sources,
        software=software, coding=coding,
    )  # fmt: skip
    tried = [asked.setting(m) for m in divide(batch, mesh.dp, mesh.pp, micro_batches, micro_batch)]
    quickest = [quick(setting.problem) for setting in tried] if len(tried) > 1 else [None]
    steps = [found.judged.timeline.makespan if found else float("inf") for found in quickest]
    setting = tried[int(np.argmin(steps))] if min(steps) < float("inf") else tried[-1]
    arranged = arrange(setting.problem, search if thorough else quick)
    if arranged is None:
        raise too_little_memory(setting.problem, partial(asked.problem, setting), batch // mesh.dp)
    compared = {s.problem.job.micro_batches: step for s, step in zip(tried, steps, strict=True)} if tried[1:] else {}
    return assemble(
        asked.graph, setting, arranged.found.starts, arranged.judged,
        micro_batch=batch // mesh.dp // setting.problem.job.micro_batches,
        signature=dict(signature or {}),
        sharding=sharding,
        notes=notes(asked.graph, setting, arranged, compared),
    )  # fmt: skip


def ask(
    graph: ProxyGraph, mesh: Mesh, *, hardware: Hardware | str, batch: int, schedule: str = "1f1b",
    chunks: int | None = None, recompute: str = "auto", memory_limit: int | None = None, states: StateBytes = ADAMW,
    zero: int = 0, sequence_parallel: bool = False, sources: Sources | None = None, software: Software | None = None,
    coding: Coding | None = None,
) -> Asked:  # fmt: skip
    """The arguments of ``make_plan``, checked."""
    if not graph.ops:
        raise ValueError("the graph has no ops: there is nothing to plan")
    software = software or TORCH
    if zero not in range(4):
        raise ValueError(f"zero = {zero} is no ZeRO level: use 0, 1, 2 or 3")
    if sequence_parallel and mesh.tp == 1:
        raise ValueError("sequence_parallel divides what tensor-parallel ranks share, but tp is 1: use tp = 2 or more")
    if sources is None and software != TORCH:
        raise ValueError(f"{software.kernels} kernels are planned from the fine trace: pass sources=")
    if sources is not None:
        graph = sources.base(mesh.tp)
    device = hardware_named(hardware) if isinstance(hardware, str) else hardware
    of_rank = sources.rank(mesh.tp, software, sequence_parallel=sequence_parallel) if sources is not None else graph
    return Asked(
        graph, of_rank, mesh, replace(device, kernels=software.kernels), batch, schedule,
        stages_per_rank(schedule, chunks), known(recompute, "recompute", RECOMPUTE), memory_limit, states, zero,
        sequence_parallel, software, coding,
    )  # fmt: skip


def stages_per_rank(schedule: str, chunks: int | None) -> int:
    """The stages per rank that were asked for (1 where the schedule says it itself); ValueError if it cannot be."""
    known(schedule, "schedule", (*AS_DATA, AUTO, AUTO_V))
    if schedule != "interleaved":
        if chunks is not None:
            raise ValueError(
                f"chunks = {chunks} has no meaning for schedule {schedule!r}: only 'interleaved' lets you choose how "
                "many stages a rank has"
            )
        return 1
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks = {chunks}: a rank needs at least one stage")
    return CHUNKS if chunks is None else chunks


@dataclass(frozen=True)
class Asked:
    """The arguments of a plan, to try other values of some."""

    graph: ProxyGraph
    of_rank: ProxyGraph
    """The same as one tensor-parallel rank runs it."""
    mesh: Mesh
    hardware: Hardware
    batch: int
    schedule: str
    chunks: int
    recompute: str
    memory_limit: int | None
    states: StateBytes
    zero: int
    sequence_parallel: bool
    software: Software
    coding: Coding | None = None

    def setting(self, micro_batches: int) -> Setting:
        """What follows from a number of micro-batches.

        Raises ValueError for more stages than can be cut.
        """
        graph, mesh = self.of_rank, self.mesh
        limit = self.hardware.memory_limit if self.memory_limit is None else self.memory_limit
        job = Job(mesh, self.hardware, self.schedule, micro_batches, limit, self.chunks, self.recompute, self.coding)
        scale = self.batch / mesh.dp / micro_batches / traced_samples(graph)
        costs = op_costs(graph, self.hardware, scale=scale)
        cuts = find_cuts(graph)
        pieces = units(graph, costs, job.stages, cuts)
        if (again := _as_asked(graph, job, pieces)) is not graph:
            graph, costs = again, op_costs(again, self.hardware, scale=scale)
            pieces = units(graph, costs, job.stages, cuts)
        tried = candidates(graph, costs, cuts, pieces) if job.stages > 1 else np.zeros(0, np.int64)
        if job.stages > len(tried) + 1:
            each = job.stages // mesh.pp
            raise ValueError(
                f"pp = {mesh.pp}{f' with {each} stages per rank' if each > 1 else ' stages'}, but "
                f"{graph.model or 'the graph'} can be cut at {len(tried)} places only "
                f"({len(graph.ops)} ops, {int(cuts.legal.sum())} legal cuts): {_fewer(len(tried) + 1, each)}"
            )
        positions = np.concatenate([[0], tried, [len(graph.ops)]]).astype(np.int64)
        blocks = repeated(graph, pieces)
        spread = self.zero >= 3 and mesh.dp > 1
        whole = gathered_bytes(graph, blocks.tolist(), self.states, scale=scale, stages=job.stages) if spread else ()
        problem = Problem(
            job,
            positions,
            CostTable.of(costs),
            MemoryModel(graph, self.states.sharded(self.zero, mesh.dp), scale=scale, gathered=whole),
            Traffic(graph, positions, scale=scale),
            np.array([*(piece.first for piece in pieces), len(graph.ops)], np.int64),
            blocks,
        )
        return Setting(problem, costs, pieces, scale, self.zero, self.sequence_parallel, self.software)

    def problem(self, setting: Setting, **changes: Any) -> Problem:
        """The problem of a setting with changes: ``micro_batches``, ``pp``, ``schedule`` or ``recompute``."""
        m = changes.pop("micro_batches", setting.problem.job.micro_batches)
        if "pp" in changes:
            changes["mesh"] = replace(self.mesh, pp=changes.pop("pp"))
        if "schedule" in changes:
            changes["chunks"] = stages_per_rank(changes["schedule"], None)
        return replace(self, **changes).setting(m).problem


def _as_asked(graph: ProxyGraph, job: Job, pieces: Sequence[Piece]) -> ProxyGraph:
    """The graph as it runs where all stages compute again what the caller's own word says: that is not packed."""
    if job.recompute not in ("full", "blocks") or len(job.recomputes) < job.stages:
        return graph
    blocks: list[int] = repeated(graph, pieces).tolist() if job.recompute == "blocks" else []
    first, stop = (blocks[0], blocks[-1]) if blocks else (0, len(graph.ops))
    return as_computed_again(graph, first, stop)


def _fewer(stages: int, each: int) -> str:
    return f"use pp = {stages // each} or fewer" if stages >= each else "use a schedule of one stage per rank"
