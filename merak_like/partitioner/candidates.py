"""Which of the legal cuts are tried.

Every legal border between pieces, and inside a piece every place where fewer bytes are live than just before and after
it (of a plateau, the first place). If that is more than ``CAP``, the graph is divided into ``CAP`` slices of equal
weight, half by seconds and half by parameter bytes, and of each slice the cut with the fewest live bytes stays (then a
border between pieces, then the first). A slice holds 1/2000 of the model: nothing that could be balanced is lost.

Between two candidates something is computed, so no stage does nothing but read the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merak_like.partitioner.blocks import Piece
from merak_like.partitioner.cost import Cost
from merak_like.partitioner.cuts import Cuts, Ints
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.locality import travels

CAP = 2000
"""Most positions tried; the chain partition takes time quadratic in them."""


def candidates(
    graph: ProxyGraph, costs: Sequence[Cost], cuts: Cuts, pieces: Sequence[Piece], *, cap: int = CAP
) -> Ints:
    """The positions to try, in order, all legal; the ends are not among them."""
    legal = cuts.positions
    if not len(legal):
        return legal
    border = np.zeros(len(cuts.legal), np.bool_)
    border[[piece.first for piece in pieces]] = True
    live = cuts.live_bytes[legal]
    endless = np.array([np.iinfo(np.int64).max])
    fewer_than_before = live < np.concatenate([endless, live[:-1]])
    # Of a plateau the first place is kept, if what follows the plateau is higher.
    change = np.flatnonzero(np.concatenate([live[1:] != live[:-1], [True]]))
    next_level = np.concatenate([live[np.minimum(change[:-1] + 1, len(live) - 1)], endless])
    fewer_than_after = live < next_level[np.searchsorted(change, np.arange(len(live)))]
    chosen = legal[border[legal] | (fewer_than_before & fewer_than_after)]
    computed = np.cumsum([0, *(travels(op) and op.kind != "guard" for op in graph.ops)])
    done = computed[chosen]
    chosen = chosen[(np.diff(done, prepend=0) > 0) & (done < computed[-1])]
    return chosen if len(chosen) <= cap else _thinned(chosen, costs, cuts, border[chosen], cap)


def _thinned(chosen: Ints, costs: Sequence[Cost], cuts: Cuts, border: np.ndarray, cap: int) -> Ints:
    weight = np.zeros(len(costs) + 1)
    for column in ([cost.seconds for cost in costs], [cost.param_bytes for cost in costs]):
        sums = np.concatenate([[0.0], np.cumsum(column)])
        weight += sums / sums[-1] if sums[-1] > 0 else np.linspace(0.0, 1.0, len(sums))
    slices = np.minimum((weight[chosen] * (cap / 2)).astype(np.int64), cap - 1)
    order = np.lexsort((chosen, ~border, cuts.live_bytes[chosen], slices))
    _, first = np.unique(slices[order], return_index=True)
    return np.sort(chosen[order[first]])
