"""What to say when no partition fits the memory: how much is missing where, and changes that were tried and do fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np

from merak_like.partitioner.balance import Floats, beyond, bottleneck
from merak_like.partitioner.batches import divisors
from merak_like.partitioner.cuts import Bools
from merak_like.partitioner.memory import Bands
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.schedules import builder

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


def least_memory(problem: Problem) -> tuple[int, tuple[int, ...]]:
    """The bytes of the fullest rank, and the partition that makes them least."""
    job, size = problem.job, problem.size
    width = min(-(-size // job.mesh.pp) * 2, size)
    while True:
        bands, out = problem.bands(width), beyond(size, width)

        def cost(k: int, bands: Bands = bands, out: Bools = out) -> Floats:
            return np.where(out, np.inf, bands.total(job.live[job.mesh.pp - 1 - k]).astype(np.float64))

        found = bottleneck(size, job.mesh.pp, cost)
        if width == size or (found is not None and not (bands.total(1)[: size - width + 1, -1] <= found[0]).any()):
            assert found is not None, "any number of stages up to the number of segments can be cut"
            return int(found[0]), found[1]
        width = min(width * 2, size)


def fits(problem: Problem) -> bool:
    """Whether some partition keeps to the memory limit."""
    stages = problem.job.mesh.pp
    return _first_fit(problem, stages, stages) is not None


def _first_fit(problem: Problem, fewest: int, most: int) -> int | None:
    """The least number of stages, within limits, of which some partition fits."""
    job, size = problem.job, problem.size
    live = builder(job.schedule)(most, job.micro_batches).peak_live()[::-1]
    width = _widest(problem)
    if width == 0:
        return None
    bands, out = problem.bands(width), beyond(size, width)
    reaches = np.zeros(size + 1, np.bool_)
    reaches[size] = True
    for k in range(most):
        padded = np.concatenate([reaches[1:], np.zeros(width, np.bool_)])
        after = np.lib.stride_tricks.sliding_window_view(padded, width)[:size]
        reaches = np.append(((bands.total(live[k]) <= job.memory_limit) & ~out & after).any(axis=1), False)
        if k + 1 >= fewest and reaches[0]:
            return k + 1
    return None


def _widest(problem: Problem) -> int:
    """Segments of the longest range that fits with one live micro-batch; 0 if none does."""
    size, width = problem.size, min(64, problem.size)
    while True:
        fit = (problem.bands(width).total(1) <= problem.job.memory_limit) & ~beyond(size, width)
        longest = int(np.flatnonzero(fit.any(axis=0)).max(initial=-1)) + 1
        if longest < width or width == size:
            return longest
        width = min(width * 4, size)


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
        least = _first_fit(tried, pp + 1, min(tried.size, pp + MORE_STAGES)) if tried.size > pp else None
        while least is not None:
            tried = other(m, least, schedule)  # more stages may be cut at other places
            if fits(tried):
                return least
            least = _first_fit(tried, least + 1, min(tried.size, pp + MORE_STAGES)) if tried.size > least else None
    except ValueError:  # more stages than places to cut
        pass
    return None
