"""When every action of a schedule starts and ends, or who waits for whom in a deadlock.

A rank runs its computations one after the other, each as soon as what it needs is there. Sends and receives take none
of the rank's time: a send starts when its action is reached, a receive is posted when its action is reached, and the
transfer starts when both have happened and the channel is free. A channel is an ordered pair of ranks; it carries one
transfer at a time, in the order they were started, forward values and gradients alike, as NCCL does, which has no tags.
The computation that uses a received value waits for it. Where a schedule has no transfers for an edge, the value is
there one hop after its producer ended, and at once on the same rank.

Event-driven and linear in the number of actions: a rank that waits is woken by the one action it waits for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from merak_like.partitioner.schedules.action import COMPUTE, RECEIVE_OF, USER_OF, Action, Edges, Kind, Schedule

_NEVER = -1.0


class Wait(NamedTuple):
    """A rank that cannot run action number `at` of its order, because another action has not happened."""

    rank: int
    at: int
    needs: Action


@dataclass(frozen=True)
class Clock:
    """Seconds at which orders[rank][index] starts and ends; waits is empty unless the schedule deadlocks."""

    starts: tuple[list[float], ...]
    ends: tuple[list[float], ...]
    waits: tuple[Wait, ...]


#: Seconds[kind][stage][micro_batch] of a computation.
Seconds = Mapping[Kind, Sequence[Sequence[float]]]


def run_clock(schedule: Schedule, edges: Edges, seconds: Seconds, hop: Mapping[tuple[int, int], float]) -> Clock:
    """Run the schedule with these seconds per computation and hop[source, target] per transfer (absent: 0)."""
    return _Run(schedule, edges, seconds, hop).to_the_end()


def run_unit_clock(schedule: Schedule, edges: Edges) -> Clock:
    """Run the schedule with one second per computation and none per transfer."""
    return run_clock(schedule, edges, dict.fromkeys(COMPUTE, [[1.0] * schedule.micro_batches] * schedule.stages), {})


def deadlock(schedule: Schedule, waits: Sequence[Wait]) -> tuple[Wait, str]:
    """Return a wait to point at, and the story: the ranks that wait in a circle, or the one that waits for nothing."""
    waits_of, places = {wait.rank: wait for wait in waits}, {a for order in schedule.orders for a in order}
    trail: dict[int, str] = {}
    wait = waits[0]
    while wait.rank not in trail:
        needs, reached = wait.needs, schedule.orders[wait.rank][: wait.at]
        if needs.kind in USER_OF and needs in reached:  # the receive is posted, so it is the send that is missing
            needs = needs.match
        other = schedule.stage_rank[needs.stage]
        trail[wait.rank] = (
            f"rank {wait.rank} waits in {schedule.orders[wait.rank][wait.at]} for {needs} of rank {other}"
        )
        if needs not in places or other not in waits_of:
            return wait, f"deadlock: {trail[wait.rank]}, which never comes"
        wait = waits_of[other]
    ranks = list(trail)
    return wait, "deadlock: " + "; ".join(trail[rank] for rank in ranks[ranks.index(wait.rank) :])


class _Need(NamedTuple):
    """What computations of one kind on one stage wait for: ends[micro_batch] of another action, and a delay."""

    kind: Kind
    stage: int
    peer: int
    ends: list[float]
    delay: float


class _End(NamedTuple):
    """One end of a transfer: when its rank reached it, and where it stands in that rank's order."""

    ready: float
    at: int
    action: Action


class _Channel:
    """The transfers from one rank to another, as each end orders them; free is when the last one was through."""

    def __init__(self) -> None:
        self.sends: list[_End] = []
        self.receives: list[_End] = []
        self.free = 0.0


