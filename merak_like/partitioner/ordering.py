"""The order of a plan's actions: as its schedule's name says, or built for the stages that were found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from merak_like.partitioner.job import STAND_IN
from merak_like.partitioner.judge import Judged
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.schedules.auto.build import Found as Order
from merak_like.partitioner.schedules.auto.build import auto
from merak_like.partitioner.search import Found

EFFORT = 0.25
"""Of the search for an order: about a second for the largest jobs."""


@dataclass(frozen=True)
class Arranged:
    """A partition under its final order."""

    found: Found
    judged: Judged
    order: Order | None
    """For an order that was built: how good it is."""
    cut_for: str
    """The schedule that the partition was found for."""


def arrange(problem: Problem, search: Callable[[Problem], Found | None]) -> Arranged | None:
    """What is found for the job's schedule, in its final order; None where nothing fits.

    Where the order is built for the stages, they are cut for each schedule that stands in for it, and the fastest is
    taken: a backward that can be put off asks for other stages than one that cannot.
    """
    schedule = problem.job.schedule
    tried = list[Arranged]()
    for place, name in enumerate(STAND_IN.get(schedule, (schedule,))):
        found = search(replace(problem, job=replace(problem.job, schedule=name)) if place else problem)
        if found is not None and all(found.starts != each.found.starts for each in tried):
            tried.append(Arranged(found, *in_order(problem, found), name))
    return min(tried, key=lambda each: each.judged.timeline.makespan, default=None)


def in_order(problem: Problem, found: Found) -> tuple[Judged, Order | None]:
    """The partition under its final order, and for an order that was built how good it is.

    The order is never slower than that of the schedule the partition was found with, and stays within the memory.
    """
    job, judged = problem.job, found.judged
    if job.schedule not in STAND_IN:
        return judged, None
    order = _built(problem, judged)
    built = judged.ordered(order.schedule)
    if built.timeline.makespan < judged.timeline.makespan:
        return built, order
    return judged, replace(order, schedule=judged.schedule, makespan=judged.timeline.makespan)


def _built(problem: Problem, judged: Judged) -> Order:
    """The fastest order found within the memory."""
    job = problem.job
    build = partial(
        auto,
        judged.costs,
        job.micro_batches,
        stage_rank=job.order.stage_rank,
        edges=judged.edges,
        memory=[job.memory_limit - each for each in judged.rank_fixed],
        recomputes=[stage for stage, units in enumerate(judged.recompute) if units],
        effort=EFFORT,
    )
    try:
        return build()
    except ValueError:  # what waits for a W may be more than the activations were, and too much
        return build(split=False)
