"""The order of a job with its transfers, compiled once for all who judge its partitions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from merak_like.partitioner.compiled import Columns, Compiled, R
from merak_like.partitioner.planned import recomputing
from merak_like.partitioner.schedules.action import Edges, Schedule

MOST = 16
"""Compiled orders that are remembered."""


class Orders:
    """A compute-only schedule in which all stages recompute, and what becomes of it where only some do."""

    def __init__(self, order: Schedule) -> None:
        self.order, self.columns = order, Columns.of(order)
        self._apart = bool((self.columns.kind == R).any())
        self._bare = replace(order, recomputes=frozenset())
        self._made: dict[tuple[frozenset[int], Edges], Compiled] = {}

    def __call__(self, recomputes: Collection[int], edges: Edges) -> Compiled:
        """The order in which these stages recompute, over these edges; where no R is an action, they do not matter."""
        again = frozenset(recomputes if self._apart else ())
        if (again, edges) not in self._made:
            if len(self._made) >= MOST:
                self._made.clear()
            schedule = recomputing(self.order, again) if self._apart else self._bare
            self._made[again, edges] = Compiled(schedule, edges, self.columns.recomputing(again))
        return self._made[again, edges]
