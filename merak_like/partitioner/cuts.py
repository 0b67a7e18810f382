"""Where the graph may be cut, and what crosses there.

A cut at position ``i`` separates ops ``0 .. i-1`` from ops ``i ..``::

    ops     0    1    2 │  3    4        legal[3]: no pinned interval spans the cut
    values  └─a──┴────┴─┼──┘    │        live_bytes[3]: a and b, each once, however often they are read
                      └─b───────┘

What costs bytes is each distinct value, not each edge. Sent are values from the stage that makes them straight to each
stage that reads them; nothing is relayed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from merak_like.partitioner.graph import ProxyGraph, Value
from merak_like.partitioner.locality import accesses
from merak_like.partitioner.plan import Crossing

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cuts:
    """For each position ``0 .. len(ops)``: may it be cut, how many values are live across it, and their bytes."""

    legal: Bools
    live_count: Ints
    live_bytes: Ints

    @property
    def positions(self) -> Ints:
        """The positions that may be cut, in order; the two ends are not among them."""
        return np.flatnonzero(self.legal)


def find_cuts(graph: ProxyGraph) -> Cuts:
    """Look at every position once: linear in ops and reads."""
    size = len(graph.ops)
    pinned, count, nbytes = (np.zeros(size + 2, np.int64) for _ in range(3))
    for first, last in graph.pinned:
        if not 0 <= first <= last < size:
            raise ValueError(f"pinned ops {first} to {last} are not among the {size} ops of the graph")
        pinned[first + 1] += 1
        pinned[last + 1] -= 1
    values = graph.values
    for name, uses in accesses(graph).items():
        weight = values[name].nbytes
        count[uses[0] + 1] += 1
        count[uses[-1] + 1] -= 1
        nbytes[uses[0] + 1] += weight
        nbytes[uses[-1] + 1] -= weight
    legal = np.cumsum(pinned)[: size + 1] == 0
    legal[0] = legal[size] = False
    return Cuts(legal, np.cumsum(count)[: size + 1], np.cumsum(nbytes)[: size + 1])


def live_values(graph: ProxyGraph, position: int) -> tuple[Value, ...]:
    """The distinct values live across one cut, in the order they are made."""
    if not 0 <= position <= len(graph.ops):
        raise ValueError(f"position {position} is outside the graph: cuts go from 0 to {len(graph.ops)}")
    values = graph.values
    return tuple(values[name] for name, uses in accesses(graph).items() if uses[0] < position <= uses[-1])


def crossings(graph: ProxyGraph, starts: Sequence[int]) -> tuple[Crossing, ...]:
    """Every value that leaves its stage, with all the stages that read it, in the order the values are made.

    ``starts`` is the first op of each stage and then the end, as in ``Plan.starts``.
    Raises ValueError for starts that do not cover the graph or that cut a pinned interval.
    """
    check_starts(graph, starts)
    values, found = graph.values, list[Crossing]()
    for name, uses in accesses(graph).items():
        source = bisect_right(starts, uses[0]) - 1
        if uses[-1] >= starts[source + 1]:
            targets = dict.fromkeys(bisect_right(starts, use) - 1 for use in uses[1:])
            targets.pop(source, None)
            value = values[name]
            found.append(
                Crossing(name, value.shape, value.dtype, value.nbytes, source, tuple(targets), value.requires_grad)
            )
    return tuple(found)


def check_starts(graph: ProxyGraph, starts: Sequence[int]) -> None:
    """Refuse starts that lose or double an op, leave a stage empty or cut a pinned interval (ValueError)."""
    size = len(graph.ops)
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != size:
        raise ValueError(f"stage starts {tuple(starts)} must begin with 0 and end with {size}, the number of ops")
    for before, after in pairwise(starts):
        if before >= after:
            raise ValueError(f"stage starts {tuple(starts)} leave a stage empty: {after} does not follow {before}")
    for first, last in graph.pinned:
        cut = starts[bisect_right(starts, first)]
        if cut <= last:
            raise ValueError(
                f"a cut at op {cut} ({graph.ops[cut].name}) splits ops {first} to {last}, which must stay together: "
                f"cut at {first} or {last + 1}"
            )
