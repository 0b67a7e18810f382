"""List scheduling: as time goes on, every rank runs the most urgent of the actions it could start."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from merak_like.partitioner.schedules.action import Kind
from merak_like.partitioner.schedules.auto.job import Job, Orders


class Rule(NamedTuple):
    """What is urgent."""

    caps: tuple[int, ...]
    """Per rank, the most micro-batches between the first F and the last B of the rank."""
    first: Kind = Kind.B
    """Whether backwards go before forwards, or forwards before backwards."""
    slack: float = 1.0
    """How much of an action may stick out of the hole it fills: 1 never waits, 0 never delays a more urgent one."""
    upward: bool = True
    """Whether, of two stages of a rank, the micro-batch that is further on its way goes first."""
    early: int = 1
    """How many recomputes may run before their gradients are in sight."""


def greedy(job: Job, rule: Rule) -> Orders | None:
    """Return the orders, or None where the memory is too small even for one micro-batch."""
    return _Greedy(job, rule).to_the_end()


class _Greedy:
    def __init__(self, job: Job, rule: Rule) -> None:
        self.job, self.rule = job, rule
        ranks, classes = len(job.of_rank), len(job.kinds)
        self.ends: list[list[float]] = [[] for _ in range(classes)]
        self.count = [0] * classes
        self.now, self.held = [0.0] * ranks, [0.0] * ranks
        self.orders: Orders = [[] for _ in range(ranks)]
        number = {(kind, stage): c for c, (kind, stage) in enumerate(zip(job.kinds, job.stages, strict=True))}
        self.backward = [number[Kind.B, stage] for stage in job.stages]
        lowest = [min((job.stages[c] for c in own), default=-1) for own in job.of_rank]
        self.enter = [number.get((Kind.F, stage), -1) for stage in lowest]
        self.leave = [number.get((Kind.B, stage), -1) for stage in lowest]
        self.grow = [[c for c in own if job.during[c] > 0] for own in job.of_rank]
        self.before = [[n for n in job.needs[b] if job.kinds[n.of] is not Kind.R] for b in self.backward]
        self.urgency = [self._urgency(c) for c in range(classes)]

    def _urgency(self, c: int) -> tuple[int, float]:
        """Smaller is more urgent."""
        job, kind = self.job, self.job.kinds[c]
        turn = {Kind.R: 0, self.rule.first: 1, Kind.W: 3}.get(kind, 2)  # an R in sight of its gradient is part of its B
        return turn, job.tails[c] if self.rule.upward else -job.tails[c]

    def to_the_end(self) -> Orders | None:
        job = self.job
        ranks = range(len(job.of_rank))
        best = [self._choose(rank) for rank in ranks]
        for _ in range(job.actions):
            start, rank = min((best[rank][0], rank) for rank in ranks)
            if start == inf:
                return None
            c = best[rank][1]
            end = start + job.seconds[c]
            self.ends[c].append(end)
            self.count[c] += 1
            self.now[rank] = end
            self.held[rank] += job.after[c]
            self.orders[rank].append(c)
            for touched in {rank, *(job.ranks[way.of] for way in job.feeds[c])}:
                best[touched] = self._choose(touched)
        return self.orders

    def _choose(self, rank: int) -> tuple[float, int]:
        """Return when the rank starts its next action, and which."""
        found: list[tuple[tuple[int, float], float, int]] = []
        for c in self.job.of_rank[rank]:
            start = self._start(rank, c)
            if start < inf:
                idle = self.job.kinds[c] is Kind.R and not self._in_sight(c)
                found.append(((2, 1.0) if idle else self.urgency[c], start, c))
        if not found:
            return inf, -1
        found.sort()
        seconds, slack = self.job.seconds, self.rule.slack
        _, wait, most = found[0]
        for _, start, c in found[1:]:
            if start < wait and start + seconds[c] <= wait + slack * seconds[c]:
                return start, c
        return wait, most

    def _start(self, rank: int, c: int) -> float:
        """Return when the next turn of a class could start, infinity while that is not known or not allowed."""
        job, turn, start = self.job, self.count[c], self.now[rank]
        if turn == job.micro_batches:
            return inf
        for of, delay in job.needs[c]:
            theirs = self.ends[of]
            if len(theirs) <= turn:
                return inf
            if theirs[turn] + delay > start:
                start = theirs[turn] + delay
        if c == self.enter[rank] and turn - self.count[self.leave[rank]] >= self.rule.caps[rank]:
            return inf
        if job.during[c] > 0 and not self._has_room(rank, c, turn):
            return inf
        if job.kinds[c] is Kind.R and turn - self.count[self.backward[c]] >= self.rule.early and not self._in_sight(c):
            return inf
        return start

    def _has_room(self, rank: int, c: int, turn: int) -> bool:
        """Whether memory is left, also for what the rank's oldest micro-batch still needs: else it might never end."""
        job, oldest = self.job, self.count[self.leave[rank]]
        more = job.during[c]
        if turn > oldest:
            more += sum(job.during[each] for each in self.grow[rank] if self.count[each] <= oldest)
        return self.held[rank] + more <= job.limit[rank]

    def _in_sight(self, recompute: int) -> bool:
        """Whether it is known when the gradient for the next recompute comes."""
        turn = self.count[recompute]
        return all(len(self.ends[of]) > turn for of, _ in self.before[recompute])
