"""What is to be ordered, as numbers: one class per kind and stage, whose turns are the micro-batches in order.

Micro-batches are alike, so no order is lost by letting every class take them in turn: exchanging the names of two that
overtake each other changes no time and no memory. An order of a rank is then a sequence of classes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from merak_like.partitioner.schedules.action import Action, Edges, Kind, Schedule
from merak_like.partitioner.simulator import Costs

#: Per rank, the class of each of its actions.
Orders = list[list[int]]


class Need(NamedTuple):
    """A class whose same turn must have ended `delay` seconds ago."""

    of: int
    delay: float


@dataclass(frozen=True)
class Job:
    """Classes of actions. A rank may hold up to `limit[rank]`; an action adds `during` while it runs, then `after`."""

    micro_batches: int
    stage_rank: tuple[int, ...]
    recomputes: frozenset[int]
    kinds: tuple[Kind, ...]
    stages: tuple[int, ...]
    ranks: tuple[int, ...]
    seconds: tuple[float, ...]
    needs: tuple[tuple[Need, ...], ...]
    feeds: tuple[tuple[Need, ...], ...]
    during: tuple[float, ...]
    after: tuple[float, ...]
    limit: tuple[float, ...]
    of_rank: tuple[tuple[int, ...], ...]
    tails: tuple[float, ...]
    """Seconds that must follow the end of an action of the class."""
    heads: tuple[float, ...]
    """Seconds that must go before the start of its first turn."""

    @property
    def actions(self) -> int:
        return len(self.kinds) * self.micro_batches

    def schedule(self, orders: Orders) -> Schedule:
        """Return the orders as a schedule."""
        turns = [0] * len(self.kinds)
        written: list[tuple[Action, ...]] = []
        for order in orders:
            actions: list[Action] = []
            for c in order:
                actions.append(Action(self.kinds[c], turns[c], self.stages[c]))
                turns[c] += 1
            written.append(tuple(actions))
        return Schedule(len(self.stage_rank), self.micro_batches, tuple(written), self.stage_rank, self.recomputes)

    def orders(self, schedule: Schedule) -> Orders:
        """Return the classes of a schedule's actions; what is no class of this job is left out."""
        number = {(kind, stage): c for c, (kind, stage) in enumerate(zip(self.kinds, self.stages, strict=True))}
        numbers = ([number.get((action.kind, action.stage), -1) for action in order] for order in schedule.orders)
        return [[c for c in order if c >= 0] for order in numbers]

    def fits(self, orders: Orders) -> bool:
        """Whether every rank stays within its memory."""
        for order, limit in zip(orders, self.limit, strict=True):
            held = 0.0
            for c in order:
                if held + self.during[c] > limit:
                    return False
                held += self.after[c]
        return True


def make_job(
    costs: Costs,
    micro_batches: int,
    stage_rank: Sequence[int],
    edges: Edges,
    *,
    recomputes: Collection[int],
    split: bool,
    live: Sequence[float] | None,
    memory: Sequence[float] | None,
) -> Job:
    """Return the job; memory counts bytes where `memory` is given, else live micro-batches."""
    stages, count = costs.stages, len(costs.stages)
    kinds: list[tuple[Kind, int]] = []
    for stage, cost in enumerate(stages):
        apart = ((Kind.R, stage in recomputes), (Kind.W, split and cost.weight > 0))
        kinds += [(kind, stage) for kind, there in ((Kind.F, True), apart[0], (Kind.B, True), apart[1]) if there]
    number = {each: c for c, each in enumerate(kinds)}
    pairs: list[tuple[int, int, float]] = []
    for kind, stage in kinds:
        for later in (Kind.R, Kind.B) if kind is Kind.F else (Kind.B,) if kind is Kind.R else (Kind.W,):
            if kind is not Kind.W and (later, stage) in number:
                pairs.append((number[kind, stage], number[later, stage], 0.0))
    for source, target in sorted(edges):
        delay = 0.0 if stage_rank[source] == stage_rank[target] else costs.transfer.get((source, target), 0.0)
        pairs.append((number[Kind.F, source], number[Kind.F, target], delay))
        pairs.append((number[Kind.B, target], number[Kind.B, source], delay))

    def seconds(kind: Kind, stage: int) -> float:
        cost = stages[stage]
        whole = cost.backward + (0.0 if (Kind.W, stage) in number else cost.weight)
        return {Kind.F: cost.forward, Kind.R: cost.recompute, Kind.B: whole, Kind.W: cost.weight}[kind]

    def held(kind: Kind, stage: int) -> tuple[float, float]:
        """What an action adds while it runs, and what it leaves."""
        cost, weighs = stages[stage], (Kind.W, stage) in number
        full = 1 if memory is None else cost.activation_bytes
        kept = full if memory is None or stage not in recomputes else cost.kept
        put_off = (1 if memory is None else cost.held_for_weight) if weighs else 0
        match kind:
            case Kind.F:
                return kept, kept
            case Kind.R:
                return full - kept, full - kept
            case Kind.B:
                return 0, put_off - full
            case _:
                return 0, -put_off

    limit = memory if memory is not None else live
    spent = tuple(seconds(*each) for each in kinds)
    needs = tuple(tuple(Need(a, delay) for a, b, delay in pairs if b == c) for c in range(len(kinds)))
    feeds = tuple(tuple(Need(b, delay) for a, b, delay in pairs if a == c) for c in range(len(kinds)))
    rank_count = max(stage_rank) + 1
    return Job(
        micro_batches=micro_batches,
        stage_rank=tuple(stage_rank),
        recomputes=frozenset(recomputes),
        kinds=tuple(kind for kind, _ in kinds),
        stages=tuple(stage for _, stage in kinds),
        ranks=tuple(stage_rank[stage] for _, stage in kinds),
        seconds=spent,
        needs=needs,
        feeds=feeds,
        during=tuple(held(*each)[0] for each in kinds),
        after=tuple(held(*each)[1] for each in kinds),
        limit=tuple(float("inf") for _ in range(rank_count)) if limit is None else tuple(map(float, limit)),
        of_rank=tuple(
            tuple(c for c, (_, stage) in enumerate(kinds) if stage_rank[stage] == rank) for rank in range(rank_count)
        ),
        tails=_longest(feeds, spent, count),
        heads=_longest(needs, spent, count),
    )


def _longest(ways: Sequence[Sequence[Need]], seconds: Sequence[float], stages: int) -> tuple[float, ...]:
    """Return the longest way on from each class, its own seconds not counted."""
    longest = [0.0] * len(seconds)
    for _ in range(2 * stages + 3):  # a path has no more classes than this: forward, recompute, back, weights
        longest = [max((w.delay + seconds[w.of] + longest[w.of] for w in way), default=0.0) for way in ways]
    return tuple(longest)
