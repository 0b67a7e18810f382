"""Which blocks' activations wait in another memory: a third choice beside keeping them and computing them again.

    blocks of a stage    0 1 2 | 3 4 5        as the plan cuts them that keeps everything on the device
    how many are away    2     | 0            the first ones: in the backward they have the longest to come back

How long a step then takes is asked of whoever plans: where a copy outlasts the work that hides it, running again can be
cheaper, and which of the rest is computed again is chosen anew for each answer. Looked for are the counts, stage by
stage, in steps that halve; for up to ``ALL`` combinations each is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from math import prod

from merak_like.partitioner.graph import Call, ProxyGraph

ALL = 32
Seconds = Callable[[frozenset[str]], float]
"""From the blocks that are away to the seconds of a step; infinite where it does not fit."""


def blocks(graph: ProxyGraph) -> list[Call]:
    """The outermost calls of members of lists of modules, each once, in the order in which they run."""
    found: list[Call] = []
    for call in sorted(graph.calls, key=lambda call: (call.first, call.depth)):
        member = call.path.rpartition(".")[2].isdecimal() and call.stop > call.first
        if member and not any(one.first <= call.first and call.stop <= one.stop for one in found):
            found.append(call)
    return found


def by_stage(graph: ProxyGraph, starts: Sequence[int]) -> list[list[str]]:
    """The paths of the blocks by the stage in which they begin; one that is called again counts once."""
    stages: list[list[str]] = [[] for _ in starts[1:]]
    seen = set[str]()
    for call in blocks(graph):
        if call.path not in seen:
            seen.add(call.path)
            stages[max(n for n, start in enumerate(starts[:-1]) if start <= call.first)].append(call.path)
    return stages


def chosen(stages: Sequence[Sequence[str]], seconds: Seconds) -> frozenset[str]:
    """The blocks that are best away; empty where nothing is gained by it, or nothing fits."""
    sizes = [len(stage) for stage in stages]

    def away(counts: Sequence[int]) -> frozenset[str]:
        return frozenset(path for stage, count in zip(stages, counts, strict=True) for path in stage[:count])

    @cache
    def takes(counts: tuple[int, ...]) -> tuple[float, int]:
        return seconds(away(counts)), sum(counts)

    nothing, everything = tuple(0 for _ in sizes), tuple(sizes)
    if prod(size + 1 for size in sizes) <= ALL:
        best = min(product(*(range(size + 1) for size in sizes)), key=takes)
    else:
        best = min((nothing, everything), key=takes)
        stride = max(sizes)
        while stride:
            near = [
                (*best[:at], min(max(best[at] + way, 0), size), *best[at + 1 :])
                for at, size in enumerate(sizes)
                for way in (-stride, stride)
            ]
            better = min(near, key=takes)
            if takes(better) < takes(best):
                best = better
            else:
                stride //= 2
    return away(best)
