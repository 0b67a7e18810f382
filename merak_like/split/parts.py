"""The cloud's half cut once more, into a part for each rank of a host."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from merak_like.partitioner.balance import balance
from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.locality import held_by, residents
from merak_like.split.halves import Halves


def borders(halves: Halves, ranks: int) -> tuple[int, ...]:
    """The first ops of the parts after the first: equal work each, cut where little crosses.

    Raises ValueError where there are too few places to cut, or a weight would be on two ranks.
    """
    graph, (start, stop) = halves.trace.graph, halves.starts[1:3]
    if ranks == 1:
        return ()
    cuts = find_cuts(graph)
    legal = [i for i in range(start + 1, stop) if cuts.legal[i]]
    if len(legal) < ranks - 1:
        raise ValueError(f"the cloud's half can be cut at {len(legal)} places, {ranks} ranks need {ranks - 1}")
    few = float(np.quantile(cuts.live_bytes[legal], 0.25))
    narrow = [i for i in legal if cuts.live_bytes[i] <= few]
    places = [start, *(narrow if len(narrow) >= ranks - 1 else legal), stop]
    work = [float(sum(op.flops for op in graph.ops[a:b])) for a, b in pairwise(places)]
    found = tuple(places[i] for i in balance(work, ranks)[1:-1])
    needs = residents(graph)
    trained = {p.name for p in graph.parameters if p.trainable and not p.buffer}
    seen: set[str] = set()
    for a, b in pairwise((start, *found, stop)):
        held = trained & set(held_by(needs, a, b))
        if both := sorted(held & seen):
            raise ValueError(f"{both[0]} is used in two parts of the cloud's half: serve this cut on one rank")
        seen |= held
    return found
