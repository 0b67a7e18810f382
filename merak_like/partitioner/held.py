"""How many micro-batches of each stage a rank holds, and how: from the schedule alone, before anything has a size.

A live micro-batch of a stage is *kept* (between its forward and its recompute), *full* (from its recompute, or its
forward where there is none, to its backward) or *waits* (between its backward and its W). The most bytes of a rank are
the most of a few sums of these counts times bytes, so they can be solved for what may be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merak_like.partitioner.balance import Ints
from merak_like.partitioner.schedules.action import Kind, Schedule


@dataclass(frozen=True)
class Held:
    """The moments of one rank that can be its fullest: ``kept[t, n]`` micro-batches of its n-th stage at moment t."""

    stages: tuple[int, ...]
    kept: Ints
    full: Ints
    waits: Ints

    def of(self, stage: int) -> Held:
        """The moments of one of the stages alone."""
        n = self.stages.index(stage)
        return _fullest((stage,), self.kept[:, [n]], self.full[:, [n]], self.waits[:, [n]])


def held(schedule: Schedule) -> tuple[Held, ...]:
    """What each rank holds if all its stages recompute; a stage that does not keeps as much as it has in full."""
    recomputed, weighed = schedule.apart(Kind.R), schedule.apart(Kind.W)
    ranks: list[Held] = []
    for rank, order in enumerate(schedule.orders):
        stages = tuple(stage for stage, of in enumerate(schedule.stage_rank) if of == rank)
        place = {stage: n for n, stage in enumerate(stages)}
        counts = np.zeros((3, len(stages)), np.int64)
        moments: list[Ints] = []
        for kind, i, stage, peer in order:
            if peer >= 0:
                continue
            n, apart = place[stage], (i, stage) in recomputed
            if kind is Kind.F:
                counts[0, n] += 1
            elif kind is Kind.R or (kind is Kind.B and not apart):
                counts[:2, n] += (-1, 1)
            moments.append(counts.copy())
            if kind is Kind.B:
                counts[1:, n] += (-1, (i, stage) in weighed)
            elif kind is Kind.W:
                counts[2, n] -= 1
        found = np.array(moments, np.int64).reshape(-1, 3, len(stages))
        ranks.append(_fullest(stages, found[:, 0], found[:, 1], found[:, 2]))
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
