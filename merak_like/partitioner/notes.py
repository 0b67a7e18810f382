"""Why a plan is as it is, in sentences: what binds, what was compared, what was assumed."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb

import numpy as np

from merak_like.partitioner.assemble import Setting
from merak_like.partitioner.blocks import begins
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.job import STAND_IN
from merak_like.partitioner.judge import Judge, Judged
from merak_like.partitioner.locality import unused
from merak_like.partitioner.ordering import Arranged
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.recompute import peak
from merak_like.partitioner.schedules.auto.build import Found as Order
from merak_like.partitioner.search import Found


def notes(
    graph: ProxyGraph,
    setting: Setting,
    arranged: Arranged,
    micro_batches: Mapping[int, float],
) -> tuple[str, ...]:
    """The sentences. ``micro_batches`` maps other numbers that were tried to seconds (infinite: does not fit)."""
    problem, found, judged, order = setting.problem, arranged.found, arranged.judged, arranged.order
    told = [*_assumed(graph, setting), *_binding(problem, judged), *_recomputed(problem, judged)]
    if problem.job.stages > 1:
        told += [_searched(problem, found, arranged.cut_for), *_equal_blocks(graph, setting, found)]
    if order is not None:
        told.append(_ordered(found, judged, order, arranged.cut_for))
    if micro_batches:
        ways = [f"{m}: {'too little memory' if s == float('inf') else _seconds(s)}" for m, s in micro_batches.items()]
        by = "the pipeline of its quickest partition"
        told.append(f"numbers of micro-batches compared, each by {by}: {', '.join(ways)}")
    return tuple(told)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"


def _assumed(graph: ProxyGraph, setting: Setting) -> list[str]:
    hardware, scale = setting.problem.job.hardware, setting.scale
    told = [
        f"costs are estimated from flops and bytes for {hardware.name} ({hardware.source or 'figures given'}), "
        f"no op was timed; kernels: {setting.software}"
    ]
    if (coding := setting.problem.job.coding) is not None:
        told.append(
            f"values between ranks go through {coding.text}: {coding.share:.3g} of their bytes travel"
            f"{', from the second epoch on (a first visit is whole),' if coding.later else ','} and what coding takes "
            "is counted to the transfer"
            if setting.problem.job.mesh.pp > 1
            else f"one pipeline rank sends nothing to another: {coding.text} has nothing to do"
        )
    if scale != 1:
        told.append(
            f"a micro-batch is {scale:.4g} times the traced example: costs are scaled, shapes are those of the example"
        )
    if idle := unused(graph):
        told.append(f"no op reads {len(idle)} parameters or buffers ({', '.join(idle[:3])}{', ..' * (len(idle) > 3)})")
    return told


def _binding(problem: Problem, judged: Judged) -> list[str]:
    job = problem.job
    work = np.array([s.forward + s.backward for s in judged.stages])
    fullest = int(np.argmax(judged.rank_bytes))
    own = [s for s, rank in enumerate(job.order.stage_rank) if rank == fullest]
    told: list[str] = []
    if job.stages > 1:
        slowest = int(work.argmax())
        told.append(
            f"stage {slowest} binds: {_seconds(float(work[slowest]))} for each micro-batch, the mean stage "
            f"{_seconds(float(work.mean()))} (balance {float(work.mean() / max(work.max(), 1e-30)):.3f}); "
            f"{judged.timeline.bubble:.1%} of the step is idle"
        )
    alive = " and ".join(str(judged.timeline.peak_live[s]) for s in own)
    told.append(
        f"{_place(problem, fullest)} is fullest: {judged.rank_bytes[fullest] / 1e9:.3g} of "
        f"{job.memory_limit / 1e9:.3g} GB, with {alive} micro-batches alive"
    )
    return told


def _place(problem: Problem, rank: int) -> str:
    return f"stage {rank}" if problem.job.stages == problem.job.mesh.pp else f"rank {rank}"


def _recomputed(problem: Problem, judged: Judged) -> list[str]:
    """For each rank what is computed again, and what would be needed otherwise."""
    job, told = problem.job, list[str]()
    for rank, held in enumerate(job.held):
        again = [s for s in held.stages if judged.recompute[s]]
        if not again:
            continue
        units = sum(len(judged.recompute[s]) for s in again)
        of = sum(len(judged.stages[s].borders) - 1 for s in held.stages)
        spent = sum(judged.costs.stages[s].recompute for s in again)
        live = [judged.stages[s].live for s in held.stages]
        whole = peak(held, live, [s.full for s in live]) + judged.rank_fixed[rank]
        why = "as was asked" if job.recompute == "full" else f"to keep everything would take {whole / 1e9:.3g} GB"
        what = f"{units} of {of} units again, {_seconds(spent)} for each micro-batch"
        told.append(f"{_place(problem, rank)} computes {what}: {why}")
    return told


def _searched(problem: Problem, found: Found, cut_for: str) -> str:
    inner, cuts, job = problem.size - 1, problem.job.stages - 1, problem.job
    ways = comb(inner, cuts)
    many = f"{ways:,}" if ways < 10**9 else f"about 10^{len(str(ways)) - 1}"
    under = f" for {cut_for}" if job.schedule in STAND_IN else ""
    told = f"best of {many} ways to cut {inner} places {cuts} times{under}, {found.simulated} of them simulated: "
    if found.proven:
        return told + "optimal under the estimated costs, proven by bound"
    away = 1 - found.bound / found.judged.timeline.makespan
    return told + f"not proven optimal, but no way is more than {away:.1%} faster"


def _ordered(found: Found, judged: Judged, order: Order, cut_for: str) -> str:
    step, before = judged.timeline.makespan, found.judged.timeline.makespan
    gain = f"{cut_for} would take {_seconds(before)} ({before / step - 1:+.1%})"
    gap = max(0.0, 1 - order.bound / step)
    best = "no order is faster" if gap < 1e-9 else f"no order is more than {gap:.1%} faster"
    return f"the order is built for these stages: {gain}; {best}"


def equal_blocks(graph: ProxyGraph, setting: Setting) -> tuple[int, ...]:
    """The usual cut, by its segments: the same number of repeated blocks on each stage, what is before the first with
    the first, what is behind the last with the last. Empty where there are fewer blocks than stages."""
    problem = setting.problem
    place = {position: index for index, position in enumerate(problem.positions.tolist())}
    blocks = [place[first] for first in begins(graph, setting.pieces) if first in place]
    stages = problem.job.stages
    if len(blocks) < stages:
        return ()
    return (0, *(blocks[len(blocks) * stage // stages] for stage in range(1, stages)), problem.size)


def _equal_blocks(graph: ProxyGraph, setting: Setting, found: Found) -> list[str]:
    problem = setting.problem
    if not (starts := equal_blocks(graph, setting)):
        return []
    judged = Judge(problem)(starts)
    if judged is None:
        return ["the same number of blocks on each stage would not fit the memory"]
    step = judged.timeline.makespan
    return [
        f"the pipeline takes {_seconds(found.judged.timeline.makespan)} of the step; with the same number of blocks on "
        f"each stage it would take {_seconds(step)} ({step / found.judged.timeline.makespan - 1:+.1%})"
    ]
