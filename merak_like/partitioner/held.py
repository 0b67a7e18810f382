"""How many micro-batches of each stage a rank holds, and how: from the schedule alone, before anything has a size.

A live micro-batch of a stage is *kept* (between its forward and its recompute), *full* (from its recompute, or its
forward where there is none, to its backward) or *waits* (between its backward and its W). The most bytes of a rank are
the most of a few sums of these counts times bytes, so they can be solved for what may be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from merak_like.partitioner.balance import Ints
from merak_like.partitioner.compiled import B, Columns, F, R, W
from merak_like.partitioner.schedules.action import Schedule


@dataclass(frozen=True)
class Held:
    """The moments of one rank that can be its fullest: ``kept[t, n]`` micro-batches of its n-th stage at moment t."""

    stages: tuple[int, ...]
    kept: Ints
    full: Ints
    waits: Ints

    @cached_property
    def alone(self) -> tuple[Held, ...]:
        """The moments of each of the stages, as if it had the rank for itself."""
        columns = ((stage, [n]) for n, stage in enumerate(self.stages))
        return tuple(_fullest((s,), self.kept[:, n], self.full[:, n], self.waits[:, n]) for s, n in columns)

    def of(self, stage: int) -> Held:
        """The moments of one of the stages alone."""
        return self.alone[self.stages.index(stage)]


def held(schedule: Schedule, columns: Columns | None = None) -> tuple[Held, ...]:
    """What each rank holds if all its stages recompute; a stage that does not keeps as much as it has in full."""
    columns = Columns.of(schedule) if columns is None else columns
    ranks: list[Held] = []
    for rank, (first, stop) in enumerate(pairwise(columns.first)):
        stages = tuple(stage for stage, of in enumerate(schedule.stage_rank) if of == rank)
        own, kind = slice(first, stop), columns.kind[first:stop]
        here = columns.stage[own, None] == np.array(stages)
        opens = (kind == R) | ((kind == B) & ~columns.apart[own])
        # What changes when an action begins, which is then at its fullest, and when it has ended.
        kept = np.cumsum(((kind == F) * 1 - opens)[:, None] * here, axis=0)
        ends, puts_off = (kind == B)[:, None] * here, (columns.weighed[own] & (kind == B)) * 1 - (kind == W)
        full = np.cumsum(opens[:, None] * here, axis=0) - (np.cumsum(ends, axis=0) - ends)
        change = puts_off[:, None] * here
        ranks.append(_fullest(stages, kept, full, np.cumsum(change, axis=0) - change))
    return tuple(ranks)


def _fullest(stages: Sequence[int], kept: Ints, full: Ints, waits: Ints) -> Held:
    """Leave out the moments that hold no more than another, whatever the bytes.

    What is kept is between nothing and as much as in full, what waits may be anything, so these sums decide.
    """
    sums = np.unique(np.hstack([full, full + kept, waits]), axis=0)
    more = (sums[None, :, :] >= sums[:, None, :]).all(axis=2)
    sums = sums[more.sum(axis=1) == 1]  # each is no more than itself
    full, with_kept, waits = np.split(sums, 3, axis=1)
    return Held(tuple(stages), with_kept - full, full, waits)