class _Run:
    def __init__(
        self,
        schedule: Schedule,
        edges: Edges,
        seconds: Seconds,
        hop: Mapping[tuple[int, int], float],
    ) -> None:
        self.schedule, self.seconds, self.hop = schedule, seconds, hop
        orders, micro_batches = schedule.orders, schedule.micro_batches
        receives = {(a.kind, a.stage, a.peer) for order in orders for a in order if a.kind in USER_OF}
        self.done = {kind: [[_NEVER] * micro_batches for _ in range(schedule.stages)] for kind in COMPUTE}
        self.arrived = {receive: [_NEVER] * micro_batches for receive in receives}
        self.needs = self._needs(edges)
        self.channels: defaultdict[tuple[int, int], _Channel] = defaultdict(_Channel)
        self.starts = tuple([0.0] * len(order) for order in orders)
        self.ends = tuple([0.0] * len(order) for order in orders)
        self.now = [0.0] * len(orders)
        self.next = [0] * len(orders)
        self.waits: dict[int, Wait] = {}
        self.waiting: defaultdict[Action, list[int]] = defaultdict(list)
        self.ready = list(range(len(orders)))

    def _needs(self, edges: Edges) -> dict[Kind, list[list[_Need]]]:
        """Return needs[kind][stage]. An edge that has receives is waited for there, else at the producer itself."""
        rank, done = self.schedule.stage_rank, self.done
        needs: dict[Kind, list[list[_Need]]] = {kind: [[] for _ in rank] for kind in COMPUTE}
        for stage in range(self.schedule.stages):
            for kind, own in ((Kind.R, Kind.F), (Kind.B, Kind.F), (Kind.W, Kind.B)):
                needs[kind][stage].append(_Need(own, stage, -1, done[own][stage], 0.0))
        carried = {(peer, stage) if kind is Kind.RECV_F else (stage, peer) for kind, stage, peer in self.arrived}
        for source, target in sorted(edges | carried):
            delay = 0.0 if rank[source] == rank[target] else self.hop.get((source, target), 0.0)
            for receive, stage, peer in ((Kind.RECV_F, target, source), (Kind.RECV_B, source, target)):
                kind = USER_OF[receive]
                arrivals = self.arrived.get((receive, stage, peer))
                if arrivals is None:
                    needs[kind][stage].append(_Need(kind, peer, -1, done[kind][peer], delay))
                else:
                    needs[kind][stage].append(_Need(receive, stage, peer, arrivals, 0.0))
        return needs

    def to_the_end(self) -> Clock:
        while self.ready:
            self._advance(self.ready.pop())
        if not self.waits:
            for (source, target), channel in sorted(self.channels.items()):
                if len(channel.sends) != len(channel.receives):
                    raise ValueError(
                        f"rank {source} starts {len(channel.sends)} sends to rank {target}, "
                        f"which posts {len(channel.receives)} receives from it"
                    )
        return Clock(self.starts, self.ends, tuple(self.waits[rank] for rank in sorted(self.waits)))

    def _advance(self, rank: int) -> None:
        """Run the rank's actions until its order ends or one has to wait."""
        order, starts, ends, now = self.schedule.orders[rank], self.starts[rank], self.ends[rank], self.now[rank]
        done, needs, seconds, waiting = self.done, self.needs, self.seconds, self.waiting
        for index in range(self.next[rank], len(order)):
            action = order[index]
            kind, micro_batch, stage, peer = action
            if peer >= 0:
                starts[index] = ends[index] = now
                self._reach(rank, _End(now, index, action))
                continue
            for need in needs[kind][stage]:
                there = need.ends[micro_batch]
                if there < 0:
                    needed = Action(need.kind, micro_batch, need.stage, need.peer)
                    waiting[needed].append(rank)
                    self.waits[rank] = Wait(rank, index, needed)
                    self.next[rank], self.now[rank] = index, now
                    return
                if there + need.delay > now:
                    now = there + need.delay
            starts[index] = now
            now += seconds[kind][stage][micro_batch]
            ends[index] = done[kind][stage][micro_batch] = now
            if action in waiting:
                self._wake(action)

    def _reach(self, rank: int, end: _End) -> None:
        """Start a send or post a receive; it is transferred once the other end is there too."""
        other = self.schedule.stage_rank[end.action.peer]
        sends = end.action.kind in RECEIVE_OF
        channel = self.channels[(rank, other) if sends else (other, rank)]
        (channel.sends if sends else channel.receives).append(end)
        turn = len(channel.sends if sends else channel.receives) - 1
        if turn < len(channel.receives if sends else channel.sends):
            self._transfer(channel, channel.sends[turn], channel.receives[turn])

    def _transfer(self, channel: _Channel, send: _End, receive: _End) -> None:
        kind, micro_batch, stage, peer = receive.action
        sender, receiver = self.schedule.stage_rank[peer], self.schedule.stage_rank[stage]
        if send.action.match != receive.action:
            raise ValueError(
                f"rank {sender} sends {send.action} where rank {receiver} receives {receive.action}: "
                f"a channel has no tags, so values would be swapped silently"
            )
        seconds = self.hop.get((peer, stage) if kind is Kind.RECV_F else (stage, peer), 0.0)
        channel.free = max(send.ready, receive.ready, channel.free) + seconds
        self.ends[sender][send.at] = self.ends[receiver][receive.at] = channel.free
        self.arrived[kind, stage, peer][micro_batch] = channel.free
        if receive.action in self.waiting:
            self._wake(receive.action)

    def _wake(self, action: Action) -> None:
        for rank in self.waiting.pop(action):
            del self.waits[rank]
            self.ready.append(rank)
