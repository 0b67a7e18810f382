"""From a graph and a mesh to a plan: every decision of a run, made once, by pure functions of the arguments.

graph ─► costs ─► pieces ─► candidates ─► search (chain partition, bound, simulation) ─► plan
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from merak_like.partitioner.assemble import assemble
from merak_like.partitioner.batches import divide, traced_samples
from merak_like.partitioner.blocks import Piece, units
from merak_like.partitioner.candidates import candidates
from merak_like.partitioner.cost import Cost, CostTable, Hardware, hardware_named, op_costs
from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.infeasible import too_little_memory
from merak_like.partitioner.memory import ADAMW, MemoryModel, StateBytes
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.notes import notes
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.problem import Job, Problem
from merak_like.partitioner.schedules import builder
from merak_like.partitioner.search import quick, search
from merak_like.partitioner.traffic import Traffic


def make_plan(
    graph: ProxyGraph,
    mesh: Mesh,
    *,
    hardware: Hardware | str,
    batch: int,
    micro_batches: int | None = None,
    micro_batch: int | None = None,
    schedule: str = "1f1b",
    memory_limit: int | None = None,
    states: StateBytes = ADAMW,
    signature: Mapping[str, str] | None = None,
) -> Plan:
    """Decide how to train a graph on a mesh, ``batch`` samples a step.

    ``hardware`` is a preset's name or your own. ``memory_limit`` is in bytes, by default what the hardware can use.
    ``states`` says what the optimizer keeps. Left to choose, the number of micro-batches is the one whose quickest
    partition is simulated to be fastest. Costs of another micro-batch size than the traced one are scaled.

    Raises ValueError, with what was asked, what was found and the nearest thing that works, for a mesh, batch or
    schedule that cannot be, for more stages than the graph can be cut into, and for stages that do not fit the memory.
    """
    if mesh.tp > 1:
        raise ValueError(f"tp = {mesh.tp}: tensor parallelism is not available yet, use tp = 1 and more dp or pp")
    if not graph.ops:
        raise ValueError("the graph has no ops: there is nothing to plan")
    builder(schedule)
    asked = Asked(
        graph, mesh, hardware_named(hardware) if isinstance(hardware, str) else hardware, batch, schedule,
        memory_limit, states,
    )  # fmt: skip
    tried = [asked.setting(m) for m in divide(batch, mesh.dp, mesh.pp, micro_batches, micro_batch)]
    quickest = [quick(setting.problem) for setting in tried] if len(tried) > 1 else [None]
    steps = [found.timeline.makespan if found else float("inf") for found in quickest]
    setting = tried[int(np.argmin(steps))] if min(steps) < float("inf") else tried[-1]
    found = search(setting.problem)
    if found is None:
        raise too_little_memory(setting.problem, asked.problem, batch // mesh.dp)
    compared = {s.problem.job.micro_batches: step for s, step in zip(tried, steps, strict=True)} if tried[1:] else {}
    starts = tuple(int(setting.problem.positions[start]) for start in found.starts)
    return assemble(
        graph, setting.problem, setting.costs, setting.pieces, starts, found.timeline,
        micro_batch=batch // mesh.dp // setting.problem.job.micro_batches,
        signature=dict(signature or {}),
        notes=notes(graph, setting.problem, setting.pieces, found, compared, setting.scale),
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One number of micro-batches, with all that follows from it."""

    problem: Problem
    costs: tuple[Cost, ...]
    pieces: tuple[Piece, ...]
    scale: float
    """Samples per micro-batch over samples traced."""


@dataclass(frozen=True)
class Asked:
    """The arguments of a plan, to try other values of some."""

    graph: ProxyGraph
    mesh: Mesh
    hardware: Hardware
    batch: int
    schedule: str
    memory_limit: int | None
    states: StateBytes

    def setting(self, micro_batches: int, *, pp: int | None = None, schedule: str | None = None) -> Setting:
        """What follows from a number of micro-batches, and perhaps from another number of stages or schedule.

        Raises ValueError for more stages than can be cut.
        """
        graph, mesh = self.graph, self.mesh if pp is None else Mesh(self.mesh.dp, pp, self.mesh.tp)
        scale = self.batch / mesh.dp / micro_batches / traced_samples(graph)
        costs = op_costs(graph, self.hardware, scale=scale)
        cuts = find_cuts(graph)
        pieces = units(graph, costs, mesh.pp, cuts)
        tried = candidates(graph, costs, cuts, pieces) if mesh.pp > 1 else np.zeros(0, np.int64)
        if mesh.pp > len(tried) + 1:
            raise ValueError(
                f"pp = {mesh.pp} stages, but {graph.model or 'the graph'} can be cut at {len(tried)} places only "
                f"({len(graph.ops)} ops, {int(cuts.legal.sum())} legal cuts): use pp = {len(tried) + 1} or fewer"
            )
        positions = np.concatenate([[0], tried, [len(graph.ops)]]).astype(np.int64)
        limit = self.hardware.memory_limit if self.memory_limit is None else self.memory_limit
        problem = Problem(
            Job(mesh, self.hardware, schedule or self.schedule, micro_batches, limit),
            positions,
            CostTable.of(costs).at(positions),
            MemoryModel(graph, self.states, scale=scale),
            Traffic(graph, positions, scale=scale),
        )
        return Setting(problem, costs, pieces, scale)

    def problem(self, micro_batches: int, pp: int, schedule: str) -> Problem:
        """The problem of other choices."""
        return self.setting(micro_batches, pp=pp, schedule=schedule).problem
