"""How what each block keeps waits for the backward: as it is or computed again, or by a way of its own.

    blocks of a stage    0 1 2 3 4 | 5 6 7 8        as the plan cuts them that keeps everything as it is
    in another memory    0 1       | 5              the first ones: in the backward they have the longest to come back
    in few bits              2     |   6 7          the next ones
    as it is, or again         3 4 |       8        the planner's search over recompute decides, as ever

The ways are a table that the caller brings, in this order; here they are numbers. How long a step then takes is asked
of whoever plans: where a way costs more than it saves, running again can be cheaper, and which of the rest is computed
again is chosen anew for each answer. Looked for are the counts, stage by stage and way by way, in steps that halve;
for up to ``ALL`` combinations each is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations, product
from math import comb, prod

from merak_like.partitioner.graph import Call, Plain, ProxyGraph

ALL = 50
Ways = tuple[frozenset[str], ...]
"""The blocks that go each way; those in none are kept as they are, or computed again."""
Seconds = Callable[[Ways], float]
"""From where the blocks are to the seconds of a step; infinite where it does not fit."""
Counts = tuple[tuple[int, ...], ...]
"""Of each stage, how many blocks go each way."""


def blocks(graph: ProxyGraph) -> list[Call]:
    """The outermost calls of members of lists of modules, each once, in the order in which they run."""
    found: list[Call] = []
    for call in sorted(graph.calls, key=lambda call: (call.first, call.depth)):
        member = call.path.rpartition(".")[2].isdecimal() and call.stop > call.first
        if member and not any(one.first <= call.first and call.stop <= one.stop for one in found):
            found.append(call)
    return found


def as_computed_again(graph: ProxyGraph, first: int, stop: int) -> ProxyGraph:
    """The graph where the ops of a range are computed again: what they keep does not wait, so it is as it is."""
    ops = list(graph.ops)
    for index, op in enumerate(ops[first:stop], first):
        if op.plain is not None or op.packing is not None:
            plain = op.plain or Plain(op.saved_bytes, op.keeps)
            ops[index] = replace(
                op, saved_bytes=plain.saved_bytes, keeps=plain.keeps, plain=None, packing=None, copied_seconds=0.0
            )
    return graph if all(a is b for a, b in zip(ops, graph.ops, strict=True)) else replace(graph, ops=tuple(ops))


def by_stage(graph: ProxyGraph, starts: Sequence[int]) -> list[list[str]]:
    """The paths of the blocks by the stage in which they begin; one that is called again counts once."""
    stages: list[list[str]] = [[] for _ in starts[1:]]
    seen = set[str]()
    for call in blocks(graph):
        if call.path not in seen:
            seen.add(call.path)
            stages[max(n for n, start in enumerate(starts[:-1]) if start <= call.first)].append(call.path)
    return stages


def chosen(stages: Sequence[Sequence[str]], ways: int, seconds: Seconds) -> Ways:
    """The blocks that best go each of so many ways; none where nothing is gained by it, or nothing fits."""
    sizes = [len(stage) for stage in stages]

    @cache
    def takes(counts: Counts) -> tuple[float, int]:
        return seconds(_blocks(stages, ways, counts)), sum(map(sum, counts))

    if prod(comb(size + ways, ways) for size in sizes) <= ALL:
        every = ([some for some in product(range(size + 1), repeat=ways) if sum(some) <= size] for size in sizes)
        return _blocks(stages, ways, min(product(*every), key=takes))
    all_one = [tuple(tuple(size * (n == way) for n in range(ways)) for size in sizes) for way in range(-1, ways)]
    best = min(all_one, key=takes)
    stride = max(sizes)
    while stride:
        better = min(_near(best, sizes, stride), key=takes)
        if takes(better) < takes(best):
            best = better
        else:
            stride //= 2
    return _blocks(stages, ways, best)


def _blocks(stages: Sequence[Sequence[str]], ways: int, counts: Counts) -> Ways:
    found: list[set[str]] = [set() for _ in range(ways)]
    for stage, some in zip(stages, counts, strict=True):
        first = 0
        for way, count in enumerate(some):
            found[way].update(stage[first : first + count])
            first += count
    return tuple(frozenset(paths) for paths in found)


def _near(counts: Counts, sizes: Sequence[int], stride: int) -> Iterator[Counts]:
    """Counts in which up to so many blocks of one stage go another way, or none."""
    for at, (some, size) in enumerate(zip(counts, sizes, strict=True)):
        whole = [*some, size - sum(some)]
        for source, target in permutations(range(len(whole)), 2):
            moved = list(whole)
            count = min(stride, whole[source])
            moved[source] -= count
            moved[target] += count
            yield (*counts[:at], tuple(moved[:-1]), *counts[at + 1 :])
