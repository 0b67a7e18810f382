"""What to say when no partition fits the memory: how much is missing where, and changes that were tried and do fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict

from merak_like.partitioner.batches import divisors
from merak_like.partitioner.feasible import first_fit, fits, least_memory
from merak_like.partitioner.problem import Problem

Try = Callable[[int, int, str], Problem]
"""The problem with so many micro-batches and stages, and a schedule."""
MORE_STAGES = 64
"""As many additional stages are tried."""


def too_little_memory(problem: Problem, other: Try, samples: int) -> ValueError:
    """The error for a problem without a solution.

    ``other`` makes the problems of the changes that are tried, ``samples`` are those of one replica and step.
    """
    job = problem.job
    needed, starts = least_memory(problem)
    memory = problem.stage_memory(starts)
    stage = max(range(len(memory)), key=lambda s: memory[s].total)
    kinds = asdict(memory[stage])
    kind = max(kinds, key=lambda name: kinds[name])
    changes = list(_changes(problem, other, samples))
    changes.append(f"devices where a rank may use {needed / 1e9:.2f} GB (memory_limit={needed})")
    return ValueError(
        f"no way to cut {len(starts) - 1} stages fits the memory: with the best, stage {stage} needs "
        f"{needed / 1e9:.2f} GB of {job.memory_limit / 1e9:.2f} GB, {kinds[kind] / 1e9:.2f} GB of it {kind} "
        f"({job.live[stage]} of {job.micro_batches} micro-batches alive, schedule {job.schedule}). "
        f"What fits: {'; or '.join(changes)}"
    )


def _changes(problem: Problem, other: Try, samples: int) -> Iterator[str]:
    """Single changes that were tried and fit, the nearest of each kind."""
    job = problem.job
    pp, m, schedule = job.mesh.pp, job.micro_batches, job.schedule
    if schedule != "1f1b" and fits(other(m, pp, "1f1b")):
        yield "schedule='1f1b'"
    # More and smaller micro-batches never need more memory, so bisection finds the fewest.
    more = [number for number in divisors(samples) if number > m]
    if more and fits(other(more[-1], pp, schedule)):
        nearest = more[bisect_left(more[:-1], True, key=lambda number: fits(other(number, pp, schedule)))]
        yield f"micro_batches={nearest} (of {samples // nearest} samples instead of {samples // m})"
    if (stages := _more_stages(problem, other)) is not None:
        yield f"pp={stages}"


def _more_stages(problem: Problem, other: Try) -> int | None:
    job = problem.job
    pp, m, schedule = job.mesh.pp, job.micro_batches, job.schedule
    try:
        tried = problem if pp > 1 else other(m, pp + 1, schedule)
        least = first_fit(tried, pp + 1, min(tried.size, pp + MORE_STAGES)) if tried.size > pp else None
        while least is not None:
            tried = other(m, least, schedule)  # more stages may be cut at other places
            if fits(tried):
                return least
            least = first_fit(tried, least + 1, min(tried.size, pp + MORE_STAGES)) if tried.size > least else None
    except ValueError:  # more stages than places to cut
        pass
    return None
