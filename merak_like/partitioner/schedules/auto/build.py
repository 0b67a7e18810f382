"""The order for given costs: what is known by name, list scheduling, local search, and for small jobs the proven best.

Deterministic: the same costs give the same order. Never slower than a schedule of `AS_DATA` that has the same stages on
the same ranks and fits the same memory, as these are where it starts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise, product
from math import ceil, inf
from random import Random

from merak_like.partitioner.schedules import AS_DATA
from merak_like.partitioner.schedules.action import Edges, Kind, Schedule, chain, check_edges
from merak_like.partitioner.schedules.auto.bound import lower_bound
from merak_like.partitioner.schedules.auto.exact import exact
from merak_like.partitioner.schedules.auto.greedy import Rule, greedy
from merak_like.partitioner.schedules.auto.improve import improve
from merak_like.partitioner.schedules.auto.job import Job, Orders, make_job
from merak_like.partitioner.schedules.auto.run import run
from merak_like.partitioner.schedules.interleaved import interleaved
from merak_like.partitioner.schedules.passes import split_backward
from merak_like.partitioner.schedules.scp import recompute_apart
from merak_like.partitioner.simulator import Costs, simulate

_SAME = 1e-9
_RULES = 120_000
"""Actions that list scheduling places, all rules together: some two seconds."""
_MOVES = 1_200_000
"""Actions that local search times, all moves together."""
_STATES, _SMALL = 60_000, 64
"""States of the exact search, and the most actions of a job it is tried on."""


@dataclass(frozen=True)
class Found:
    """A schedule, its seconds, and the seconds that no order can beat."""

    schedule: Schedule
    makespan: float
    bound: float

    @property
    def gap(self) -> float:
        """How much longer than the bound it takes, as a fraction; 0 means that there is no better order."""
        return max(0.0, self.makespan / self.bound - 1) if self.makespan > self.bound * (1 + _SAME) else 0.0


def auto(
    costs: Costs,
    micro_batches: int,
    *,
    stage_rank: Sequence[int] | None = None,
    edges: Edges | None = None,
    live: Sequence[float] | None = None,
    memory: Sequence[float] | None = None,
    recomputes: Collection[int] | None = None,
    split: bool = True,
    seed: int = 0,
    effort: float = 1.0,
) -> Found:
    """Return the fastest order found for these costs within each rank's memory.

    `live` limits the micro-batches alive on each rank, counted in each of its stages; `memory` the activation bytes.
    `recomputes` are the stages that recompute (those whose recompute costs something, by default); each R gets a place
    of its own. A backward is split where its weight half has a cost of its own, unless `split` says no.
    `effort` scales the search, which at 1 takes a few seconds for the largest jobs.
    """
    stages = len(costs.stages)
    stage_rank = tuple(range(stages)) if stage_rank is None else tuple(stage_rank)
    edges = chain(stages) if edges is None else edges
    check_edges(edges, stages)
    if recomputes is None:
        recomputes = [stage for stage, cost in enumerate(costs.stages) if cost.recompute > 0]
    plain = Schedule(
        stages, micro_batches, ((),) * (max(stage_rank, default=-1) + 1), stage_rank, frozenset(recomputes)
    )
    for given in (live, memory):
        if given is not None and len(given) != plain.ranks:
            raise ValueError(f"{len(given)} limits of memory for {plain.ranks} ranks: give one each")
    if live is not None and memory is not None:
        raise ValueError("limit either live micro-batches or bytes, not both")
    job = make_job(
        costs, micro_batches, stage_rank, edges, recomputes=recomputes, split=split, live=live, memory=memory
    )
    return _joined(_search(job, _known(plain, job), Random(seed), effort), costs, edges)


def _joined(found: Found, costs: Costs, edges: Edges) -> Found:
    """Make one action again of every B and the W right behind it, on the ranks where that costs no time.

    Fewer actions are less work for an engine, and what waits for a W is held no longer.
    """
    best = found
    for rank, order in enumerate(found.schedule.orders):
        whole = {b for b, w in pairwise(order) if b.kind is Kind.B and w == b._replace(kind=Kind.W)}
        left = tuple(a for a in order if a.kind is not Kind.W or a._replace(kind=Kind.B) not in whole)
        orders = (*best.schedule.orders[:rank], left, *best.schedule.orders[rank + 1 :])
        joined = replace(best.schedule, orders=orders)
        if whole and simulate(joined, costs, edges).makespan <= found.makespan * (1 + _SAME):
            best = replace(best, schedule=joined)
    return best


def _search(job: Job, known: list[Orders], random: Random, effort: float) -> Found:
    goal = lower_bound(job)
    tried: list[tuple[float, Orders]] = []

    def best() -> float:
        return min((seconds for seconds, _ in tried), default=inf)

    rules = islice(_rules(job, goal), max(4, round(effort * _RULES / job.actions)))
    for orders in (*known, *(greedy(job, rule) for rule in rules if best() > goal * (1 + _SAME))):
        times = run(job, orders) if orders is not None and job.fits(orders) else None
        if orders is not None and times is not None:
            tried.append((times.makespan, orders))
    if not tried:
        raise ValueError(_too_small(job))
    tried.sort(key=lambda each: each[0])
    starts, moves = tried[:3], min(3000, _MOVES // job.actions)
    for _, orders in starts:
        if best() > goal * (1 + _SAME):
            improved, seconds = improve(
                job, orders, goal=goal, moves=round(effort * moves / len(starts)), random=random
            )
            tried.append((seconds, improved))
    seconds, orders = min(tried, key=lambda each: each[0])
    if job.actions <= _SMALL:
        seconds, orders, goal = _prove(job, seconds, orders, goal, round(effort * _STATES))
    return Found(job.schedule(orders), seconds, min(goal, seconds))


def _prove(job: Job, seconds: float, orders: Orders, goal: float, states: int) -> tuple[float, Orders, float]:
    """Return the best orders, their seconds, and the bound, which is the same where the search came to its end.

    The less time an order may take, the fewer there are to look at. So ask for little more than the bound first.
    """
    for part in (0.0, 0.1, 0.3, 1.0):
        if seconds <= goal * (1 + _SAME):
            break
        target = goal * (1 + 4 * _SAME) + part * (seconds - goal)
        better, certain = exact(job, min(target, seconds), states)
        if better is not None:
            times = run(job, better)
            assert times is not None
            return times.makespan, better, times.makespan
        if not certain:
            break
        goal = seconds if target >= seconds else target * (1 - _SAME)
    return seconds, orders, goal


def _known(plain: Schedule, job: Job) -> list[Orders]:
    """Return the orders of the schedules known by name that have these stages on these ranks."""
    ranks, micro_batches = plain.ranks, plain.micro_batches
    chunks = plain.stages // max(ranks, 1)
    named = [build(ranks, micro_batches) for build in AS_DATA.values()]
    found: list[Orders] = []
    for schedule in (*named, interleaved(ranks, micro_batches, max(chunks, 1))):
        if schedule.stage_rank != plain.stage_rank:
            continue
        orders = job.orders(split_backward(recompute_apart(replace(schedule, recomputes=plain.recomputes))))
        if orders not in found:
            found.append(orders)
    return found


def _rules(job: Job, goal: float) -> Iterator[Rule]:
    """Yield rules, the most promising first: as many micro-batches under way as a full pipeline needs, then more."""
    m = job.micro_batches
    cycle = max(goal / m, 1e-300)
    needed: list[int] = []
    for own in job.of_rank:
        enter = min((job.heads[c] for c in own), default=0.0)
        leave = max((job.heads[c] + job.seconds[c] for c in own if job.kinds[c] is Kind.B), default=0.0)
        needed.append(min(m, max(1, ceil((leave - enter) / cycle - _SAME))))
    grown = ((1, 0), (0, m), (1, 1), (1, 2), (2, 0), (3, 0))
    caps = list(dict.fromkeys(tuple(min(m, times * n + more) for n in needed) for times, more in grown))
    for slack, first in product((1.0, 0.0, 0.5), (Kind.B, Kind.F)):
        for cap in caps:
            yield Rule(cap, first, slack)
    for slack, first, upward, early in product((1.0, 0.0, 0.5), (Kind.B, Kind.F), (False, True), (0, 2)):
        for cap in caps:
            yield Rule(cap, first, slack, upward, early)


def _too_small(job: Job) -> str:
    least: list[str] = []
    for rank, own in enumerate(job.of_rank):
        if (needs := sum(max(0.0, job.during[c]) for c in own)) > job.limit[rank]:
            least.append(f"rank {rank} needs {needs:g} for one micro-batch and has {job.limit[rank]:g}")
    return "the memory is too small for any order: " + ("; ".join(least) or "no rank's limit leaves room to go on")
