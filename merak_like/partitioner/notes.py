"""Why a plan is as it is, in sentences: what binds, what was compared, what was assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import comb

import numpy as np

from merak_like.partitioner.blocks import Piece
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.locality import unused
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.search import Found


def notes(
    graph: ProxyGraph,
    problem: Problem,
    pieces: Sequence[Piece],
    found: Found,
    micro_batches: Mapping[int, float],
    scale: float,
) -> tuple[str, ...]:
    """The sentences. ``micro_batches`` maps other numbers that were tried to seconds (infinite: does not fit)."""
    told = [*_assumed(graph, problem, scale), *_binding(problem, found)]
    if problem.job.mesh.pp > 1:
        told += [_searched(problem, found), *_equal_blocks(problem, pieces, found)]
    if micro_batches:
        ways = [f"{m}: {'too little memory' if s == float('inf') else _seconds(s)}" for m, s in micro_batches.items()]
        told.append(f"numbers of micro-batches compared, each by its quickest partition: {', '.join(ways)}")
    return tuple(told)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"


def _assumed(graph: ProxyGraph, problem: Problem, scale: float) -> list[str]:
    hardware = problem.job.hardware
    told = [
        f"costs are estimated from flops and bytes for {hardware.name} ({hardware.source or 'figures given'}), "
        "not measured; the optimizer and the reduction of gradients are not in the step"
    ]
    if scale != 1:
        told.append(
            f"a micro-batch is {scale:.4g} times the traced example: costs are scaled, shapes are those of the example"
        )
    if idle := unused(graph):
        told.append(f"no op reads {len(idle)} parameters or buffers ({', '.join(idle[:3])}{', ..' * (len(idle) > 3)})")
    return told


def _binding(problem: Problem, found: Found) -> list[str]:
    job = problem.job
    work = np.diff(problem.seconds[list(found.starts)])
    memory = problem.stage_memory(found.starts)
    fullest = max(range(len(memory)), key=lambda s: memory[s].total)
    told: list[str] = []
    if job.mesh.pp > 1:
        slowest = int(work.argmax())
        told.append(
            f"stage {slowest} binds: {_seconds(float(work[slowest]))} for each micro-batch, the mean stage "
            f"{_seconds(float(work.mean()))} (balance {float(work.mean() / max(work.max(), 1e-30)):.3f}); "
            f"{found.timeline.bubble:.1%} of the step is idle"
        )
    told.append(
        f"stage {fullest} is fullest: {memory[fullest].total / 1e9:.3g} of {job.memory_limit / 1e9:.3g} GB, "
        f"with {job.live[fullest]} micro-batches alive"
    )
    return told


def _searched(problem: Problem, found: Found) -> str:
    inner, cuts = problem.size - 1, problem.job.mesh.pp - 1
    ways = comb(inner, cuts)
    many = f"{ways:,}" if ways < 10**9 else f"about 10^{len(str(ways)) - 1}"
    told = f"best of {many} ways to cut {inner} places {cuts} times, {found.simulated} of them simulated: "
    if found.proven:
        return told + "optimal under the estimated costs, proven by bound"
    away = 1 - found.bound / found.timeline.makespan
    return told + f"not proven optimal, but no way is more than {away:.1%} faster"


def _equal_blocks(problem: Problem, pieces: Sequence[Piece], found: Found) -> list[str]:
    """The usual way, as a comparison: the same number of blocks on each stage."""
    stages, positions = problem.job.mesh.pp, problem.positions.tolist()
    place = {position: index for index, position in enumerate(positions)}
    begins = [0, *(place[b.first] for a, b in pairwise(pieces) if a.block != b.block and b.first in place)]
    borders = [begins[len(begins) * stage // stages] for stage in range(1, stages)]
    starts = (0, *borders, problem.size)
    if not all(a < b for a, b in pairwise(starts)):
        return []
    step = problem.judge(starts).makespan
    room = all(memory.total <= problem.job.memory_limit for memory in problem.stage_memory(starts))
    return [
        f"the same number of blocks on each stage would take {_seconds(step)} "
        f"({step / found.timeline.makespan - 1:+.1%}){'' if room else ' and not fit the memory'}"
    ]
