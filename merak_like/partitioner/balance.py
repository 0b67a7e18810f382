"""The exact chain partition: contiguous stages whose worst one is as cheap as can be.

Dynamic programming from the end, because what a stage may hold depends on how many stages follow it::

    best[k][i] = min over j of max(cost(i, j, k), best[k - 1][j])       segments i .. j-1 are a stage, k stages follow

Exact for any cost that depends on nothing but the range and k: bytes over the cuts and memory included (a range that
does not fit costs infinity). O(size^2 * stages), vectorised over a band of ranges: row ``i``, column ``t`` of a band is
the range ``i .. i + t``, both ends included, so narrow bands suffice when no stage is much more than its share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KEPT = 2**28
"""Bytes of tables that are kept between the two passes of a chain partition."""

StageCost = Callable[[int], Floats]
"""``cost(k)[i, t]``: cost of the range ``i .. i + t`` with ``k`` stages after it; infinite where it must not be."""


def span(size: int, width: int) -> tuple[Ints, Ints]:
    """First segment, and the one after the last, of each range in a band (of a range over the end: ``size``)."""
    first = np.broadcast_to(np.arange(size, dtype=np.int64)[:, None], (size, width))
    stop = np.minimum(first + 1 + np.arange(width, dtype=np.int64)[None, :], size)
    return first, stop


def beyond(size: int, width: int) -> NDArray[np.bool_]:
    """Where a band's range would end after the last segment."""
    return np.arange(size)[:, None] + np.arange(width)[None, :] >= size


def suffixes(size: int, stages: int, cost: StageCost) -> Floats:
    """``best[k, i]``: the least bottleneck of segments ``i ..`` in ``k + 1`` stages; infinite if there is no way."""
    best = np.full((stages, size + 1), np.inf)
    for k in range(stages):
        table = cost(k)
        width = table.shape[1]
        if k == 0:
            rows = _last_rows(size, width)
            best[0, rows] = table[rows, size - 1 - rows]
        else:
            best[k, :size] = np.maximum(table, _after(best[k - 1], width)).min(axis=1)
    return best


def bottleneck(size: int, stages: int, cost: StageCost) -> tuple[float, tuple[int, ...]] | None:
    """The least possible worst stage, and the starts (and end) that reach it; None if no partition is finite.

    Among equals the earlier stages are taken as short as possible within the least sum of squared stage costs.
    """
    cost = _once(cost)
    best = suffixes(size, stages, cost)
    worst = float(best[stages - 1, 0])
    if not np.isfinite(worst):
        return None

    def squares(k: int) -> Floats:
        table = cost(k)
        return np.where(table <= worst, table * table, np.inf)

    total = np.full((stages, size + 1), np.inf)
    choice = np.zeros((stages, size), np.int64)
    for k in range(stages):
        table = squares(k)
        width = table.shape[1]
        if k == 0:
            rows = _last_rows(size, width)
            total[0, rows] = table[rows, size - 1 - rows]
            choice[0] = size
        else:
            sums = table + _after(total[k - 1], width)
            picked = sums.argmin(axis=1)
            choice[k] = np.arange(size) + 1 + picked
            total[k, :size] = sums[np.arange(size), picked]
    starts = [0]
    for k in reversed(range(stages)):
        starts.append(int(choice[k, starts[-1]]))
    return worst, tuple(starts)


def _once(cost: StageCost) -> StageCost:
    """The same, each table made once where all of them are no more than ``KEPT`` bytes."""
    tables: dict[int, Floats] = {}
    left = KEPT

    def kept(k: int) -> Floats:
        nonlocal left
        if k in tables:
            return tables[k]
        table = cost(k)
        left -= table.nbytes
        if left >= 0:
            tables[k] = table
        return table

    return kept


def _last_rows(size: int, width: int) -> Ints:
    """The starts from which a range of the band reaches the end."""
    return np.arange(max(size - width, 0), size, dtype=np.int64)


def _after(best: Floats, width: int) -> Floats:
    """``best`` at the end of each range of a band: a view, not a copy."""
    padded = np.concatenate([best[1:], np.full(width, np.inf)])
    return np.lib.stride_tricks.sliding_window_view(padded, width)[: len(best) - 1]


def band_width(weights: Floats | Ints, most: float) -> int:
    """Segments in the longest range whose weights sum to no more than ``most``; at least 1."""
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    reach = np.searchsorted(sums, sums[:-1] + most * (1 + 1e-12), side="right") - 1
    return max(int((reach - np.arange(len(weights))).max(initial=0)), 1)


def balance(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """The stage starts, then the end: stage s owns ``costs[starts[s]:starts[s + 1]]``, and the worst sum is least.

    No stage is empty. Raises ValueError for more stages than costs.
    """
    size = len(costs)
    if not 1 <= stages <= size:
        raise ValueError(f"{size} costs cannot fill {stages} stages: use 1 to {size} stages")
    weights = np.asarray(costs, np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("a cost is negative or not a number: costs are seconds, 0 or more")
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    most = max(float(weights.max()), float(weights.sum()) / stages)
    while True:
        width = band_width(weights, most)
        first, stop = span(size, width)
        table = np.where(beyond(size, width), np.inf, sums[stop] - sums[first])
        found = bottleneck(size, stages, lambda k, table=table: table)
        if found is not None and (found[0] <= most or width == size):
            return found[1]
        most *= 1.25
