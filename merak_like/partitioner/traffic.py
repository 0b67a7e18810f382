"""What travels between stages, for many partitions of one graph: the values over a grid of positions, summed up once.

A partition is given in *segments*: segment ``i`` is what lies between two neighbouring positions, and a stage is a run
of segments. ``cuts.crossings`` says the same about single values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil

import numpy as np

from merak_like.partitioner.cuts import Bools, Ints
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.locality import accesses


class Traffic:
    """The bytes on every edge between stages; ``positions`` include both ends of the graph."""

    def __init__(self, graph: ProxyGraph, positions: Ints, *, scale: float = 1.0) -> None:
        size = len(positions) - 1
        segment: list[int] = (np.searchsorted(positions, np.arange(len(graph.ops)), side="right") - 1).tolist()
        values = graph.values
        steps: Counter[tuple[int, int, int]] = Counter()
        for name, uses in accesses(graph).items():
            places = list(dict.fromkeys(segment[use] for use in uses))
            for before, after in pairwise(places):
                steps[places[0], before, after] += ceil(values[name].nbytes * scale)
        # Row: the segment that makes values, two neighbouring segments among those that touch them, bytes.
        rows = np.array([(*key, nbytes) for key, nbytes in steps.items()], np.int64).reshape(-1, 4)
        self._made, self._before, self._after, self._bytes = rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3]
        near = (self._before == self._made) & (self._after == self._made + 1)
        self.near_bytes = np.zeros(size + 1, np.int64)
        """At each position: bytes made just before and read just after, which cross whatever the other cuts are."""
        np.add.at(self.near_bytes, self._after[near], self._bytes[near])
        self.linked: Bools = np.zeros(size + 1, np.bool_)
        """Whether there are such values: if so, the stage after the cut waits for the stage before it."""
        self.linked[self._after[near]] = True

    def edges(self, starts: Sequence[int]) -> Mapping[tuple[int, int], int]:
        """Bytes from stage to stage, each value once for each stage that reads it; no key, no values."""
        stage = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        source, before, target = stage[self._made], stage[self._before], stage[self._after]
        over = np.flatnonzero(before != target)
        found: Counter[tuple[int, int]] = Counter()
        for edge, nbytes in zip(
            zip(source[over].tolist(), target[over].tolist(), strict=True), self._bytes[over].tolist(), strict=True
        ):
            found[edge] += nbytes
        return found
