"""Which axes to shard: by the volume of parameters they divide, two of them never on one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import gcd, prod

from merak_like.partitioner.tensor_parallel.axes import Axes, Dim, Dims
from merak_like.partitioner.tensor_parallel.flow import Flows
from merak_like.partitioner.tensor_parallel.follow import Followed

ALIKE = 0.999
"""Candidates whose volumes differ by less are told apart by their communication."""


@dataclass(frozen=True)
class Candidate:
    """Axes sharded together: one by all ranks, or two of which the first has too few parts for all ranks."""

    axes: tuple[int, ...]
    degrees: tuple[int, ...]
    volume: float
    """Elements of matrix parameters that it divides."""


def choose(followed: Followed, flows: Flows, tp: int) -> tuple[Candidate, ...]:
    """Take candidates by volume, ties by bytes communicated, as long as they do not meet a taken one."""
    if tp == 1:
        return ()
    volumes = volumes_of(followed)
    meeting = meetings(followed, frozenset(volumes))
    good = [c for c in candidates(followed, volumes, tp) if not any((a, a) in meeting for a in c.axes)]
    while True:
        taken = independent(good, volumes, flows, meeting)
        half = halves(followed, frozenset(axis for candidate in taken for axis in candidate.axes))
        if not half:
            return taken
        good = [candidate for candidate in good if half.isdisjoint(candidate.axes)]


def halves(followed: Followed, chosen: frozenset[int]) -> frozenset[int]:
    """Axes in some segments of a row that is summed over, while other segments are whole.

    The whole segments would be summed once by every rank.
    """
    axes, found = followed.axes, set[int]()
    for record in followed.records:
        for dim in record.contracted:
            for axis in axes.resolve(dim):
                parts = [chosen.intersection(axes.leaves(segment)) for segment in axes.segments(axis)]
                if not all(parts):
                    found.update(*parts)
    return frozenset(found)


def independent(
    left: list[Candidate], volumes: Mapping[int, float], flows: Flows, meeting: set[tuple[int, int]]
) -> tuple[Candidate, ...]:
    """Candidates of which no two meet, the largest first."""
    taken = list[Candidate]()
    while left:
        most = max(candidate.volume for candidate in left)
        best = [candidate for candidate in left if candidate.volume >= ALIKE * most]
        if len(best) > 1:
            best.sort(key=lambda c: (traffic(flows, c), -sum(volumes[axis] for axis in c.axes)))
        taken.append(best[0])
        left = [
            c for c in left if c is not best[0] and not any(meet(meeting, a, b) for a in c.axes for b in best[0].axes)
        ]
    return tuple(taken)


def traffic(flows: Flows, candidate: Candidate) -> int:
    """Bytes reduced forward and backward if only this candidate is taken."""
    degrees = dict(zip(candidate.axes, candidate.degrees, strict=True))
    each = [flows.run(frozenset((axis,)), degree, degrees) for axis, degree in degrees.items()]
    return sum(flow.forward_bytes + flow.backward_bytes for flow in each)


def meet(meeting: set[tuple[int, int]], one: int, other: int) -> bool:
    """Whether two axes divide the same elements of some tensor."""
    return one == other or (min(one, other), max(one, other)) in meeting


def volumes_of(followed: Followed) -> dict[int, float]:
    """For every axis that may be sharded: the elements of matrix parameters along it."""
    axes, found = followed.axes, dict[int, float]()
    for name, dims in followed.weights.items():
        known = followed.known[name]
        if not known.matrix:
            continue
        for dim in dims:
            for axis, share in shares(axes, dim):
                if not axes.pinned(axis):
                    found[axis] = found.get(axis, 0.0) + share * prod(known.shape)
    return found


def shares(axes: Axes, dim: Dim, share: float = 1.0) -> Iterator[tuple[int, float]]:
    """Every axis of a dimension with the share of its elements that lie along it."""
    for axis in axes.resolve(dim):
        segments = axes.segments(axis)
        if not segments:
            yield axis, share
        for segment in segments:
            yield from shares(axes, segment, share * axes.size(segment) / axes.size((axis,)))


def candidates(followed: Followed, volumes: Mapping[int, float], tp: int) -> list[Candidate]:
    """Axes that all ranks can divide, and pairs of neighbours that they can divide together."""
    axes, found = followed.axes, list[Candidate]()
    for axis, volume in volumes.items():
        size = axes.size((axis,))
        if size % tp == 0:
            found.append(Candidate((axis,), (tp,), volume))
            continue
        few = gcd(size, tp)
        if few > 1:
            for other in sorted(neighbours(followed, axis) & volumes.keys()):
                if axes.size((other,)) % (tp // few) == 0:
                    found.append(Candidate((axis, other), (few, tp // few), volume))
    return found


def neighbours(followed: Followed, axis: int) -> set[int]:
    """Axes that come next to this one in a dimension of some parameter."""
    found = set[int]()

    def walk(dim: Dim) -> None:
        dim = followed.axes.resolve(dim)
        for one, other in pairwise(dim):
            if one == axis:
                found.add(other)
        for one in dim:
            for segment in followed.axes.segments(one):
                walk(segment)

    for dims in followed.weights.values():
        for dim in dims:
            walk(dim)
    return found


def meetings(followed: Followed, interesting: frozenset[int]) -> set[tuple[int, int]]:
    """Pairs of axes that divide the same elements of a tensor; an axis pairs with itself if it does so twice."""
    found: set[tuple[int, int]] = set()
    tensors: set[Dims] = {*followed.values.values(), *followed.weights.values()}
    tensors.update(use.dims for record in followed.records for use in record.uses)
    for dims in tensors:
        product(followed.axes, [axis for dim in dims for axis in followed.axes.resolve(dim)], interesting, found)
    return found


def product(axes: Axes, factors: list[int], interesting: frozenset[int], found: set[tuple[int, int]]) -> None:
    """All leaves of different factors meet; leaves of one factor only within a segment."""
    leaves: list[list[int]] = []
    for factor in factors:
        segments = axes.segments(factor)
        for segment in segments:
            product(axes, list(axes.resolve(segment)), interesting, found)
        leaves.append(sorted({leaf for leaf in axes.leaves((factor,)) if leaf in interesting}))
    for mine, theirs in combinations([group for group in leaves if group], 2):
        found.update((min(a, b), max(a, b)) for a in mine for b in theirs)
