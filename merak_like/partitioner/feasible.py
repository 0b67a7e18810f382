"""Whether any partition fits the memory, and how much the fullest rank takes at least: chain partitions of bytes."""

from __future__ import annotations

import numpy as np

from merak_like.partitioner.balance import Floats, band_width, beyond, bottleneck
from merak_like.partitioner.cuts import Bools
from merak_like.partitioner.memory import Bands
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.schedules import builder


def least_memory(problem: Problem) -> tuple[int, tuple[int, ...]]:
    """The bytes of the fullest rank, and the partition that makes them least."""
    job, size = problem.job, problem.size
    width, least = min(-(-size // job.mesh.pp) * 2, size), problem.memory.least(problem.positions)
    while True:
        bands, out = problem.bands(width), beyond(size, width)

        def cost(k: int, bands: Bands = bands, out: Bools = out) -> Floats:
            return np.where(out, np.inf, bands.total(job.live[job.mesh.pp - 1 - k]).astype(np.float64))

        found = bottleneck(size, job.mesh.pp, cost)
        widest = band_width(least, found[0]) if found is not None else size
        if found is not None and widest <= width:
            return int(found[0]), found[1]
        assert width < size, "any number of stages up to the number of segments can be cut"
        width = min(2 * width if found is None else widest, size)


def fits(problem: Problem) -> bool:
    """Whether some partition keeps to the memory limit."""
    stages = problem.job.mesh.pp
    return first_fit(problem, stages, stages) is not None


def first_fit(problem: Problem, fewest: int, most: int) -> int | None:
    """The least number of stages, within limits, of which some partition fits."""
    job, size = problem.job, problem.size
    live = builder(job.schedule)(most, job.micro_batches).peak_live()[::-1]
    width = band_width(problem.memory.least(problem.positions), job.memory_limit)
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
