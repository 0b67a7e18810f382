"""The critical path of a simulated step: the chain of actions and transfers of which each had to wait for the last.

It has no hole, so its seconds add up to the makespan, and what is not on it may take longer for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from merak_like.partitioner.schedules.action import RECEIVE_OF, USER_OF, Action, Edges, Kind, Schedule
from merak_like.partitioner.simulator import Costs, Entry, Timeline

WORDS: Mapping[Kind, str] = {Kind.F: "forward", Kind.R: "recompute", Kind.B: "backward", Kind.W: "weight"}
TRANSFER = "transfer"
KINDS = (*WORDS.values(), TRANSFER)


class Leg(NamedTuple):
    """A part of the path; ``what`` is one of KINDS. Of a transfer, ``action`` is the send and ``rank`` its sender."""

    what: str
    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Path:
    """The legs in order of time."""

    legs: tuple[Leg, ...]
    makespan: float

    def seconds(self, what: Iterable[str] = KINDS, stage: int | None = None) -> float:
        """Of legs of some kinds, of all stages or one."""
        kinds = set(what)
        found = (leg for leg in self.legs if leg.what in kinds and stage in (None, leg.action.stage))
        return sum(leg.end - leg.start for leg in found)

    def stage_seconds(self, stages: int) -> tuple[float, ...]:
        """Seconds of each stage's computations."""
        return tuple(self.seconds(WORDS.values(), stage) for stage in range(stages))

    def links(self) -> dict[tuple[int, int], float]:
        """Seconds of transfers by edge, source stage first, whichever way they go."""
        found: dict[tuple[int, int], float] = {}
        for leg in self.legs:
            if leg.what == TRANSFER:
                ends = leg.action.stage, leg.action.peer
                edge = min(ends), max(ends)
                found[edge] = found.get(edge, 0.0) + leg.end - leg.start
        return found


def critical_path(schedule: Schedule, timeline: Timeline, costs: Costs, edges: Edges) -> Path:
    """Go back from the last action to end. ``schedule`` is the one simulated, with its transfers."""
    walk = _Walk(schedule, timeline, costs, edges)
    return Path(tuple(reversed(list(walk.back()))), timeline.makespan)


class _Walk:
    def __init__(self, schedule: Schedule, timeline: Timeline, costs: Costs, edges: Edges) -> None:
        self.schedule, self.costs, self.entries = schedule, costs, timeline.entries
        self.recomputed, self.weighed = schedule.apart(Kind.R), schedule.apart(Kind.W)
        self.place = {e.action: (rank, at) for rank, row in enumerate(timeline.entries) for at, e in enumerate(row)}
        self.givers: dict[tuple[Kind, int], list[int]] = {}
        carried = {(a.peer, a.stage) for a in self.place if a.kind is Kind.RECV_F}
        for source, target in sorted(edges | carried):
            self.givers.setdefault((Kind.F, target), []).append(source)
            self.givers.setdefault((Kind.B, source), []).append(target)
        self.channel_before: dict[Action, Action] = {}
        last: dict[tuple[int, int], Action] = {}
        for rank, row in enumerate(timeline.entries):
            for entry in row:
                if entry.action.kind in RECEIVE_OF:
                    ends = rank, schedule.stage_rank[entry.action.peer]
                    if ends in last:
                        self.channel_before[entry.action] = last[ends]
                    last[ends] = entry.action

    def back(self) -> Iterable[Leg]:
        """Legs from the last to the first."""
        ends = [(row[-1].end, rank) for rank, row in enumerate(self.entries) if row]
        ends = [(max(e.end for e in self.entries[rank] if e.action.peer < 0), rank) for _, rank in ends]
        _, rank = max(ends)
        at: int | None = self._computation(rank, len(self.entries[rank]))
        while at is not None:
            entry = self.entries[rank][at]
            yield from self._parts(rank, entry)
            before = self._computation(rank, at)
            binding = self.entries[rank][before].end if before is not None else 0.0
            other: tuple[int, int | None] | Action = rank, before
            for arrives, giver in self._arrivals(entry.action):
                if arrives > binding:
                    binding, other = arrives, giver
            if isinstance(other, Action):
                if other.peer < 0:
                    place = self.place[other]
                    made = self.entries[place[0]][place[1]]
                    if entry.start > made.end:
                        send = Action(_SEND[other.kind], other.micro_batch, other.stage, entry.action.stage)
                        yield Leg(TRANSFER, place[0], send, made.end, entry.start)
                    other = place
                else:
                    legs, other = self._transfers(other)
                    yield from legs
            rank, at = other

    def _computation(self, rank: int, before: int) -> int | None:
        """The last computation of a rank before a place in its order."""
        row = self.entries[rank]
        return next((at for at in range(before - 1, -1, -1) if row[at].action.peer < 0), None)

    def _arrivals(self, action: Action) -> Iterable[tuple[float, Action]]:
        """When each value that an action uses arrives: by a receive, or at once from its maker."""
        receive = _RECEIVE.get(action.kind)
        if receive is None:
            return
        for giver in self.givers.get((action.kind, action.stage), ()):
            posted = Action(receive, action.micro_batch, action.stage, giver)
            found = posted if posted in self.place else Action(action.kind, action.micro_batch, giver)
            rank, at = self.place[found]
            delay = 0.0
            if found.peer < 0 and self.schedule.stage_rank[giver] != self.schedule.stage_rank[action.stage]:
                edge = min(giver, action.stage), max(giver, action.stage)
                delay = self.costs.transfer.get(edge, 0.0)
            yield self.entries[rank][at].end + delay, found

    def _transfers(self, receive: Action) -> tuple[list[Leg], tuple[int, int | None]]:
        """A transfer, those before it that kept the channel busy, and the computation that the first waited for."""
        legs: list[Leg] = []
        while True:
            send = receive.match
            (sender, out), (receiver, into) = self.place[send], self.place[receive]
            ready, posted = self.entries[sender][out].start, self.entries[receiver][into].start
            end, before = self.entries[receiver][into].end, self.channel_before.get(send)
            free = self.entries[sender][self.place[before][1]].end if before is not None else 0.0
            start = max(ready, posted, free)
            if end > start:
                legs.append(Leg(TRANSFER, sender, send, start, end))
            if before is not None and free > max(ready, posted):
                receive = before.match
            elif posted > ready:
                return legs, (receiver, self._computation(receiver, into))
            else:
                return legs, (sender, self._computation(sender, out))

    def _parts(self, rank: int, entry: Entry) -> Iterable[Leg]:
        """A computation, from its end: what a B does for an R or W that is not there counts as what it is."""
        action, start, end = entry
        inside: list[tuple[str, float]] = [(WORDS[action.kind], end - start)]
        if action.kind is Kind.B:
            cost, one = self.costs.stages[action.stage], (action.micro_batch, action.stage)
            again = cost.recompute if action.stage in self.schedule.recomputes and one not in self.recomputed else 0.0
            weight = 0.0 if one in self.weighed else cost.weight
            inside = [("weight", weight), ("backward", end - start - again - weight), ("recompute", again)]
        for what, seconds in inside:
            if seconds > 0:
                yield Leg(what, rank, action, max(end - seconds, start), end)
                end -= seconds


_SEND = {USER_OF[receive]: send for send, receive in RECEIVE_OF.items()}
_RECEIVE = {use: receive for receive, use in USER_OF.items()}
