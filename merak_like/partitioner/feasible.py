"""Whether any partition fits the memory, and how much the fullest rank takes at least: chain partitions of bytes.

Exact with one stage per rank. Where ranks have several, each stage is looked at as if it had the rank for itself: what
does not fit here does not fit at all, what fits may still be too much together.
"""

from __future__ import annotations

import numpy as np

from merak_like.partitioner.balance import band_width, beyond, bottleneck
from merak_like.partitioner.problem import Problem


def least_memory(problem: Problem) -> tuple[int, tuple[int, ...]]:
    """The bytes of the fullest stage with its micro-batches, and the partition that makes them least."""
    stages, size = problem.job.stages, problem.size
    width, least = min(-(-size // stages) * 2, size), problem.memory.least(problem.positions)
    while True:
        needs, out = problem.least_bytes(width), beyond(size, width)
        tables = [np.where(out, np.inf, need.astype(np.float64)) for need in needs]
        found = bottleneck(size, stages, tables.__getitem__)
        widest = band_width(least, found[0]) if found is not None else size
        if found is not None and widest <= width:
            return int(found[0]), found[1]
        assert width < size, "any number of stages up to the number of segments can be cut"
        width = min(2 * width if found is None else widest, size)


def cut_fits(problem: Problem) -> bool:
    """Whether there is a partition of which every stage fits a rank."""
    width = fullest_width(problem)
    reaches = np.zeros(problem.size + 1, np.bool_)
    reaches[problem.size] = True
    for fits in problem.within(width):
        padded = np.concatenate([reaches[1:], np.zeros(width, np.bool_)])
        after = np.lib.stride_tricks.sliding_window_view(padded, width)[: problem.size]
        reaches = np.append((fits & after).any(axis=1), False)
    return bool(reaches[0])


def fullest_width(problem: Problem) -> int:
    """Segments in the longest range that may fit the memory."""
    return band_width(problem.memory.least(problem.positions), problem.job.memory_limit)
